"""What tools return, as text: every kind of value reads in one way, and what no text tells is an error."""

from __future__ import annotations

import array
import asyncio
import collections
import datetime
import enum
import io
import itertools
import json
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePosixPath
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_mentor.calculators import ToolError
from lite_mentor.results import MAX_YIELDED, finished, result_text


class Unit(enum.Enum):
    KM = "km"


class Level(str, enum.Enum):
    HIGH = "high"


@dataclass
class Point:
    x: float
    unit: Unit


Pair = collections.namedtuple("Pair", "low high")


class Table:
    """As pandas has them."""

    def to_dict(self):
        return {"pen": np.int64(2), "cup": None}


class Money:
    def __str__(self):
        return "<2 dollars>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float64(1.5), "1.5"), (np.float32(0.25), "0.25"), (np.int64(3), "3"), (Fraction(1, 4), "0.25"),
        (12.0, "12"), (True, "true"), (None, "null"), ("as it is", "as it is"), ([1, 2.50], "1, 2.5"),
        (10**20 - 1, "9" * 20),
        (10**20, "1" + "0" * 20), (1e20, "1e20"), (Decimal(10**20), "1e20"),
        (123456789012.5, "123456789012.5"), (1e-7, "0.0000001"), (1.5e-12, "1.5e-12"), (-0.0, "0"),
        (float("inf"), "Infinity"), (2 / 3, "0.6666666667"), (1234567.123456789, "1234567.123"),
    ],
)  # fmt: skip
def test_results_as_text(value, text):
    assert result_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([["pen", 2], ["cup", 15]], '[["pen", 2], ["cup", 15]]'), (["pen", 2, "cup"], "pen, 2, cup"),
        (["Pen, Paper", "Cup"], '["Pen, Paper", "Cup"]'), ([], "[]"), ([""], '[""]'), (["a\nb"], '["a\\nb"]'),
        ((1, None, True), "1, null, true"),
        ({"a": 0.1 + 0.2, "b": None, "c": [True]}, '{"a": 0.3, "b": null, "c": [true]}'),
        ({1: {"é": "it's"}}, """{"1": {"é": "it's"}}"""), ({}, "{}"), (MappingProxyType({"a": 1}), '{"a": 1}'),
        (Point(1.0, Unit.KM), '{"x": 1, "unit": "km"}'), (Pair(1, 2), '{"low": 1, "high": 2}'), (Level.HIGH, "high"),
        (datetime.date(2026, 3, 1), "2026-03-01"), (datetime.datetime(2026, 3, 1, 9), "2026-03-01T09:00:00"),
        (datetime.timedelta(hours=2), "2:00:00"), (PurePosixPath("a/b"), "a/b"), (1 + 2j, "(1+2j)"),
        ({10, 9, 2.5}, "2.5, 9, 10"), (frozenset({"b", "a"}), "a, b"), (range(3), "0, 1, 2"), ({"a": 1}.values(), "1"),
        (collections.deque([1]), "1"), (array.array("i", [1, 2]), "1, 2"), (np.array([[1, 2.5]]), "[[1, 2.5]]"),
        (np.bool_(True), "true"), (np.array(3), "3"), (torch.tensor([1.0, 2.0]), "1, 2"),
        (Table(), '{"pen": 2, "cup": null}'),
        (Money(), "<2 dollars>"), (ValueError("no"), "no"),
    ],
)  # fmt: skip
def test_what_is_made_of_parts_can_be_told_apart(value, text):
    assert result_text(value) == text


class Silent:
    pass


@pytest.mark.parametrize(
    "value",
    [Silent(), object(), b"a", bytearray(b"a"), memoryview(b"a"), len, print.__self__, Silent, (lambda: 1),
     io.StringIO(),
     {Silent()}, [1, {"a": Silent()}], {Silent(): 1}, SimpleNamespace(a=Silent()), iter([1]), itertools.count()],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_no_text_tells_is_an_error(value):
    with pytest.raises(ToolError, match=r"the tool's result is of the type \w+, which has no text; it must"):
        result_text(value)


def test_what_does_not_end_is_an_error():
    ring = []
    ring.append(ring)
    for value, reason in ((ring, "nested too deeply"), (10**5000, "too large")):
        with pytest.raises(ToolError, match=reason):
            result_text(value)
    digits = "7" * 3000
    assert result_text(int(digits)) == digits


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(VALUES)
def test_any_json_is_told_in_full(value):
    text = result_text(value, limit=10**9)
    if isinstance(value, str):
        assert text == value
    elif text.startswith(("[", "{")) or not isinstance(value, list):
        assert json.loads(text) == value
    else:  # numbers and plain words: as many as there are, and each as it stands alone
        assert text.split(", ") == [result_text(item) for item in value]


async def later(value):
    return value


async def loop_of():
    return asyncio.get_running_loop()


async def cancelled():
    raise asyncio.CancelledError


async def several(count):
    for i in range(count):
        yield i


def test_what_is_still_to_come_is_waited_for_but_not_for_ever():
    assert finished(3) == 3
    assert finished(later(12)) == 12
    assert finished(i for i in (1, 2)) == [1, 2]
    assert finished(map(str, [1])) == ["1"]
    assert finished(later(iter([1]))) == [1]
    assert finished(several(MAX_YIELDED)) == list(range(MAX_YIELDED))
    for endless in (itertools.count(), several(10**9)):
        with pytest.raises(ToolError, match=f"yields more than {MAX_YIELDED} values"):
            finished(endless)
    assert finished(loop_of()) is finished(loop_of())  # where a client that is kept between calls goes on
    with pytest.raises(ToolError, match="cancelled"):
        finished(cancelled())
    with pytest.raises(ToolError, match="StringIO"):
        result_text(finished(io.StringIO("a file")))
