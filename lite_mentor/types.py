"""The values that flow through a run: one stage, one type, one writer.

    Example -> Rollout -> Scored -> Batch -> a gradient, with a TeacherRecord beside the Example.

Every type is frozen and a field never changes meaning. `None` means "could not be measured", never 0.

Shapes are named by suffix, here and everywhere:
    B rollouts   G group size   T packed tokens   N sampled tokens
    H hidden     V vocabulary   K top-k           L layers
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # a tool's worker process starts ten times as fast without torch
    import torch

CallStatus = Literal["ok", "unknown_tool", "bad_json", "bad_arguments", "error", "timeout"]
CALL_STATUSES: tuple[CallStatus, ...] = get_args(CallStatus)

Checker = Literal["math", "text", "state"]
"""How an episode is found right; see `Example.checker`."""

StopReason = Literal["eos", "answer", "max_turns", "max_tokens", "context_full"]
STOP_REASONS: tuple[StopReason, ...] = get_args(StopReason)


@dataclass(frozen=True)
class ToolSpec:
    """A tool as the student sees it (name, description, JSON schema) and the function behind it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object schema: what a chat template's `tools=` expects."""
    function: Callable[..., Any] | None = field(default=None, compare=False, repr=False)
    """Called in this process with validated keyword arguments. None when `path` names it instead."""
    path: str | None = None
    """`module:function` of a tool that is not ours: it runs in a worker process, under a time limit."""

    @functools.cached_property
    def read(self) -> str:
        """All that can be read of it, as JSON."""
        return json.dumps([self.name, self.description, self.parameters], sort_keys=True)


@dataclass(frozen=True)
class World:
    """What an episode's calls read and change. Nothing keeps it: its state is the list of the calls that worked.

    The tools of an example with a world name a function (world, earlier, name, arguments) -> result, which plays the
    earlier calls again on a fresh world. So episodes share nothing, and a call that failed has changed nothing.
    """

    start: Mapping[str, Any]
    """JSON that says where the world begins; handed to the functions as `world`."""
    judge: str
    """`module:function` of (world, calls) -> bool: did these calls do what was asked? Runs in a worker process."""


@dataclass(frozen=True)
class Example:
    """One question with the tools that may answer it. Written by `tasks`."""

    key: str
    """Hash of the content (question, answer, tool names, world): the same example has the same key everywhere."""
    question: str
    answer: tuple[str, ...]
    """The accepted answers, most natural first; being right about any one of them is being right."""
    tools: tuple[ToolSpec, ...]
    checker: Checker
    """`math`: equal as mathematics. `text`: equal after lower-casing and dropping articles and punctuation.
    `state`: by what the calls did to the world; the answer only says that the episode is over."""
    suite: str
    meta: Mapping[str, Any] = field(default_factory=dict)
    """What a generator knows about its own item: `level`, `template`, and `steps` (see tasks/__init__.py)."""
    world: World | None = None
    """What the tools act on; None for tools that answer from their arguments alone."""


@dataclass(frozen=True)
class ToolCall:
    """One call as the student (or the teacher) wrote it, and what came back. Written by `tools.run_call`."""

    name: str
    """"" when the call could not be parsed."""
    arguments: Mapping[str, Any]
    raw: str
    """The text between the call tags, exactly as sampled."""
    status: CallStatus
    result: str
    """The text that was returned to the student: a value, or a sentence that says what was wrong."""


@dataclass(frozen=True)
class TeacherRecord:
    """A teacher's finished trajectory on one example. Written by `teach`, read by `teacher`."""

    example_key: str
    teacher: str
    messages: tuple[Mapping[str, str], ...]
    """The conversation after the question: `{"role": "assistant" | "tool", "content": text}`, calls in their tags."""
    calls: tuple[ToolCall, ...]
    answer: str
    correct: bool
    sha256: str
    """Of the canonical JSON of all the other fields."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What its example was made of (facts.py) when the calls were run and the answer was judged."""


@dataclass(frozen=True)
class Rollout:
    """One episode of the student. Written by `rollout`."""

    example_key: str
    group: int
    """Index of the example within the step; the rollouts of a group share it."""
    index: int
    """Index of the rollout within its group, 0 .. G-1."""
    ids: torch.Tensor
    """int64 [T]: prompt, sampled tokens and injected tool results, in order."""
    sampled: torch.Tensor
    """bool [T]: True exactly where the student sampled the token; recorded when it happens, never inferred."""
    behaviour_logp: torch.Tensor
    """float32 [T]: the sampler's logprob of the token at its temperature, over the whole vocabulary; valid where
    `sampled`. With top_k or top_p it is not that of the tokens that were left to draw from: the update computes the
    whole distribution, so the importance weight exp(old - behaviour) is 1 where both agree, and not the mass kept."""
    prompt_length: int
    calls: tuple[ToolCall, ...]
    turns: int
    answer: str | None
    """Content of the last box in the final turn; None when there is no box."""
    stop: StopReason
    """`answer`: ended its turn with a boxed answer; `eos`: ended it with neither an answer nor a call."""

    @property
    def finished(self) -> bool:
        """Did the student end the episode itself, instead of being cut off?"""
        return self.stop in ("eos", "answer")


@dataclass(frozen=True)
class Scored:
    """A rollout with its named reward terms. Written by `reward`."""

    rollout: Rollout
    terms: Mapping[str, float | None]
    reward: float | None
    advantage: float | None


@dataclass(frozen=True)
class Batch:
    """One packed row: a forest of token segments, plus what the loss needs at each sampled token. Written by `batch`.

    Rollouts of one group share their prompt, and prompts share the text that describes the tools. A packed row keeps
    each shared prefix ONCE: segment s may attend to itself (causally) and to the segments on its path to the root.
    """

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    """Position of each token in its own rollout (not in the row)."""
    segment_starts: tuple[int, ...]
    """First token of each segment; segments are contiguous, so the next start (or T) ends it."""
    segment_parents: tuple[int, ...]
    """Index of the segment that this one continues; -1 for a root."""
    row_index_N: torch.Tensor
    """Rows of hidden states that predict a sampled token (a shared row may occur several times)."""
    targets_N: torch.Tensor
    """The sampled token that follows each of those rows."""
    behaviour_logp_N: torch.Tensor
    advantage_N: torch.Tensor
    sequence_N: torch.Tensor
    """Index of the rollout (within the optimizer step) that each sampled token belongs to, non-decreasing."""
    global_tokens: int
    """Sampled tokens in the whole optimizer step: normalisers are global, so micro-batching changes nothing."""
    global_sequences: int
