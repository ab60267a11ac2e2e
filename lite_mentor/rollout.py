"""The multi-turn tool loop over the engine: examples -> rollouts, with every mask written as its token is made."""

from __future__ import annotations

import collections.abc as abc
import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from lite_mentor.engine import Engine, Sampling, Sequence
from lite_mentor.errors import UserError
from lite_mentor.judge import boxed
from lite_mentor.prompt import Chat, parse_turn
from lite_mentor.types import Example, Rollout, StopReason, ToolCall

RunCall = abc.Callable[[str, Example], ToolCall]
"""The text of one call, and the example whose tools it may use -> the call with its result."""


@dataclass(frozen=True)
class Limits:
    """What ends an episode, whatever the student does."""

    max_turns: int
    max_new_tokens: int
    """After the prompt, over all turns, tool results included."""
    max_prompt_tokens: int


@dataclass(eq=False)
class _Episode:
    example: Example
    group: int
    index: int
    sequence: Sequence
    calls: list[ToolCall]
    turns: int = 0


def roll_out(
    engine: Engine,
    chat: Chat,
    examples: abc.Sequence[Example],
    *,
    group_size: int,
    limits: Limits,
    sampling: Sampling,
    seed: int,
    step: int,
    run_call: RunCall,
) -> list[Rollout]:
    """`group_size` episodes of each example, ordered by example and index.

    Equal (seed, step, example, index) draw equal noise, whatever else runs beside them.
    """
    engine.sampling = sampling
    episodes = []
    for group, example in enumerate(examples):
        ids = chat.prompt_ids(example)
        if len(ids) > limits.max_prompt_tokens:
            raise UserError(
                f"The prompt of example {example.key} ({example.question[:60]!r}...) has {len(ids)} tokens; "
                f"the limit is {limits.max_prompt_tokens}. Raise --max-prompt-tokens or shorten the task."
            )
        for index in range(group_size):
            uniforms = noise(seed, step, example.key, index, limits.max_new_tokens)
            episodes.append(_Episode(example, group, index, engine.submit(ids, uniforms), []))
    by_sequence = {id(e.sequence): e for e in episodes}
    done: dict[int, Rollout] = {}
    while engine.busy:
        for sequence in engine.step():
            episode = by_sequence[id(sequence)]
            stop = _next_turn(engine, chat, episode, limits, run_call)
            if stop is not None:
                engine.release(sequence)
                done[id(episode)] = _finish(chat, episode, stop)
    return [done[id(e)] for e in episodes]


def _next_turn(engine: Engine, chat: Chat, episode: _Episode, limits: Limits, run_call: RunCall) -> StopReason | None:
    """Read the turn that just ended; run its calls and go on, or say why the episode is over."""
    sequence = episode.sequence
    episode.turns += 1
    if not sequence.ended:
        return "max_tokens"
    turn = parse_turn(_turn_text(chat, sequence))
    if not turn.calls:
        return "eos" if boxed(turn.text) is None else "answer"
    results = [run_call(raw, episode.example) for raw in turn.calls]
    episode.calls += results
    if episode.turns == limits.max_turns:
        return "max_turns"
    suffix = chat.result_ids([call.result for call in results])
    if len(suffix) >= sequence.room:
        return "context_full"
    engine.resume(sequence, suffix)
    return None


def _turn_text(chat: Chat, sequence: Sequence) -> str:
    """The last turn's sampled tokens as text, without the token that ended it."""
    end = len(sequence.ids) - 1 if sequence.ended else len(sequence.ids)
    return chat.decode(sequence.ids[sequence.turn_start : end])


def _finish(chat: Chat, episode: _Episode, stop: StopReason) -> Rollout:
    sequence = episode.sequence
    answer = boxed(_turn_text(chat, sequence)) if stop == "answer" else None
    return Rollout(
        example_key=episode.example.key,
        group=episode.group,
        index=episode.index,
        ids=torch.tensor(sequence.ids),
        sampled=torch.tensor(sequence.sampled),
        behaviour_logp=torch.tensor(sequence.logp, dtype=torch.float32),
        prompt_length=sequence.prompt_length,
        calls=tuple(episode.calls),
        turns=episode.turns,
        answer=answer,
        stop=stop,
    )


def noise(seed: int, step: int, key: str, index: int, count: int) -> list[float]:
    """`count` uniforms in [0, 1) that depend on nothing but the arguments (Philox, keyed by their hash)."""
    digest = hashlib.blake2b(f"{seed}|{step}|{key}|{index}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.random(count).tolist()


def messages_of(chat: Chat, rollout: Rollout) -> list[dict[str, str]]:
    """A rollout as a conversation: its assistant turns as text, and between them the results of their calls."""
    messages, calls = [], list(rollout.calls)
    spans = torch.nn.functional.pad(rollout.sampled.int(), (1, 1)).diff()
    starts, ends = (spans == 1).nonzero()[:, 0].tolist(), (spans == -1).nonzero()[:, 0].tolist()
    for start, end in zip(starts, ends, strict=True):
        closed = end < len(rollout.ids) or rollout.stop != "max_tokens"
        text = chat.decode(rollout.ids[start : end - closed].tolist())
        messages.append({"role": "assistant", "content": text})
        for _ in range(min(len(parse_turn(text).calls) if closed else 0, len(calls))):
            messages.append({"role": "tool", "content": calls.pop(0).result})
    return messages
