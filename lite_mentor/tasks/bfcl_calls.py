"""BFCL's multi-turn worlds, executed: its own classes, counted as it counts.

The worlds (file system, car, broker, travel agency and what belongs to them) are the classes of `bfcl-eval`. Nothing
keeps one: the state IS the list of calls. Every call is answered, and every episode judged, by playing all the calls
so far again on fresh instances, which takes a millisecond or two. So rollouts share nothing, a worker that is killed
loses nothing, and a call that raises has changed nothing (where the leaderboard keeps what it had done until then).

`step` and `judge` run in the sandbox, for the arguments are a student's. Calls are looked up among the published
functions and never evaluated.
"""

from __future__ import annotations

import decimal
import inspect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from lite_mentor.tasks.bfcl_world import CATEGORIES, Call, Entry, class_of, documents, entries

_STATELESS = "MathAPI"
_ENTRIES = {name: entry for category in CATEGORIES for name, entry in entries(category).items()}
"""Read when this module is imported: what the process of a call reads is not there for the next one."""


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
    instance = class_of(class_name)()
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
    entry = _ENTRIES[world["entry"]]
    here = World(entry)
    for call in [*sum(entry.gold[: world["turn"]], ()), *earlier]:
        here.call(call)
    return here.call({"name": name, "arguments": arguments})


def judge(world: Mapping[str, Any], calls: Sequence[Call]) -> bool:
    """Is the turn `world["turn"]` right with these calls, after the official ones of the turns before?"""
    entry = _ENTRIES[world["entry"]]
    try:
        return passes(entry, [*entry.gold[: world["turn"]], calls])
    except (RecursionError, MemoryError):  # such as a folder that was moved into itself
        return False
