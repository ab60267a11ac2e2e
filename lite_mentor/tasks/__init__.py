"""Questions with tools: the built-in suites, and what every suite shares.

`Example.meta` of the built-in suites holds

    level     int, how many calls the known solution takes
    template  str, which pattern the question was made from
    steps     tuple of {"thought": str, "tool": str, "arguments": {...}}: the known solution, call by call. An argument
              (or an item of a list argument) of the form "#2" stands for the result of step 2, counted from 1
    final     str, a closing sentence in which "{answer}" stands where the boxed answer goes; may be just "{answer}"

A suite is a pure function of (split, size, seed, levels): the same on every machine and every Python.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lite_mentor.errors import UserError
from lite_mentor.quantities import normalized
from lite_mentor.types import Checker, Example, ToolSpec, World

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SUITES = ("math", "math_varied", "tiny", "tiny_ood", "ood_tools", "ood_lookup", "gsm_symbolic")
"""Generated here, in all splits. Beside them are the turns of BFCL (bfcl_turns.py), and for testing only its
single-turn categories `bfcl_CATEGORY` (bfcl.py)."""

Describe = Callable[[str], ToolSpec]
"""Describes the tool at `module:function`, where its module may be imported (Sandbox.describe). Raises UserError."""


def load_suite(name: str, *, split: Split, size: int, seed: int, levels: Sequence[int] | None = None) -> list[Example]:
    """`size` distinct examples of one split of a built-in suite, in a fixed random order.

    `levels` keeps to these difficulties; those that the suite does not have are ignored, None means all.
    Raises UserError for an unknown name or split, when no level is left, and when the suite has fewer examples.
    """
    if name.startswith("bfcl_turns"):
        from lite_mentor.tasks import bfcl_turns

        return bfcl_turns.generate(name, split=split, size=size, seed=seed, levels=levels)
    if name.startswith("bfcl_"):
        from lite_mentor.tasks import bfcl

        return bfcl.generate(name, split=split, size=size, seed=seed)
    if name not in SUITES:
        raise UserError(
            f"There is no task suite {name!r}; the suites are {', '.join(SUITES)}, bfcl_turns and bfcl_CATEGORY."
        )
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r} of {name}; the splits are {', '.join(SPLITS)}.")
    module = importlib.import_module(f"lite_mentor.tasks.{name}")
    kept = [level for level in module.LEVELS if levels is None or level in levels]
    if not kept:
        have = ", ".join(str(level) for level in module.LEVELS)
        raise UserError(f"Suite {name} has none of the levels {tuple(levels or ())}; it has {have}.")
    return module.generate(split, size=size, seed=seed, levels=kept)


def load_task(
    task: str,
    *,
    split: Split,
    size: int,
    seed: int,
    levels: Sequence[int] | None,
    quarantine: Path,
    describe: Describe,
    note: Callable[[str], None] | None = None,
) -> list[Example]:
    """One split of a built-in suite, or of the user's own file, where a hash of the question holds out a tenth each.

    Of a file no more than its first `size` examples are used; `note` is told of those that are not. `describe` tells
    what its own tools are: see `Describe`.
    """
    if not task.endswith((".jsonl", ".parquet")):
        return load_suite(task, split=split, size=size, seed=seed, levels=levels)
    from lite_mentor.tasks.jsonl import read_tasks

    rows = read_tasks(Path(task), quarantine=quarantine, describe=describe)
    examples = [example for example in rows if split_of(same_question(example.question).casefold(), ()) == split]
    if note and len(examples) > size:
        flag = "--train-size" if split == "train" else "--eval-size"
        note(
            f"{task}: the first {size} of {len(examples)} examples for {split} are used and {len(examples) - size} are "
            f"not; raise {flag} to use more"
        )
    return examples[:size]


def same_question(text: str) -> str:
    """Questions with equal results differ in spaces and composed characters alone."""
    return " ".join(normalized("NFC", text).split())


def split_of(template: str, numbers: Sequence[Any]) -> Split:
    """The split that owns a template filled with these numbers: 80 % train, 10 % validation, 10 % test."""
    text = "|".join([template, *(str(number) for number in numbers)])
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def make_example(
    question: str,
    answer: Sequence[str],
    tools: Sequence[ToolSpec],
    *,
    suite: str,
    checker: Checker = "math",
    world: World | None = None,
    **meta: Any,
) -> Example:
    """An Example with its content key, 64 bits of the SHA-256 of (question, answer, tool names, world if any)."""
    content = [question, list(answer), [tool.name for tool in tools], *([] if world is None else [dict(world.start)])]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return Example(key, question, tuple(answer), tuple(tools), checker, suite, meta, world)


def resolve_arguments(arguments: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Arguments with every "#k" replaced by the k-th result: as a number when its text is one, else as text."""
    return {name: _resolve(value, results) for name, value in arguments.items()}


def _resolve(value: Any, results: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_resolve(item, results) for item in value]
    if not (isinstance(value, str) and re.fullmatch(r"#[1-9][0-9]*", value)):
        return value
    text = results[int(value[1:]) - 1]
    return json.loads(text) if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) else text
