"""The order of the rooms: data flows one way, so a room may import only rooms that stand above it in this list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FREE = {"types", "config", "errors", "files"}  # importable from everywhere; they import nothing but each other
ORDER = [
    "calculators", "results", "tools", "isolation", "worker", "sandbox", "units", "quantities", "judge", "python_tool",
    "tasks", "facts", "template", "prompt",
    "assets", "attention", "tiny", "device", "lora", "norms", "fused", "student", "paging", "decode", "engine",
    "proof", "load", "rollout", "teacher", "transcript", "teach_options", "endpoint", "teach", "reward", "batch",
    "loss", "optim", "soft", "sft", "checkpoint", "statistics", "display", "log", "evaluate", "charts", "page",
    "report", "fit", "run", "label",
]  # fmt: skip
MAY_IMPORT_KERNELS = {"attention", "loss", "reward", "student", "paging", "decode"}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "lite_mentor").parts
    return parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("lite_mentor.")}


FILES = sorted(p for p in (ROOT / "lite_mentor").rglob("*.py") if p.name != "__init__.py" or p.parent.name == "tasks")


def test_every_room_has_its_place():
    assert {room_of(p) for p in FILES} == FREE | set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it(path):
    room = room_of(path)
    allowed = FREE if room in FREE else FREE | {room} | set(ORDER[: ORDER.index(room)])
    assert rooms_imported(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_a_few_rooms_know_the_kernels(path):
    knows = any(name.split(".")[0] == "mentor_kernels" for name in imports(path))
    assert not knows or room_of(path) in MAY_IMPORT_KERNELS


def test_the_kernels_stand_alone():
    files = list((ROOT / "kernels" / "mentor_kernels").glob("*.py"))
    assert files
    for path in files:
        assert not any(name.startswith("lite_mentor") for name in imports(path)), path


def test_the_trainer_never_loads_what_fills_the_cache():
    fillers = {"transcript", "teach_options", "endpoint", "teach"}
    files = [ROOT / "train.py", *(p for p in FILES if room_of(p) not in fillers)]
    assert not any(fillers & rooms_imported(path) for path in files)


def test_no_pickle_anywhere():
    banned = {"pickle", "dill", "cloudpickle", "shelve"}
    files = [ROOT / "train.py", *FILES, *(ROOT / "kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    for path in files:
        assert not {name.split(".")[0] for name in imports(path)} & banned, path
