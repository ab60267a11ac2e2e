"""The list of mutants fits the code, and the bench tells what a test missed from what it did not."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import mutants
from bench.__main__ import main as bench_main
from bench.mutants import ROOT, Mutant, read_list
from lite_mentor.errors import UserError

MUTANTS = read_list(mutants.LIST.read_text(encoding="utf-8"))


@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_the_code_holds_a_mutants_lines_once_and_can_be_read_without_them(mutant):
    content = (ROOT / mutant.path).read_text(encoding="utf-8")
    assert mutant.new != mutant.old
    ast.parse(mutant.applied(content))


def test_every_test_that_a_mutant_names_is_there():
    for mutant in MUTANTS:
        for test in mutant.tests:
            path, *name = test.split("::")
            source = (ROOT / path).read_text(encoding="utf-8")
            assert not name or f"\ndef {name[0].split('[')[0]}(" in source, (mutant.name, test)


ENTRY = "N1 area: what is lost\ncode.py\n-    if x:\n-        y()\n+    y()\ntests/test_code.py::test_y\n"
CONTENT = "def f():\n    if x:\n        y()\n    z()\n"


def test_an_entry_by_hand():
    (mutant,) = read_list(f"# about\n\n# more\n{ENTRY}\n\n")
    tests = ("tests/test_code.py::test_y",)
    assert mutant == Mutant("N1", "area", "what is lost", "code.py", "    if x:\n        y()", "    y()", tests, "")
    assert mutant.applied(CONTENT) == "def f():\n    y()\n    z()\n"
    (mutant,) = read_list(ENTRY.replace("+    y()\n", "") + "equivalent: nobody reads it: never\n")
    assert (mutant.new, mutant.equivalent) == ("", "nobody reads it: never")
    assert mutant.applied(CONTENT) == "def f():\n    z()\n"


@pytest.mark.parametrize("content", ["", CONTENT * 2, CONTENT.replace("y()", "y() "), CONTENT.replace("    if", "if")])
def test_lines_that_are_not_there_once_are_refused(content):
    with pytest.raises(UserError, match=r"The lines of mutant N1 occur [02] times in code\.py and must occur once"):
        read_list(ENTRY)[0].applied(content)


@pytest.mark.parametrize(
    "text",
    [
        "N1 area what is lost\n" + ENTRY.partition("\n")[2],
        ENTRY.replace("-", "?"),
        ENTRY.replace("tests/", "test/"),
        ENTRY.replace("N1 area", "N1"),
        f"{ENTRY}equivalent: a\nequivalent: b\n",
        f"{ENTRY}\n{ENTRY}",
    ],
)
def test_a_list_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=r"cannot be read; it begins with 'N1|more than one entry of the name N1"):
        read_list(text)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of one function, and mutants of it: one is found, one is not, and one makes no difference."""
    root = tmp_path / "tree"
    (root / "tests").mkdir(parents=True)
    (root / "adder.py").write_text("def add(a, b):\n    c = a + b\n    return c\n")
    (root / ".gitignore").write_text("ignored.py\n")
    (root / "tests/test_adder.py").write_text(
        "from adder import add\n\ndef test_one():\n    assert add(1, 1) == 2\n\n"
        "def test_other():\n    assert add(1, 3) == 4\n"
    )
    entries = [
        ("K1 found", "-    c = a + b\n+    c = a * b", "test_one"),
        ("K2 missed", "-    c = a + b\n+    c = a * b + 1", "test_one"),
        ("K3 same", "-    return c\n+    return +c\nequivalent: these are numbers", "test_other"),
    ]
    texts = [f"{name}: lost\nadder.py\n{lines}\ntests/test_adder.py::{test}\n" for name, lines, test in entries]
    (tmp_path / "mutants.txt").write_text("\n".join(texts))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # here they would only take time
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "LIST", tmp_path / "mutants.txt")
    return root


def test_mutants_that_no_test_misses_are_told_from_the_others_and_known_results_are_kept(
    tree, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    flags = ["mutants", "--out", str(out)]
    assert bench_main([*flags, "--only", "found", "K3"]) == 0
    with pytest.raises(SystemExit) as stop:
        bench_main(flags)
    assert stop.value.code == 1
    assert "not as they must be: K2\n" in capsys.readouterr().err
    found = json.loads((out / "mutants.json").read_text())["results"]
    assert [(name, row["result"], row["by"]) for name, row in found.items()] == [
        ("K1", "killed", "tests/test_adder.py::test_one"),
        ("K3", "survived", ""),
        ("K2", "survived", ""),
    ]
    table = (out / "mutants.md").read_text()
    assert "| K1 | found | lost | killed | tests/test_adder.py::test_one |" in table
    assert "| K3 | same | lost | survived, as it must: these are numbers |" in table
    assert (tree / "adder.py").read_text() == "def add(a, b):\n    c = a + b\n    return c\n"

    monkeypatch.setattr(mutants, "examine", lambda *_: pytest.fail("it is known"))
    (tree / "ignored.py").write_text("x = 1\n")
    assert bench_main([*flags, "--only", "K1"]) == 0
    (tree / "new.py").write_text("x = 1\n")
    assert bench_main([*flags, "--only", "K1"]) == 2
    assert "is of other code" in capsys.readouterr().err
    assert bench_main([*flags, "--only", "K9"]) == 2
    assert "--only K9: give names of " in capsys.readouterr().err


def test_tests_that_fail_anyway_are_no_verdict(tree, tmp_path, capsys):
    (tree / "adder.py").write_text("def add(a, b):\n    c = a + b\n    return c + 1\n")
    assert bench_main(["mutants", "--out", str(tmp_path / "out"), "--only", "K1"]) == 2
    assert "do not pass here, where nothing was changed yet: FAILED tests/test_adder.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "output", "result"),
    [
        (0, "1 passed", "survived"),
        (None, "", "timed out"),
        (1, "FAILED tests/test_a.py::test_b[c] - assert d - e\n1 failed", "killed"),
        (1, "ERROR tests/test_a.py::test_b\n1 error", "killed"),
        (1, "ERROR tests/test_a.py - SyntaxError\n1 error", None),  # no test ran
        (4, "ERROR: not found", None),
    ],
)
def test_only_a_test_that_ran_and_failed_finds_a_mutant(tree, monkeypatch, code, output, result):
    monkeypatch.setattr(mutants, "pytest", lambda *_: (code, output))
    mutant = read_list(mutants.LIST.read_text())[0]
    if result is None:
        with pytest.raises(UserError, match=r"The tests of mutant K1 could not be run; they end with: \S"):
            mutants.examine(mutant, tree, 1)
    else:
        assert mutants.examine(mutant, tree, 1)["result"] == result
    assert "c = a + b" in (tree / "adder.py").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody tells which processes are whose")
def test_what_runs_too_long_is_ended_with_all_that_it_started(tmp_path):
    code = (
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '999'], start_new_session=True).pid, flush=True)\n"
        "time.sleep(999)"
    )
    bystander = subprocess.Popen(["sleep", "999"])
    with mutants.leaving_nothing_behind():
        status, output = mutants.run([sys.executable, "-c", code], tmp_path, seconds=1)
    assert status is None
    assert not Path(f"/proc/{int(output)}").exists()
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
