"""Code that a student wrote, from the text of a call to the text of its result."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from sample_tools import no_module

from lite_mentor.errors import UserError
from lite_mentor.sandbox import Sandbox
from lite_mentor.tasks.jsonl import python_tool, read_tasks
from lite_mentor.tools import run_call, signature

PATH = "lite_mentor.python_tool:python"
needs_monty = pytest.mark.skipif(importlib.util.find_spec("pydantic_monty") is None, reason="pydantic-monty is absent")


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=1) as sandbox:
        yield sandbox


@needs_monty
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", ("ok", "(nothing printed)")),
        ("x = 1", ("ok", "(nothing printed)")),
        ("1 + 2", ("ok", "3")),
        ("0.1 + 0.2", ("ok", "0.3")),
        ("print('a')\nprint('b')\n[1, 2.0, True]", ("ok", "a\nb\n1, 2, true")),
        ("for i in range(3):\n    print(i)", ("ok", "0\n1\n2")),
        ("import math, itertools\nmath.comb(5, 2) + len(list(itertools.permutations('abc')))", ("ok", "16")),
        ("print('x' * 2900)\n7", ("ok", "x" * 2000 + "... [901 more characters]\n7")),
        ("'x' * 2900", ("ok", "x" * 1920 + "... [980 more characters]")),
        ("{1: 2.5}", ("ok", '{"1": 2.5}')),
        ("10**5000", ("error", "Error: the result is too large.")),
        ("1 / 0", ("error", "Error: ZeroDivisionError: division by zero.")),
        ("(", ("error", "Error: SyntaxError: unexpected EOF while parsing.")),
        ("y", ("error", "Error: NameError: name 'y' is not defined.")),
        ("import numpy", ("error", "Error: ModuleNotFoundError: No module named 'numpy'.")),
        ("'a' * 10**11", ("error", "Error: the code used more than 64 MB.")),
        ("input()", ("error", "Error: NameError: name 'input' is not defined.")),
    ],
)
def test_what_the_student_is_told(sandbox, code, expected):
    assert sandbox.call(PATH, {"code": code}) == expected


@needs_monty
def test_every_call_starts_afresh_and_alike(sandbox):
    draw = "import random, time\nrandom.random() + time.time()"
    assert sandbox.call(PATH, {"code": "x = 5\nx"}) == ("ok", "5")
    assert sandbox.call(PATH, {"code": "x"}) == ("error", "Error: NameError: name 'x' is not defined.")
    assert sandbox.call(PATH, {"code": draw}) == sandbox.call(PATH, {"code": draw})


@needs_monty
def test_a_student_calls_it_by_its_name(sandbox, tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"question": "How many?", "answer": 6, "tools": ["add", "python"]}\n')
    (example,) = read_tasks(tmp_path / "tasks.jsonl", quarantine=tmp_path / "quarantine.jsonl", describe=no_module)
    raw = json.dumps({"name": "python", "arguments": {"code": "2 * 3"}})
    call = run_call(raw, example.tools, run_path=sandbox.call)
    assert [tool.name for tool in example.tools] == ["add", "python"]
    assert (call.status, call.result) == ("ok", "6")
    assert signature(example.tools[1]).startswith("python(code: string): Run Python; returns what it prints and its")


def test_without_the_package_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    monkeypatch.delitem(sys.modules, "lite_mentor.python_tool", raising=False)
    python_tool.cache_clear()
    (tmp_path / "tasks.jsonl").write_text('{"question": "How many?", "answer": 6, "tools": ["python"]}\n')
    with pytest.raises(UserError, match=r"needs pydantic-monty; install it with: pip install 'lite-mentor\[python\]'"):
        read_tasks(tmp_path / "tasks.jsonl", quarantine=tmp_path / "quarantine.jsonl", describe=no_module)


def interpreters(worker: int, *, busy: bool = False) -> list[int]:
    """Living processes of the worker's group that run monty; only those that have computed for a while."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")
        except OSError:  # it has ended
            continue
        state, _, group, *others = fields[2].split()
        if "(monty" in fields[0] and state != "Z" and int(group) == worker and (int(others[8]) >= 10 or not busy):
            found.append(int(stat.parent.name))
    return found


@needs_monty
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_an_interpreter_that_crashes_is_an_error_and_is_replaced():
    with Sandbox(1, 60.0, "limits only") as sandbox:
        assert sandbox.call(PATH, {"code": "1"}) == ("ok", "1")
        worker, results = next(iter(sandbox._workers)).pid, []
        code = {"code": "while True: pass"}
        thread = threading.Thread(target=lambda: results.append(sandbox.call(PATH, code)))
        thread.start()
        while not (running := interpreters(worker, busy=True)) and thread.is_alive():
            pass
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        thread.join()
        assert results == [("error", "Error: the code broke the interpreter.")]
        assert sandbox.call(PATH, {"code": "1 + 1"}) == ("ok", "2")
        assert next(iter(sandbox._workers)).pid == worker


@needs_monty
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_an_interpreter_that_ignores_its_limits_ends_with_its_worker():
    with Sandbox(1, 1.0, "limits only") as sandbox:  # less than the interpreter's own limit
        while sandbox.call(PATH, {"code": "1"})[0] != "ok":  # a busy machine may take longer to start it
            pass
        worker = next(iter(sandbox._workers)).pid
        assert sandbox.call(PATH, {"code": "while True: pass"}) == ("timeout", "Error: the tool took longer than 1 s.")
        while interpreters(worker):  # killed, and about to be buried
            pass
        assert sandbox.call(PATH, {"code": "1 + 1"}) == ("ok", "2")
