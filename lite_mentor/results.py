"""What a tool returned, as a student reads it: short text, nothing in it that differs from one run to the next.

Numbers read as the calculators print them. What no text tells, such as an open file or an object that could only say
where it lies in memory, is a ToolError and no result.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import inspect
import io
import itertools
import json
import numbers
import re
import types
from collections.abc import Iterator, Mapping, Sequence, Set, ValuesView
from decimal import Decimal
from typing import Any

from lite_mentor.calculators import ToolError, number_text

MAX_RESULT_CHARS = 4000
"""What leaves a tool at most. How much of it a student reads is counted in tokens (rollout.Limits)."""
MAX_YIELDED = 1000
"""Values that a generator may give; it need not end by itself."""


def finished(value: Any) -> Any:
    """What a tool returned, once nothing of it is still to come.

    A coroutine is awaited, and a generator of either kind is a list of what it yields. Raises ToolError for one that
    yields more than MAX_YIELDED values.
    """
    if inspect.isawaitable(value) or inspect.isasyncgen(value):
        import asyncio  # here, for few tools need it

        try:
            value = _loop().run_until_complete(_awaited(value))
        except asyncio.CancelledError as error:
            raise ToolError("the tool was cancelled") from error
    if isinstance(value, Iterator) and not isinstance(value, io.IOBase):
        value = list(itertools.islice(value, MAX_YIELDED + 1))
        _check_yielded(value)
    return value


@functools.cache
def _loop() -> Any:
    """One for all calls of a process: a client that a tool keeps between them belongs to the loop of its first."""
    import asyncio

    return asyncio.new_event_loop()


async def _awaited(value: Any) -> Any:
    if not inspect.isasyncgen(value):
        return await value
    values: list[Any] = []
    async for item in value:
        values.append(item)
        _check_yielded(values)
    return values


def _check_yielded(values: Sequence[Any]) -> None:
    if len(values) > MAX_YIELDED:
        raise ToolError(f"the tool yields more than {MAX_YIELDED} values")


def result_text(value: Any, limit: int = MAX_RESULT_CHARS) -> str:
    """A tool's result as a student should read and copy it: 12 and not 12.0, at most about ten digits, short.

    A list of numbers and plain words reads `1, 2.5, km`; any other list, and what has named parts, as JSON with such
    numbers in it. Raises ToolError for what no text tells: bytes, functions, open files, objects without a text.
    """
    try:
        text = _text_of(value)
    except RecursionError:
        raise ToolError("the tool's result is nested too deeply") from None
    return clip(text, limit)


_PLAIN_WORDS = re.compile(r"""[^\s,"{}\[\]](?:[^\n\r,"{}\[\]]*[^\s,"{}\[\]])?""")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+\b")


def _text_of(value: Any) -> str:
    value = _plain(value)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and not any(isinstance(item, (dict, list)) for item in map(_plain, value)):
        texts = [_text_of(item) for item in value]
        if all(map(_PLAIN_WORDS.fullmatch, texts)):
            return ", ".join(texts)
    return _json_text(value)


def _json_text(value: Any) -> str:
    """JSON, its numbers as students read them, also those that JSON has no word for."""
    value = _plain(value)
    if isinstance(value, dict):
        named = ((_plain(name), part) for name, part in value.items())
        return "{" + ", ".join(f"{_quoted(_text_of(name))}: {_json_text(part)}" for name, part in named) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_json_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        if value.bit_length() > 3 * MAX_RESULT_CHARS:
            raise ToolError("the result is too large")
        return str(value)
    if isinstance(value, Decimal):
        return number_text(value)
    return _quoted(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value as None, bool, int, Decimal, str, list or dict, not looking into it. Raises ToolError."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, str, Decimal)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # numpy's and others' too
        return Decimal(repr(float(value)))
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    no_text = (bytes, bytearray, memoryview, Iterator, type, types.ModuleType)
    if isinstance(value, no_text) or inspect.isroutine(value):
        raise _no_text(value)
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, Set):
        return sorted(value, key=None if all(isinstance(item, numbers.Real) for item in value) else _text_of)
    if isinstance(value, (Sequence, ValuesView)):
        return list(value)
    for method in ("to_dict", "tolist"):  # pandas; arrays of numpy and torch, and what numpy calls a bool
        if callable(getattr(value, method, None)):
            return _plain(getattr(value, method)())
    return _own_text(value)


def _own_text(value: Any) -> str:
    """What an object says of itself, if that is more than where it lies in memory."""
    says_it = type(value).__str__ is not object.__str__
    text = str(value)
    if _ADDRESS.search(text) or (text.startswith("<") and not says_it):
        raise _no_text(value)
    return text


def _no_text(value: Any) -> ToolError:
    return ToolError(
        f"the tool's result is of the type {type(value).__name__}, which has no text; it must return text, "
        "a number, true, false, null, or a list or dict of these"
    )


def clip(text: str, limit: int) -> str:
    """The text, or its beginning and how much more there was."""
    return text if len(text) <= limit else f"{text[:limit]}... [{len(text) - limit} more characters]"
