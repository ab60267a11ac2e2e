"""The multi-turn part of the Berkeley Function Calling Leaderboard, executed: its own worlds, counted as it counts.

The worlds (file system, car, broker, travel agency and what belongs to them) are the classes of `bfcl-eval`. Nothing
keeps one: the state IS the list of calls. Every call is answered, and every episode judged, by playing all the calls
so far again on fresh instances, which takes a millisecond or two. So rollouts share nothing, a worker that is killed
loses nothing, and a call that raises has changed nothing (where the leaderboard keeps what it had done until then).

`step` and `judge` run in the sandbox, for the arguments are a student's. Calls are looked up among the published
functions and never evaluated; of the official answers, which are published as Python, only literals are read.
"""

from __future__ import annotations

import ast
import decimal
import functools
import importlib
import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from lite_mentor.tasks import bfcl

CATEGORIES = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")

Call = Mapping[str, Any]
"""{"name": str, "arguments": {...}}"""

_STATELESS = "MathAPI"


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


class World:
    """Fresh instances of an entry's classes."""

    def __init__(self, entry: Entry):
        self.instances = {name: _fresh(name, entry) for name in entry.classes}
        self._owners = {f["name"]: self.instances[name] for name in entry.classes for f in documents(name)}

    def call(self, call: Call) -> str:
        """The result as text. Raises what the function raises, and ValueError for one that is not published."""
        if call["name"] not in self._owners:
            raise ValueError(f"there is no function {call['name']!r}")
        function = getattr(self._owners[call["name"]], call["name"])
        given = inspect.signature(function).bind(**call["arguments"])
        given.apply_defaults()
        # A world keeps what it is given, and later calls change what it keeps: the defaults too must be its own.
        arguments = deepcopy(given.arguments)
        with decimal.localcontext():  # one of the functions sets the precision of all that follow
            result = function(**arguments)
        try:
            return json.dumps(result) if type(result) is dict else str(result)
        except (TypeError, ValueError):
            return str(result)

    def like(self, gold: World) -> bool:
        """Do all instances have the public attributes of those of `gold`?"""
        return all(
            getattr(self.instances[name], attribute, None) == value
            for name, instance in gold.instances.items()
            for attribute, value in vars(instance).items()
            if not attribute.startswith("_")
        )


def _fresh(class_name: str, entry: Entry) -> Any:
    instance = _class(class_name)()
    if class_name == _STATELESS:
        return instance
    instance._load_scenario(deepcopy(entry.config.get(class_name, {})), long_context=entry.long_context)
    # What long contexts add lies in a module and is changed in place: all instances of a process would share it.
    return deepcopy(instance) if entry.long_context else instance


def passes(entry: Entry, turns: Sequence[Sequence[Call]]) -> bool:
    """Are the first `len(turns)` turns right, as the leaderboard counts?

    After each turn that has official calls: something was called, the state equals the official one, and what the
    official calls returned in this turn is among all that was returned so far, in any order. What happens in a turn
    without official calls is played, and judged by the turns after it alone.
    """
    mine, gold = World(entry), World(entry)
    returned: Counter[str] = Counter()
    for calls, official in zip(turns, entry.gold, strict=False):
        returned.update([mine.call(call) for call in calls])
        expected = Counter([gold.call(call) for call in official])
        if official and not (calls and mine.like(gold) and expected <= returned):
            return False
    return True


# --- in the sandbox --------------------------------------------------------------------------------------------


def step(world: Mapping[str, Any], earlier: Sequence[Call], name: str, arguments: Mapping[str, Any]) -> str:
    """What this call returns after the official calls of the turns before `world["turn"]` and the earlier ones."""
    entry = entry_of(world)
    here = World(entry)
    for call in [*sum(entry.gold[: world["turn"]], ()), *earlier]:
        here.call(call)
    return here.call({"name": name, "arguments": arguments})


def judge(world: Mapping[str, Any], calls: Sequence[Call]) -> bool:
    """Is the turn `world["turn"]` right with these calls, after the official ones of the turns before?"""
    entry = entry_of(world)
    try:
        return passes(entry, [*entry.gold[: world["turn"]], calls])
    except (RecursionError, MemoryError):  # such as a folder that was moved into itself
        return False


# --- what is published -----------------------------------------------------------------------------------------


def entry_of(world: Mapping[str, Any]) -> Entry:
    """The entry that a task's world names."""
    return entries(world["entry"].rsplit("_", 1)[0])[world["entry"]]


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
    owner = next(_class(name) for name in classes if hasattr(_class(name), call.func.id))
    names = list(inspect.signature(getattr(owner, call.func.id)).parameters)[1:]
    given = dict(zip(names, call.args, strict=False)) | {keyword.arg: keyword.value for keyword in call.keywords}
    return {"name": call.func.id, "arguments": {name: ast.literal_eval(value) for name, value in given.items()}}


@functools.cache
def documents(class_name: str) -> tuple[Mapping[str, Any], ...]:
    """The published descriptions of a class's functions."""
    file = _backend().MULTI_TURN_FUNC_DOC_FILE_MAPPING[class_name]
    return tuple(bfcl.read_rows("multi_turn_func_doc", file))


@functools.cache
def _class(name: str) -> type:
    return getattr(importlib.import_module(_backend().CLASS_FILE_PATH_MAPPING[name]), name)


def _backend():
    bfcl.folder()
    return importlib.import_module("bfcl_eval.constants.executable_backend_config")
