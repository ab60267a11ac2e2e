"""Strangers' text on a terminal: shown as it is, and never obeyed, whichever way it takes."""

from __future__ import annotations

import ast
import io
import json
import logging
import sys
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lite_mentor import config, teach, teacher
from lite_mentor.assets import resolve_student, source_of
from lite_mentor.display import Display
from lite_mentor.errors import UserError, guard_terminal, printable, say
from lite_mentor.facts import facts_of
from lite_mentor.log import read_run
from lite_mentor.run import differences
from lite_mentor.tasks import make_example
from lite_mentor.tools import calculator_tools, caller

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "lite_mentor").rglob("*.py"))
TITLE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[/bold]"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202e[/bold]"


def obeyed(text: str) -> set[str]:
    """What a terminal would not show as it is, but for the ends of lines."""
    return {c for c in text if c != "\n" and unicodedata.category(c)[0] == "C"}


@given(st.text(st.characters(codec=None)))
def test_any_text_becomes_one_line_that_is_only_shown(text):
    line = printable(text)
    assert not obeyed(line)
    assert len((line + ".").splitlines()) == 1
    assert printable(line) == line
    line.encode()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TITLE, SHOWN),
        ("a\nb\r\tc\x7f\x00", "a\\nb\\r\\tc\\x7f\\x00"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("\u2066\u200f\ufeff\U000e0041", "\\u2066\\u200f\\ufeff\\U000e0041"),
        ("\udc1b", "\\udc1b"),
        ("caf\xe9 問\u3000題 \xa0 🦊 \\x1b", "caf\xe9 問\u3000題 \xa0 🦊 \\x1b"),
    ],
)
def test_what_is_shown(text, line):
    assert printable(text) == line
    assert str(UserError(text)) == line
    assert str(teacher.NoRecord(text)) == line


def test_a_line_takes_any_text_to_any_stream(capsys):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("\udcff 問 " + TITLE, narrow)
    assert narrow.buffer.getvalue().decode() == f"\\udcff ? {SHOWN}\n"
    say(TITLE)
    say(TITLE, sys.stderr)
    assert capsys.readouterr() == (SHOWN + "\n", SHOWN + "\n")


@pytest.fixture
def guarded(monkeypatch):
    """A guarded process, which is not for the other tests to find."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    factory = logging.getLogRecordFactory()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # a command that was tested before may have left it on
        guard_terminal()
        yield
        logging.captureWarnings(False)
    logging.setLogRecordFactory(factory)


@pytest.mark.usefixtures("guarded")
def test_what_libraries_say_is_shown_too(capsys):
    handler = logging.StreamHandler()
    for name in ("transformers.configuration_utils", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    try:
        logging.getLogger("transformers.configuration_utils").warning("a model of type %s\nand so on", TITLE)
        warnings.warn(TITLE, stacklevel=1)
    finally:
        for name in ("transformers.configuration_utils", "py.warnings"):
            logging.getLogger(name).removeHandler(handler)
    sys.excepthook(ValueError, ValueError(TITLE), None)
    said = capsys.readouterr().err
    assert said.startswith(f"a model of type {SHOWN}\nand so on\n")
    assert f"UserWarning: {SHOWN}\n" in said
    assert said.endswith(f"ValueError: {SHOWN}\n")
    assert not obeyed(said)


# --- no other way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ROOT / "train.py", *PACKAGE], ids=lambda p: p.name)
def test_nothing_is_printed_another_way(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    written = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if path.name != "errors.py":
        assert "print" not in names
    assert not {"sys.stdout.write", "sys.stderr.write", "sys.__stderr__"} & written
    mains = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    for main in mains if "UserError" in names else ():
        assert "guard_terminal()" in map(ast.unparse, main.body), "a command guards its terminal first"


# --- every way there is ----------------------------------------------------------------------------------------


def test_the_display(monkeypatch):
    settings = {**config.PRESETS["tiny"].asdict(), "student": TITLE, "preset": TITLE}
    shown = Display(settings, 3, quiet=False)
    screen = Console(file=io.StringIO(), force_terminal=True, width=300)
    shown._live = SimpleNamespace(console=screen, stop=lambda: None)
    shown.note(TITLE)
    shown.step({"step": 0, "phase": "rl", "reward/mean": 1.0, f"reward/{TITLE}": 1.0, "loss": float("nan")})
    shown.evaluation(TITLE, TITLE, {"ci95": (0.0, 1.0), "accuracy": 0.5, "n": 2})
    monkeypatch.setattr(shown, "_live", None)  # colours are escapes of our own
    plain = Console(file=io.StringIO(), width=300)
    plain.print(shown.render())
    said = plain.file.getvalue()
    assert said.count(SHOWN) == 5
    assert not obeyed(said)
    assert screen.file.getvalue().count(SHOWN) == 3
    assert "owned\x07" not in screen.file.getvalue()


def test_the_display_where_there_is_no_terminal(capsys):
    shown = Display({**config.PRESETS["tiny"].asdict()}, 3, quiet=False)
    shown.note(TITLE)
    shown.step({"step": 0, "phase": "rl", "reward/mean": 1.0, f"reward/{TITLE}": 1.0})
    shown.evaluation(TITLE, TITLE, {"ci95": (0.0, 1.0), "accuracy": 0.5, "n": 2})
    said = capsys.readouterr().out
    assert said.count(SHOWN) == 4
    assert not obeyed(said)


def test_the_bar_of_a_fill(tmp_path, monkeypatch):
    """A model's name may look like markup, which would raise where it closes nothing."""
    bar = teach._progress()
    monkeypatch.setattr(teach, "_progress", lambda: bar)
    options = teach.Options(tmp_path, suite=TITLE, source="endpoint", model=TITLE)
    teach.fill(options, [], lambda todo, done: (record for record in ()), caller())
    screen = Console(file=io.StringIO(), width=300)
    screen.print(bar.get_renderable())
    assert screen.file.getvalue().count(SHOWN) == 2


def test_files_of_strangers(tmp_path):
    (tmp_path / "source.json").write_text(json.dumps({"source": TITLE}))
    assert source_of(tmp_path) == SHOWN
    (tmp_path / "config.json").write_text(json.dumps({**config.PRESETS["tiny"].asdict(), "student": TITLE}))
    (tmp_path / "metrics.jsonl").write_text(TITLE + "\n")
    example = make_example(TITLE, ["3"], calculator_tools(), suite=TITLE)
    with teacher.append_to(tmp_path / "cache", teacher.Manifest(TITLE, "oracle", {}, TITLE, (TITLE,))) as cache:
        facts = facts_of([example])[example.key]
        message = {"role": "assistant", "content": TITLE}
        content = dict(teacher=TITLE, messages=(message,), calls=(), answer=TITLE, correct=False, facts=facts)
        cache.append(teacher.seal(example_key=example.key, **content))
        cache.publish()
    found = teacher.open_cache(tmp_path / "cache")
    ways = [
        lambda: resolve_student(TITLE),
        lambda: config.load(str(tmp_path / "config.json")),
        lambda: config.parse(["--student", TITLE]),
        lambda: read_run(tmp_path),
        lambda: found.usable([example]),
        lambda: found.covers([make_example(TITLE, ["4"], calculator_tools(), suite="x")]),
        lambda: found[TITLE],
        lambda: teacher.open_cache(tmp_path / TITLE.replace("/", "")),
    ]
    for way in ways:
        with pytest.raises(UserError) as caught:
            way()
        assert "owned" in str(caught.value) or "config.json" in str(caught.value) or "metrics" in str(caught.value)
        assert not obeyed(str(caught.value))
        assert "\n" not in str(caught.value)


def test_what_a_checkpoint_says(tmp_path):
    here = SimpleNamespace(config=config.PRESETS["tiny"], identity={})
    state = {"config": {**here.config.asdict(), "reward": TITLE, TITLE: 1}, "identity": {}}
    other, inexact = differences(SimpleNamespace(state=state, versions={TITLE: TITLE}), here)
    said = " ".join(other + inexact)
    assert said.count(SHOWN) == 4
    assert not obeyed(said)


def test_a_command_and_a_file_with_such_a_name(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suite = TITLE.replace("/", "") + ".jsonl"
    rows = [{"question": f"{TITLE} {i}?", "answer": str(i), "tools": ["add"]} for i in range(30)]
    Path(suite).write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "tools": [TITLE]}]))
    assert teach.main(["--suite", suite, "--out", "cache"]) == 2
    said = capsys.readouterr()
    assert "error: The oracle needs built-in tasks" in said.err
    assert "owned" in said.err
    assert not obeyed(said.out + said.err)
    assert "1 of 31 rows were set aside" in caplog.text
    assert not obeyed(caplog.text)
