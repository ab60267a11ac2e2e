"""A teacher's conversation in words that a student could have said.

A student is rewarded for doing as the teacher did, and its own calls are read from its text. So a record is correct
only where the calls in its words, read as a student's would be, are exactly those that were run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lite_mentor.judge import is_right
from lite_mentor.prompt import parse_turn
from lite_mentor.teacher import seal
from lite_mentor.template import CALL_CLOSE, CALL_OPEN
from lite_mentor.tools import render_call
from lite_mentor.types import Example, TeacherRecord, ToolCall, ToolSpec


class Request(NamedTuple):
    """A call that a teacher asks for."""

    name: str
    """"" where it cannot be read."""
    arguments: Mapping[str, Any] | None
    """None where they cannot be read."""
    raw: str
    """As a student should write it between its tags; as it came where it cannot be read."""


def request(name: str, arguments: Any) -> Request:
    """A call whose arguments came as JSON text (perhaps encoded twice), as an object, or not at all."""
    name = name.encode("utf-8", "replace").decode("utf-8")  # half a character cannot be sent back
    try:
        found = _arguments(arguments)
        if found is not None:
            return Request(name, found, render_call(name, found))
    except (ValueError, RecursionError):
        pass
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return Request(name, None, f'{{"name": {json.dumps(name)}, "arguments": {text}}}')


def _arguments(value: Any) -> dict[str, Any] | None:
    for _ in range(2):
        if isinstance(value, str):
            value = json.loads(value) if value.strip() else {}
    if value is None:
        return {}
    return value if isinstance(value, dict) else None


def with_calls(text: str, raws: Sequence[str]) -> str:
    """An assistant's turn: what it says, then each call in its tags."""
    return "\n".join([*([text] if text else []), *(f"{CALL_OPEN}{raw}{CALL_CLOSE}" for raw in raws)])


def calls_in(text: str, tools: Sequence[ToolSpec]) -> tuple[str, list[Request]]:
    """A teacher's text without the calls in it, and the calls: in tags, or as JSON that is all that is said.

    Servers leave calls there that they do not read themselves. JSON without tags is a call only where it, or each in
    its list, names one of the tools.
    """
    turn = parse_turn(text)
    if turn.calls:
        at = len(text) - len(turn.speech) if text.endswith(turn.speech) else 0
        rest = [text[:at]]
        for raw in turn.calls:
            before, at = at, text.index(CALL_OPEN + raw, at)
            rest.append(text[before:at])
            at += len(CALL_OPEN + raw)
            at += len(CALL_CLOSE) * text.startswith(CALL_CLOSE, at)
        return "".join([*rest, text[at:]]).strip(), [_read(raw) or Request("", None, raw) for raw in turn.calls]
    said, names = turn.speech.strip(), {tool.name for tool in tools}
    if said.startswith("```") and said.endswith("```"):
        said = said[3:-3].removeprefix("json").strip()
    bare = [_read(row) for row in _rows(said)]
    if bare and all(found and found.name in names for found in bare):
        return text.removesuffix(turn.speech).strip(), bare
    return text, []


def _rows(text: str) -> list[Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return data if isinstance(data, list) else [data]


def _read(call: Any) -> Request | None:
    """A call as {"name": ..., "arguments" or "parameters": ...}, as an object or as its text."""
    try:
        row = json.loads(call) if isinstance(call, str) else call
        key = "arguments" if "arguments" in row else "parameters"
        return request(row["name"], row[key]) if isinstance(row["name"], str) else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def record_of(
    example: Example, teacher: str, messages: Sequence[Mapping[str, str]], calls: Sequence[ToolCall], answer: str | None
) -> TeacherRecord:
    """Judge a trajectory that ended with `answer`; None when it ended without one."""
    right = answer is not None and is_right(example, answer, calls)
    return seal(
        example_key=example.key,
        teacher=teacher,
        messages=tuple(messages),
        calls=tuple(calls),
        answer=answer or "",
        correct=right and not flaw(example, messages, calls),
    )


def flaw(example: Example, messages: Sequence[Mapping[str, str]], calls: Sequence[ToolCall]) -> str | None:
    """Why a student that says these words would not do what was done here; None where it would."""
    spoken: list[list[str]] = []
    ran: list[list[str]] = []
    left = iter(calls)
    for message in messages:
        if message["role"] == "assistant":
            spoken.append(list(parse_turn(message["content"]).calls))
            ran.append([])
        else:
            ran[-1].append(next(left).raw)
    if spoken != ran:
        return "the calls in its words are not those that were run"
    last = parse_turn(messages[-1]["content"]).speech
    if {tool.name for tool in example.tools}.intersection(_NAMED.findall(last)) and _ARGUMENTS.search(last):
        return "its last words hold a call that was not run"
    return None


_NAMED = re.compile(r'"name"\s*:\s*"([^"]*)"')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:')
