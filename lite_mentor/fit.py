"""Proof, before step 1, that the longest row a run can meet fits in memory: one is built and differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from lite_mentor.batch import pack
from lite_mentor.config import Config
from lite_mentor.device import memory_left
from lite_mentor.errors import UserError
from lite_mentor.log import peak_memory_bytes, reserved_memory_bytes
from lite_mentor.loss import backward, batch_loss
from lite_mentor.student import Student
from lite_mentor.types import Batch, Rollout

MOST_ROW_TOKENS = 16_384
"""A longer row gains nothing: its launches are few beside its work."""
CPU_ROW_TOKENS = 1024
"""Its activations stay small, and a CPU gains nothing from more."""


def row_tokens(student: Student, config: Config) -> int:
    """What --micro-tokens 0 means here: one whole rollout at least, else by the device.

    On a GPU rows of one rollout and then of each larger power of two are run, until the next would take more than half
    of the memory that is free now; the other half is the cache's. Only rounding depends on the answer.
    """
    longest = config.longest_rollout
    if student.device.type != "cuda":
        return max(longest, CPU_ROW_TOKENS)
    room = torch.cuda.mem_get_info(student.device)[0] / 2
    return largest_row(longest, room, lambda tokens: _row_bytes(student, replace(config, micro_tokens=tokens)))


def largest_row(longest: int, room: float, bytes_of: Callable[[int], float]) -> int:
    """The most tokens among `longest` and the powers of two above it whose row takes at most `room` bytes.

    A row is only tried when it should fit if its bytes grow as its tokens do.
    """
    chosen, used = longest, bytes_of(longest)
    for tokens in (1 << i for i in range(longest.bit_length(), MOST_ROW_TOKENS.bit_length())):
        if used * tokens / chosen > room:
            break
        needed = bytes_of(tokens)
        if needed > room:
            break
        chosen, used = tokens, needed
    return chosen


def _row_bytes(student: Student, config: Config) -> float:
    """Bytes that the forward and backward of the fullest row take beyond what is allocated; infinite if they fail."""
    before = torch.cuda.memory_allocated(student.device)
    torch.cuda.reset_peak_memory_stats(student.device)
    try:
        prove_fit(student, config)
    except UserError:  # out of memory, which is what was asked
        fits = False
    else:
        fits = True
    torch.cuda.empty_cache()  # after the exception, which holds the tensors of its frames
    return torch.cuda.max_memory_allocated(student.device) - before if fits else math.inf


def prove_fit(student: Student, config: Config) -> str:
    """Forward and backward of the fullest row; returns a sentence with the peak memory so far.

    Weights and generators stay as they are. The engine's cache is allocated after it, from what it leaves; AdamW's two
    moments of the adapters (8 bytes a parameter), and the reference's adapters where it has some (4), come on top.
    Raises UserError when it does not fit.
    """
    batch = fullest_row(config, student.config.vocab_size)
    try:
        backward(batch_loss(student, batch, config).loss, config)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"A row of {len(batch.ids_T)} tokens does not fit on {config.device}; lower --micro-tokens (now "
            f"{config.micro_tokens}), then --max-new-tokens, or give --gradient-checkpointing or --rollout-weights "
            "unmerged. " + memory_left(config.device)
        ) from error
    finally:
        for parameter in student.trainable():
            parameter.grad = None
    peak = peak_memory_bytes(config.device)
    reached = f"{peak / 2**30:.2f} GiB at most so far" if peak else "its peak cannot be measured here"
    reserved = reserved_memory_bytes(config.device)
    if reserved is not None:
        reached += f", {reserved / 2**30:.2f} GiB of the card with what is reserved and the CUDA context"
    return f"the fullest row ({len(batch.ids_T)} tokens, {len(batch.targets_N)} of them sampled) fits: {reached}"


def fullest_row(config: Config, vocabulary: int) -> Batch:
    """Exactly --micro-tokens in one row, as many of them sampled as can be: one prompt's rollouts, the last shorter."""
    generator = torch.Generator().manual_seed(0)
    prompt_ids = torch.randint(vocabulary, (config.max_prompt_tokens,), generator=generator)
    left, rollouts = config.micro_tokens - len(prompt_ids), []
    while left > 0:
        new = min(config.max_new_tokens, left + 1)  # the last token predicts nothing and takes no room
        left -= max(new - 1, 1)
        ids = torch.cat([prompt_ids, torch.randint(vocabulary, (new,), generator=generator)])
        rollouts.append(_rollout(len(rollouts), ids, len(prompt_ids)))
    (row,) = pack(rollouts, [1.0] * len(rollouts), config.micro_tokens)
    return row


def _rollout(index: int, ids: torch.Tensor, prompt: int) -> Rollout:
    return Rollout(
        example_key="",
        group=0,
        index=index,
        ids=ids,
        sampled=torch.arange(len(ids)) >= prompt,
        behaviour_logp=torch.zeros(len(ids)),
        prompt_length=prompt,
        calls=(),
        turns=1,
        answer=None,
        stop="eos",
    )
