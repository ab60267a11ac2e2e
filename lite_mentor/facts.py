"""What examples were made of, as hashes, so that what is kept of them knows when that has changed.

An example's key is its question, answer and the names of its tools: it stays when a tool is mended or a checker is
corrected. A teacher's record, a checkpoint and an evaluation therefore also keep these facts, each by its name:

    tools   what can be read of the tools: names, descriptions, schemas
    code    the files in which their functions stand (not what those import), and ours that check and show calls
    judge   the checker, the files that read a record's words and judge them, and the version of math-verify
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from lite_mentor.types import Example, ToolSpec

Facts = Mapping[str, str]
_HERE = Path(__file__).parent
_JUDGE = [str(_HERE / f"{room}.py") for room in ("judge", "quantities", "units", "prompt", "transcript")]
"""What decides whether a record is correct: its calls and its answer are read from its words."""
_CODE = [str(_HERE / f"{room}.py") for room in ("tools", "results")]
"""How a call is checked, and how its result reads."""


def facts_of(examples: Iterable[Example]) -> dict[str, Facts]:
    """The facts of each example, by its key. Files are read, nothing is imported."""
    code, read = functools.cache(_code_of), functools.cache(_sha256)
    found = {}
    for e in examples:
        judged_by = [e.checker, e.world and code(_module_of(e.world.judge)), *map(read, _JUDGE), _math_verify()]
        found[e.key] = {
            "tools": digest([tool.read for tool in e.tools]),
            "code": digest([*map(read, _CODE), *(_code_of_tool(tool, code, read) for tool in e.tools)]),
            "judge": digest(judged_by),
        }
    return found


def digest(content: Any) -> str:
    """Hash of what JSON can hold, 64 bits of SHA-256."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _module_of(path: str) -> str:
    return path.partition(":")[0]


def _code_of_tool(tool: ToolSpec, code: Callable[[str], str], read: Callable[[str], str]) -> list[str]:
    """Of a tool of our own the files of its function, and of those that this one wraps."""
    if tool.path:
        return [code(_module_of(tool.path))]
    files, function = [], tool.function
    while function is not None:
        file = inspect.getsourcefile(function)
        files.append(read(file) if file else "")
        function = getattr(function, "__wrapped__", None)
    return files


def _code_of(module: str) -> str:
    """Hash of a module's file, which is looked for where a worker would find it; "" where there is none."""
    parts, folders = module.split("."), None
    for end in range(1, len(parts) + 1):
        spec = _spec_of(".".join(parts[:end]), folders)
        if spec is None:
            return ""
        folders = spec.submodule_search_locations or []
    return _sha256(spec.origin) if spec.has_location else ""


def _spec_of(name: str, folders: Iterable[str] | None) -> ModuleSpec | None:
    """None for `folders` is where programs begin to look; editable installs are found by finders of their own."""
    if folders is None and (found := PathFinder.find_spec(name, [os.getcwd(), *sys.path])):
        return found
    return next(filter(None, (finder.find_spec(name, folders) for finder in sys.meta_path)), None)


def _sha256(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:  # such as a module within an archive
        return ""


@functools.cache
def _math_verify() -> str | None:
    try:
        return importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError:
        return None
