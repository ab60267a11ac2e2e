"""Single turns of BFCL's multi-turn conversations, to train on: the official calls are the teacher.

Each turn of `multi_turn_base` is cut out at the official prefix: the question tells what was asked and called before,
the world stands where the official calls left it, and the turn is right when the leaderboard's own checks of it hold
(see bfcl_calls.py). The four worlds are split in two: file system and car, things that a user works on and looks at,
are trained on; broker and travel agency, where numbers, tokens and prices that one call returns must be handed to the
next, are `bfcl_turns_ood`. The APIs that accompany them (messages, posts, tickets, mathematics) occur on both sides.
All turns of a conversation are in the same split. Turns whose official calls neither change the world nor return
anything that was not returned before are left out, for any call at all would be right there.

WHAT WAS TRAINED ON IS NO LONGER A HELD-OUT BENCHMARK: after a run on `bfcl_turns`, BFCL's multi-turn categories have
been seen in training, for all four are made of the same conversations.

`Example.meta` also holds `entry` (the official id) and `turn` (counted from 0).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from lite_mentor.errors import UserError
from lite_mentor.tasks import SPLITS, Split, bfcl_calls, bfcl_world, make_example, split_of
from lite_mentor.tasks.bfcl import json_schema
from lite_mentor.tools import render_call
from lite_mentor.types import Example, ToolSpec, World

APIS = {
    "bfcl_turns": ("GorillaFileSystem", "VehicleControlAPI"),
    "bfcl_turns_ood": ("TradingBot", "TravelAPI"),
}
"""Every conversation is about one of the four."""
SUITES = tuple(APIS)
LEVELS = (1, 2, 3, 4, 5, 6, 7)
"""Official calls in a turn."""
LEFT_OUT = {("multi_turn_base_173", 3): "its call closes a ticket by a text where the function takes a number"}
"""Turns whose official calls are not as their functions are published, so that no call of ours could equal them."""

MAX_TOLD_CHARS = 160
"""Of an earlier call's result, in the question."""

_SOURCE = "multi_turn_base"
_CLOSING = "When all of this is done, answer \\boxed{done}."


def generate(name: str, *, split: Split, size: int, seed: int, levels: Sequence[int] | None = None) -> list[Example]:
    """`size` turns of one split in a fixed random order; all of them when there are fewer.

    Raises UserError for an unknown suite or split, for levels that do not exist, for any split but `test` of
    bfcl_turns_ood, and when bfcl-eval is missing.
    """
    if name not in APIS:
        raise UserError(f"There is no task suite {name!r}; the turns of BFCL are {' and '.join(SUITES)}.")
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r} of {name}; the splits are {', '.join(SPLITS)}.")
    if name == "bfcl_turns_ood" and split != "test":
        raise UserError(f"{name} is held out and has only the split test, not {split}; train on bfcl_turns.")
    if levels is not None and not set(levels) & set(LEVELS):
        raise UserError(f"Suite {name} has none of the levels {tuple(levels)}; it has {', '.join(map(str, LEVELS))}.")
    examples = [
        example
        for example in _turns(name)
        if (name == "bfcl_turns_ood" or split_of(example.meta["entry"], ()) == split)
        and (levels is None or example.meta["level"] in levels)
    ]
    Random(f"{name}/{seed}").shuffle(examples)
    return examples[:size]


@functools.cache
def _turns(name: str) -> tuple[Example, ...]:
    """All turns of a suite, in the published order."""
    return tuple(
        example
        for entry in bfcl_world.entries(_SOURCE).values()
        for api in APIS[name]
        if api in entry.classes
        for example in _of_entry(name, api, entry)
    )


def _of_entry(suite: str, api: str, entry: bfcl_world.Entry) -> Iterator[Example]:
    tools = [_tool(function) for class_name in entry.classes for function in bfcl_world.documents(class_name)]
    before, after = bfcl_calls.World(entry), bfcl_calls.World(entry)
    told: list[str] = []
    returned: Counter[str] = Counter()
    for turn, (asked, official) in enumerate(zip(entry.asked, entry.gold, strict=True)):
        told.append(f"User: {asked}")
        results = [after.call(call) for call in official]
        pointless = before.like(after) and Counter(results) <= returned
        if not pointless and (entry.id, turn) not in LEFT_OUT:
            yield make_example(
                "\n".join([*told, _CLOSING]),
                ["done"],
                tools,
                suite=suite,
                checker="state",
                world=World({"entry": entry.id, "turn": turn}, judge="lite_mentor.tasks.bfcl_calls:judge"),
                level=len(official),
                template=api,
                entry=entry.id,
                turn=turn,
                steps=tuple({"thought": "", "tool": c["name"], "arguments": c["arguments"]} for c in official),
                final="{answer}",
            )
        told += [f"{render_call(**call)} -> {_short(result)}" for call, result in zip(official, results, strict=True)]
        returned.update(results)
        for call in official:
            before.call(call)


def _tool(function: Mapping[str, Any]) -> ToolSpec:
    """A published function, without the paragraph on its API that stands before each description."""
    schema = {"type": "object", "properties": {}, **json_schema(function["parameters"]), "additionalProperties": False}
    description = function["description"].rpartition("Tool description: ")[2]
    return ToolSpec(function["name"], description, schema, path="lite_mentor.tasks.bfcl_calls:step")


def _short(result: str) -> str:
    return result if len(result) <= MAX_TOLD_CHARS else result[:MAX_TOLD_CHARS] + "..."
