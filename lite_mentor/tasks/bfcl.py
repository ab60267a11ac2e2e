"""The single-turn part of the Berkeley Function Calling Leaderboard: its own data, judged by its own AST checker.

The data and the checker come with the package `bfcl-eval`, installed without its dependencies. A student is asked once
and answers with calls in our format; they are read by our parser, and the checker compares the values it is handed:
nothing that a student wrote is evaluated, and no function is run.

`Example.meta` holds `entry` (the official id), `functions` and `truth` (as published; None where no call is right) and
`steps` (one official answer, see tasks/__init__.py).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace
from typing import Any

from lite_mentor.errors import UserError
from lite_mentor.tasks import Split, make_example
from lite_mentor.types import Example, ToolCall, ToolSpec

CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance",
)  # fmt: skip
SUITES = tuple(f"bfcl_{category}" for category in CATEGORIES)

_TYPES = {
    "dict": "object", "object": "object", "float": "number", "number": "number", "integer": "integer",
    "string": "string", "boolean": "boolean", "array": "array", "tuple": "array",
}  # fmt: skip
_MODEL = "lite-mentor"
_STOOD_IN = {
    "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": {_MODEL: SimpleNamespace(underscore_to_dot=False)}},
    "bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter": {"java_type_converter": None},
    "bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter": {"js_type_converter": None},
}
"""What the checker imports for other models and languages, and with it every vendor's SDK; Python needs none of it."""


def generate(suite: str, *, split: Split, size: int, seed: int) -> list[Example]:
    """`size` entries of one category in a fixed random order; all of them when it has fewer.

    Raises UserError for an unknown category, when bfcl-eval is missing, and for any split but `test`: a benchmark is
    not trained on.
    """
    if suite not in SUITES:
        raise UserError(f"There is no suite {suite!r}; BFCL has {', '.join(SUITES)}.")
    if split != "test":
        raise UserError(f"{suite} is a benchmark and has only the split test, not {split}; train on another task.")
    category = suite.removeprefix("bfcl_")
    entries = rows(category)
    truths = {} if category.endswith("irrelevance") else {row["id"]: row for row in rows(category, "possible_answer")}
    Random(f"{suite}/{seed}").shuffle(entries)
    return [_example(suite, entry, truths) for entry in entries[:size]]


def passes(example: Example, calls: Sequence[ToolCall]) -> bool:
    """Is this one turn's list of calls right, as the leaderboard counts?

    One call that cannot be parsed makes the whole answer unreadable: wrong where calls were asked for, and no call
    where none is right. The arguments are judged as written, before any schema made 2 out of 2.0.
    """
    readable = all(call.status != "bad_json" for call in calls)
    if example.meta["truth"] is None:
        return not calls or not readable
    if not readable:
        return False
    output = [{call.name: json.loads(call.raw).get("arguments") or {}} for call in calls]
    category = example.suite.removeprefix("bfcl_")
    check, language = _checker()
    try:
        verdict = check(example.meta["functions"], output, example.meta["truth"], language, category, _MODEL)
    except (AttributeError, IndexError, KeyError, TypeError):  # it expects the shape of the official answers
        return False
    return verdict["valid"]


def _example(suite: str, entry: Mapping[str, Any], truths: Mapping[str, Any]) -> Example:
    truth = truths[entry["id"]]["ground_truth"] if truths else None
    functions = entry["function"]
    required = {function["name"]: function["parameters"].get("required", ()) for function in functions}
    steps = [
        {"thought": "", "tool": name, "arguments": _first_allowed(allowed, required[name])}
        for call in truth or ()
        for name, allowed in call.items()
    ]
    return make_example(
        _question(entry["question"][0]),
        [json.dumps({step["tool"]: step["arguments"]}) for step in steps],
        [_tool(function) for function in functions],
        suite=suite,
        checker="text",
        level=1,
        template=entry["id"],
        entry=entry["id"],
        functions=functions,
        truth=truth,
        steps=tuple(steps),
    )


def _question(messages: Sequence[Mapping[str, str]]) -> str:
    """One text: instructions first, as they stand; the speakers are named only where there is a conversation."""
    conversation = sum(message["role"] != "system" for message in messages) > 1
    return "\n\n".join(
        f"{m['role'].capitalize()}: {m['content']}" if conversation and m["role"] != "system" else m["content"]
        for m in messages
    )


def _tool(function: Mapping[str, Any]) -> ToolSpec:
    schema = {"type": "object", "properties": {}, **json_schema(function["parameters"])}
    return ToolSpec(function["name"], function["description"], schema, function=_accepted)


def _accepted(**arguments: Any) -> str:
    """Stands for every function: only how it is called is judged."""
    return "accepted"


def json_schema(published: Mapping[str, Any]) -> dict[str, Any]:
    """JSON schema from their dialect of it; what is not JSON schema is left out."""
    schema: dict[str, Any] = {}
    if published.get("type") in _TYPES:
        schema["type"] = _TYPES[published["type"]]
    if isinstance(published.get("properties"), dict):
        schema["properties"] = {name: json_schema(inner) for name, inner in published["properties"].items()}
    if isinstance(published.get("items"), dict):
        schema["items"] = json_schema(published["items"])
    schema |= {key: published[key] for key in ("enum", "required") if isinstance(published.get(key), list)}
    return schema | {key: published[key] for key in ("description", "default") if key in published}


def _first_allowed(allowed: Mapping[str, Sequence[Any]], required: Sequence[str]) -> dict[str, Any]:
    """The shortest call that the official answer allows; "" among the values means that one may be left out."""
    return {
        name: _without_choices(next((value for value in values if value != ""), ""))
        for name, values in allowed.items()
        if name in required or "" not in values
    }


def _without_choices(value: Any) -> Any:
    """A dict, alone or in a list, lists the allowed values of its own keys; deeper ones are what they seem."""
    if isinstance(value, dict):
        return {key: given[0] for key, allowed in value.items() if (given := [v for v in allowed if v != ""])}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [_without_choices(item) for item in value]
    return value


@functools.cache
def _checker() -> tuple[Callable[..., dict], Any]:
    """Their `ast_checker`, and their word for Python."""
    folder()
    with _stand_ins():
        module = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    return module.ast_checker, module.Language.PYTHON


@contextmanager
def _stand_ins():
    before = {name: sys.modules.get(name) for name in _STOOD_IN}
    for name, content in _STOOD_IN.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def rows(category: str, *folders: str) -> list[dict[str, Any]]:
    """The published entries of a category, or from the folder `possible_answer` their answers. Raises UserError."""
    return read_rows(*folders, f"BFCL_v4_{category}.json")


def read_rows(*parts: str) -> list[dict[str, Any]]:
    """A file of JSON lines in bfcl-eval's data. Raises UserError when it cannot be read."""
    path = folder().joinpath("data", *parts)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"bfcl-eval's data {path} cannot be read ({error}); install bfcl-eval 2026.3.23.") from error


def folder() -> Path:
    """Where bfcl-eval is installed. Raises UserError when it is not."""
    found = importlib.util.find_spec("bfcl_eval")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "The BFCL suites need bfcl-eval: install it with `pip install --no-deps bfcl-eval==2026.3.23` "
            "(the pins of its dependencies clash with ours)."
        )
    return Path(found.submodule_search_locations[0])
