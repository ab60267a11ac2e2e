"""The cold start: supervised steps on the teacher's records, so that RL has something to reinforce.

A teacher record becomes a `Rollout` whose "sampled" tokens are the assistant's, so packing, head and masks are the
ones RL uses. The support gate asks first whether a cold start is needed at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lite_mentor.batch import pack
from lite_mentor.config import Config
from lite_mentor.errors import UserError
from lite_mentor.loss import backward, supervised_loss
from lite_mentor.optim import Guard, apply_gradients, blame, learning_rate
from lite_mentor.prompt import Chat
from lite_mentor.soft import read as read_labels
from lite_mentor.student import Student
from lite_mentor.types import Batch, Example, Rollout, Scored, TeacherRecord

ENOUGH_SUPPORT = 0.5
"""A student with at least this share of working episodes needs no cold start."""
GATE_EXAMPLES = 8
"""The gate plays two episodes of each, a quarter of what a step of the default run plays."""


def support(rollouts: Sequence[Rollout]) -> float:
    """Share of rollouts in which at least one call worked: without any, no process reward can ever be seen."""
    return sum(any(call.status == "ok" for call in r.calls) for r in rollouts) / len(rollouts)


def teacher_rollouts(
    chat: Chat, examples: Sequence[Example], teacher: Mapping[str, TeacherRecord], config: Config
) -> list[Rollout]:
    """The records of these examples as the cold start reads them. UserError for one that no packed row can hold."""
    found = [teacher_rollout(chat, e, teacher[e.key], config.max_result_tokens) for e in examples]
    for rollout in found:
        if 0 < config.micro_tokens < len(rollout.ids) - 1:
            raise UserError(
                f"The teacher's record of example {rollout.example_key} has {len(rollout.ids)} tokens, but a row takes "
                f"{config.micro_tokens}; raise --micro-tokens, or fill a cache with shorter records."
            )
    return found


def teacher_rollout(chat: Chat, example: Example, record: TeacherRecord, max_result_tokens: int = 256) -> Rollout:
    """A teacher's trajectory as the student's template would hold it; assistant tokens are marked as sampled.

    Not those of a turn with a call that could not be read: from it a student learns how the teacher recovers, and not
    how it erred.
    """
    ids = chat.prompt_ids(example)
    prompt_length = len(ids)
    sampled = [False] * prompt_length
    results: list[str] = []
    end = ({"role": "end", "content": ""}, False)
    for message, learned in [*zip(record.messages, _learned(record), strict=True), end]:
        if message["role"] == "tool":
            results.append(chat.clipped(message["content"], max_result_tokens))
            continue
        if results:
            suffix = chat.result_ids(results)
            ids, sampled, results = ids + suffix, sampled + [False] * len(suffix), []
        if message["role"] == "assistant":
            turn = chat.turn_ids(message["content"])
            ids, sampled = ids + turn, sampled + [learned] * len(turn)
    return Rollout(
        example_key=example.key,
        group=0,
        index=0,
        ids=torch.tensor(ids),
        sampled=torch.tensor(sampled),
        behaviour_logp=torch.zeros(len(ids)),
        prompt_length=prompt_length,
        calls=record.calls,
        turns=sum(m["role"] == "assistant" for m in record.messages),
        answer=record.answer,
        stop="answer",
    )


def _learned(record: TeacherRecord) -> list[bool]:
    """Of each message of the record: is it the assistant's, and could all its calls be read?"""
    learned: list[bool] = []
    calls, turn = iter(record.calls), 0
    for i, message in enumerate(record.messages):
        learned.append(message["role"] == "assistant")
        if learned[i]:
            turn = i
        elif next(calls).status == "bad_json":
            learned[turn] = False
    return learned


def cold_start(
    student: Student,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence[Rollout],
    config: Config,
    guard: Guard,
) -> Iterator[dict[str, float]]:
    """Take `config.sft_steps` supervised steps over the teacher's rollouts, yielding each step's metrics.

    Step k always sees the same records. Updates that are not finite are not applied; raises Diverged after three in a
    row.
    """
    labels = read_labels(Path(config.soft_labels)) if config.soft_labels else None

    def loss_of(batch: Batch, chosen: Sequence[Rollout]) -> torch.Tensor:
        within = [chosen[i] for i in batch.sequence_N.unique_consecutive().tolist()]
        soft = labels.of(within) if labels else None
        return supervised_loss(student, batch, config.kernel_backend, soft, config.soft_weight)

    def loss_alone(s: Scored) -> torch.Tensor:
        return loss_of(pack([s.rollout], [0.0], config.micro_tokens)[0], [s.rollout])

    for step in range(config.sft_steps):
        chosen = [rollouts[(step * config.sft_batch + i) % len(rollouts)] for i in range(config.sft_batch)]
        batches = pack(chosen, [0.0] * len(chosen), config.micro_tokens)
        parts = []
        for batch in batches:
            part = loss_of(batch, chosen)
            backward(part, config)
            parts.append(part.detach())
        loss = sum(torch.stack(parts).tolist())  # waits for the GPU once
        lr = learning_rate(step, config.sft_steps, peak=config.sft_lr, warmup=3, schedule="cosine")
        update = apply_gradients(optimizer, lr=lr, max_norm=config.max_grad_norm, allowed=math.isfinite(loss))
        if update.applied:
            guard.passed()
        else:
            share = [Scored(rollout, {}, None, None) for rollout in chosen]
            why = f"its loss is {loss} and its gradient norm {update.grad_norm}"
            found = blame(share, loss_alone, student.trainable(), config)
            guard.refused(f"cold start step {step}", share, f"{why}; {found}")
        yield {
            "step": step,
            "phase": "sft",
            "loss": loss,
            "grad_norm": update.grad_norm,
            "lr": lr,
            "tokens/sampled": batches[0].global_tokens,
        }
