"""Slips: calls that fail, put before a teacher's turn, so that the cold start also shows how to go on after an error.

A teacher hardly ever errs, so a student that has only its records to learn from gives up at its first failed call and
makes an answer up (bench/LOG.md). A slip is a damaged copy of the teacher's own turn: a tool that is not offered, an
argument that does not exist or is missing, JSON that does not end. Neither it nor the error that follows carries a
loss; what is learned is the teacher's turn, said after an error. The teacher's cache stays as it is, and no tool runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from lite_mentor.prompt import parse_turn
from lite_mentor.tools import render_call, run_call
from lite_mentor.types import Example, TeacherRecord, ToolCall

SLIP = "slip"
"""The role of a message that the student reads as its own, and that carries no loss."""


def with_slips(
    examples: Sequence[Example], records: Sequence[TeacherRecord], *, share: float, seed: int
) -> list[TeacherRecord]:
    """The records of these examples, about `share` of them with a slip and its error before one of their calls.

    Wrong names are those of other examples' tools and arguments. A record without a turn of one call stays as it is.
    """
    tools = sorted({tool.name for example in examples for tool in example.tools})
    schemas = [tool.parameters.get("properties", {}) for example in examples for tool in example.tools]
    arguments = sorted({name for schema in schemas for name in schema})
    slipped = []
    for example, record in zip(examples, records, strict=True):
        random = Random(f"slip/{seed}/{example.key}")
        chosen = random.random() < share
        slipped.append(_with_slip(random, example, record, tools, arguments) if chosen else record)
    return slipped


def _with_slip(
    random: Random, example: Example, record: TeacherRecord, tools: Sequence[str], arguments: Sequence[str]
) -> TeacherRecord:
    turns = [i for i, m in enumerate(record.messages) if m["role"] == "assistant" and _only_call(m["content"], example)]
    if not turns:
        return record
    at = random.choice(turns)
    said = record.messages[at]["content"]
    call = _only_call(said, example)
    damaged = (damage(random, call, tools, arguments) for damage in random.sample(_DAMAGES, len(_DAMAGES)))
    failed = next(slip for slip in (_checked(raw, example) for raw in damaged) if slip.status != "ok")
    before, after = said.split(call.raw, 1)
    if failed.status == "unknown_tool":  # a sentence before the call that names the tool slips with it
        before = re.sub(rf"\b{re.escape(call.name)}\b", failed.name, before)
    slip = (
        {"role": SLIP, "content": before + failed.raw + after},
        {"role": "tool", "content": failed.result},
    )
    return replace(record, messages=(*record.messages[:at], *slip, *record.messages[at:]))


def _only_call(said: str, example: Example) -> ToolCall | None:
    """The turn's call, when it makes just one, which a tool would accept."""
    calls = parse_turn(said).calls
    call = _checked(calls[0], example) if len(calls) == 1 else None
    return call if call is not None and call.status == "ok" else None


def _checked(raw: str, example: Example) -> ToolCall:
    """The call as `run_call` would have it, but that no tool runs: "ok" says that one would."""
    elsewhere = [replace(tool, path="") for tool in example.tools]
    return run_call(raw, elsewhere, run_path=lambda path, arguments: ("ok", ""))


def _other_tool(random: Random, call: ToolCall, tools: Sequence[str], arguments: Sequence[str]) -> str:
    return render_call(random.choice(tools), call.arguments)


def _other_argument(random: Random, call: ToolCall, tools: Sequence[str], arguments: Sequence[str]) -> str:
    old, new = random.choice(list(call.arguments) or [""]), random.choice(arguments or [""])
    return render_call(call.name, {new if name == old else name: value for name, value in call.arguments.items()})


def _missing_argument(random: Random, call: ToolCall, tools: Sequence[str], arguments: Sequence[str]) -> str:
    left_out = random.choice(list(call.arguments) or [""])
    return render_call(call.name, {name: value for name, value in call.arguments.items() if name != left_out})


def _unfinished(random: Random, call: ToolCall, tools: Sequence[str], arguments: Sequence[str]) -> str:
    """Not JSON, whatever the call is."""
    return call.raw.rstrip()[:-1]


_DAMAGES = (_other_tool, _other_argument, _missing_argument, _unfinished)
