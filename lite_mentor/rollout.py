"""The multi-turn tool loop over the engine: examples -> rollouts, with every mask written as its token is made."""

from __future__ import annotations

import collections.abc as abc
import hashlib
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch

from lite_mentor.config import Config
from lite_mentor.engine import Engine, Sampling, Sequence
from lite_mentor.errors import UserError
from lite_mentor.judge import boxed
from lite_mentor.prompt import Chat, parse_turn
from lite_mentor.tools import RunCall
from lite_mentor.types import Example, Rollout, StopReason, ToolCall

TOOL_THREADS = 4
"""Episodes whose calls run at the same time, beside the decoding of the others."""


@dataclass(frozen=True)
class Limits:
    """What ends an episode, whatever the student does."""

    max_turns: int
    max_new_tokens: int
    """After the prompt, over all turns, tool results included."""
    max_prompt_tokens: int
    max_result_tokens: int = 256
    """Of each tool's result; what is longer is cut, visibly."""


def limits_of(config: Config) -> Limits:
    """A run's own."""
    return Limits(config.max_turns, config.max_new_tokens, config.max_prompt_tokens, config.max_result_tokens)


@dataclass(eq=False)
class _Episode:
    example: Example
    group: int
    index: int
    sequence: Sequence
    calls: list[ToolCall]
    turns: int = 0
    stop: StopReason | None = None


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

    Equal (seed, step, example, index) draw equal noise, whatever else runs beside them. Calls of tools that live
    elsewhere run in threads while the other episodes decode; when they finish decides who decodes beside whom, which
    the logits feel in their last bits only. Calls of our own tools run at once, so that such a run repeats bitwise on
    a CPU; on a GPU this was not yet tried. What a call raises ends all of it.
    """
    engine.sampling = sampling
    engine.eos_ids |= {chat.end_id}  # a model's files need not name what its template closes turns by
    with ThreadPoolExecutor(TOOL_THREADS) as threads:
        try:
            episodes = _submit(engine, chat, examples, group_size, limits, seed, step)
            _play(engine, chat, episodes, limits, run_call, threads)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            engine.abandon()
            raise
    return [_finish(chat, episode) for episode in episodes]


def prompt_of(chat: Chat, example: Example, limits: Limits) -> list[int]:
    """The tokens of an example's prompt. Raises UserError when they are more than allowed."""
    ids = chat.prompt_ids(example)
    if len(ids) > limits.max_prompt_tokens:
        raise UserError(
            f"The prompt of example {example.key} ({example.question[:60]!r}...) has {len(ids)} tokens; "
            f"the limit is {limits.max_prompt_tokens}. Raise --max-prompt-tokens or shorten the task."
        )
    return ids


def _submit(engine, chat, examples, group_size: int, limits: Limits, seed: int, step: int) -> list[_Episode]:
    episodes = []
    for group, example in enumerate(examples):
        ids = prompt_of(chat, example, limits)
        for index in range(group_size):
            uniforms = noise(seed, step, example.key, index, limits.max_new_tokens)
            episodes.append(_Episode(example, group, index, engine.submit(ids, uniforms), []))
    return episodes


def _play(engine, chat, episodes: list[_Episode], limits: Limits, run_call: RunCall, threads) -> None:
    """Decode and call until every episode has its `stop`."""
    by_sequence = {id(e.sequence): e for e in episodes}
    calling: dict[Future[list[ToolCall]], _Episode] = {}
    while engine.busy or calling:
        for sequence in engine.step() if engine.busy else ():
            episode = by_sequence[id(sequence)]
            calls = _read_turn(chat, episode)
            if not calls:
                engine.release(sequence)
            elif any(tool.path for tool in episode.example.tools):
                calling[threads.submit(_run_all, run_call, calls, episode)] = episode
            else:
                _after_calls(engine, chat, episode, _run_all(run_call, calls, episode), limits)
        # Decoding goes on with whoever can; only when nobody can is there something to wait for.
        ready = wait(calling, timeout=0 if engine.speaking else None, return_when=FIRST_COMPLETED).done
        for future in ready:
            _after_calls(engine, chat, calling.pop(future), future.result(), limits)


def _run_all(run_call: RunCall, calls: abc.Sequence[str], episode: _Episode) -> list[ToolCall]:
    """The turn's calls, one after the other; the episode itself is left as it is."""
    done: list[ToolCall] = []
    for raw in calls:
        done.append(run_call(raw, episode.example, [*episode.calls, *done]))
    return done


def _read_turn(chat: Chat, episode: _Episode) -> list[str]:
    """The calls of the turn that just ended; without any, the episode is over and says why."""
    episode.turns += 1
    if not episode.sequence.ended:
        episode.stop = "max_tokens"
        return []
    turn = parse_turn(_turn_text(chat, episode.sequence))
    if not turn.calls:
        episode.stop = "eos" if boxed(turn.speech) is None else "answer"
    return turn.calls


def _after_calls(engine: Engine, chat: Chat, episode: _Episode, results: list[ToolCall], limits: Limits) -> None:
    """Let the student read the results and speak again, or end the episode."""
    results = [replace(call, result=chat.clipped(call.result, limits.max_result_tokens)) for call in results]
    episode.calls += results
    suffix = chat.result_ids([call.result for call in results])
    if episode.sequence.ids[-1] != chat.end_id:  # the turn ended in another of the model's ends; the template's follows
        suffix = [chat.end_id, *suffix]
    if episode.turns == limits.max_turns:
        episode.stop = "max_turns"
    elif len(suffix) >= episode.sequence.room:
        episode.stop = "context_full"
    else:
        engine.resume(episode.sequence, suffix)
        return
    engine.release(episode.sequence)


def _turn_text(chat: Chat, sequence: Sequence) -> str:
    """The last turn's sampled tokens as text, without the token that ended it."""
    end = len(sequence.ids) - 1 if sequence.ended else len(sequence.ids)
    return chat.decode(sequence.ids[sequence.turn_start : end])


def _finish(chat: Chat, episode: _Episode) -> Rollout:
    sequence, stop = episode.sequence, episode.stop
    answer = boxed(parse_turn(_turn_text(chat, sequence)).speech) if stop == "answer" else None
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
