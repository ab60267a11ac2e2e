"""The multi-turn part of the Berkeley Function Calling Leaderboard, as it is published by `bfcl-eval`.

Of the official answers, which are published as Python, only literals are read. What is done with them: bfcl_calls.py.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lite_mentor.tasks import bfcl

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")

Call = Mapping[str, Any]
"""{"name": str, "arguments": {...}}"""


@dataclass(frozen=True)
class Entry:
    """One published conversation with its official calls."""

    id: str
    classes: tuple[str, ...]
    """The APIs whose functions are offered; each has one instance."""
    config: Mapping[str, Any]
    """By class, what its instance starts from."""
    long_context: bool
    """Do the instances start from much more than the user ever asks about?"""
    asked: tuple[str, ...]
    """What the user says, turn by turn; "" where functions are added instead."""
    gold: tuple[tuple[Call, ...], ...]
    """The official calls of each turn; none where no call could help yet."""


@functools.cache
def entries(category: str) -> Mapping[str, Entry]:
    """All entries of a category by their id, in the published order. Raises UserError without bfcl-eval."""
    official = {row["id"]: row["ground_truth"] for row in bfcl.rows(category, "possible_answer")}
    return {row["id"]: _entry(row, official[row["id"]], category) for row in bfcl.rows(category)}


def _entry(row: Mapping[str, Any], official: Sequence[Sequence[str]], category: str) -> Entry:
    return Entry(
        id=row["id"],
        classes=tuple(row["involved_classes"]),
        config=row["initial_config"],
        long_context="long_context" in category,
        asked=tuple("\n".join(message["content"] for message in turn) for turn in row["question"]),
        gold=tuple(tuple(_parsed(text, row["involved_classes"]) for text in turn) for turn in official),
    )


def _parsed(text: str, classes: Sequence[str]) -> Call:
    """A call as it is published, `sort('final_report.pdf')`, by name and literal values."""
    call = ast.parse(text, mode="eval").body
    owner = next(class_of(name) for name in classes if hasattr(class_of(name), call.func.id))
    names = list(inspect.signature(getattr(owner, call.func.id)).parameters)[1:]
    given = dict(zip(names, call.args, strict=False)) | {keyword.arg: keyword.value for keyword in call.keywords}
    return {"name": call.func.id, "arguments": {name: ast.literal_eval(value) for name, value in given.items()}}


@functools.cache
def documents(class_name: str) -> tuple[Mapping[str, Any], ...]:
    """The published descriptions of a class's functions."""
    file = _backend().MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name]
    return tuple(bfcl.read_rows("multi_turn_func_doc", file))


@functools.cache
def class_of(name: str) -> type:
    """The class of this name."""
    return getattr(importlib.import_module(_backend().CLASS_FILE_PATH_MAPPING[name]), name)


def _backend():
    bfcl.folder()
    return importlib.import_module("bfcl_eval.constants.executable_backend_config")
