"""Slips: calls that fail, put before a teacher's turn, so that the cold start also shows how to go on after an error.

A teacher hardly ever errs, so a student that has only its records to learn from gives up at its first failed call and
makes an answer up (bench/LOG.md). A slip is a damaged copy of the teacher's own turn, with the errors that students
make: another tool of the question, which does not take these arguments; a tool that is not offered; an argument that
does not exist; JSON that does not end. Neither it nor the error that follows carries a loss; what is learned is the
teacher's turn, said after an error. The teacher's cache stays as it is, and no tool runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from lite_mentor.prompt import parse_turn
from lite_mentor.tools import render_call, run_call
from lite_mentor.types import Example, TeacherRecord, ToolCall, ToolSpec

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
    ways = [
        lambda: _with_tool(call, random.choice(example.tools)),
        lambda: render_call(random.choice(tools), call.arguments),
        lambda: _with_argument(call, random, arguments),
        lambda: call.raw.rstrip()[:-1],  # never JSON, so that one way always fails
    ]
    random.shuffle(ways)
    failed = next(slip for slip in (_checked(damage(), example) for damage in ways) if slip.status != "ok")
    before, after = said.split(call.raw, 1)
    if failed.name:  # a sentence before the call that names the tool slips with it
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


def _with_tool(call: ToolCall, tool: ToolSpec) -> str:
    """The same values for another tool, under its own arguments' names as far as these go."""
    own = [*tool.parameters.get("properties", {})]
    names = [*own, *list(call.arguments)[len(own) :]]
    return render_call(tool.name, dict(zip(names, call.arguments.values(), strict=False)))


def _with_argument(call: ToolCall, random: Random, names: Sequence[str]) -> str:
    """One argument under another name."""
    old, new = random.choice(list(call.arguments) or [""]), random.choice(names or [""])
    return render_call(call.name, {new if name == old else name: value for name, value in call.arguments.items()})
