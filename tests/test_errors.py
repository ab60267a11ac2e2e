"""Strangers' text on a terminal: shown as it is, and never obeyed, whichever way it takes."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import subprocess
import sys
import threading
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
from lite_mentor.errors import UserError, deceives, guard_terminal, printable, say
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
    for module, hook in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, hook, getattr(module, f"__{hook}__"))
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


def fail():
    raise ValueError(TITLE)


class Unraisable:
    def __del__(self):
        fail()


def log_an_exception():
    try:
        fail()
    except ValueError:
        logging.getLogger("theirs").exception("failed", stack_info=True)


def fail_in_a_thread():
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("way", [log_an_exception, fail_in_a_thread, Unraisable], ids=lambda way: way.__name__)
def test_every_traceback_is_shown(capsys, way):
    handler = logging.StreamHandler()
    logging.getLogger("theirs").addHandler(handler)
    way()
    logging.getLogger("theirs").removeHandler(handler)
    said = capsys.readouterr().err
    assert "Traceback (most recent call last):\n" in said
    assert f"ValueError: {SHOWN}\n" in said
    assert not obeyed(said)


@pytest.mark.usefixtures("guarded")
def test_a_thread_may_exit(capsys):
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["a\x1b[2J", "\x9b", "\n", "\u202e", "\u2066a\u2069", "\udcff"])
def test_names_that_are_refused(text):
    assert deceives(text)


@pytest.mark.parametrize("text", ["", "\u0645\u06cc\u200c\u062e\u0648", "👩\u200d🔬", "a b\xa0問", "a\xadb"])
def test_names_that_are_taken(text):
    assert not deceives(text)


# --- streams that fail -----------------------------------------------------------------------------------------

CHILD = """
import logging, sys
from rich.console import Console
from lite_mentor.display import Display
from lite_mentor.errors import guard_terminal, say

guard_terminal()
shown = Display({"student": "caf\xe9", "preset": "x", "sft_steps": 1}, 3, quiet=False)
for step in range(3):
    say("x" * 9000)
    shown.note("caf\xe9 \u554f")
    shown.step({"step": step, "phase": "rl", "reward/mean": 1.0})
Console().print("x" * 9000)
logging.warning("caf\xe9")
shown.close()
print("what is left for the end")
print("the child is done", file=sys.stderr)
"""


def child(*flags: str, **streams) -> subprocess.Popen:
    command = [sys.executable, *flags, "-c", CHILD]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict", "TERM": "xterm"}
    environ.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen(command, env=environ, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams})


posix = pytest.mark.skipif(os.name != "posix", reason="its devices and terminals")


@posix
@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("where", ["full", "pipe", "closed"])
def test_an_output_that_fails_ends_nothing(where, flags):
    if where == "full" and not os.path.exists("/dev/full"):
        pytest.skip("Linux has this device")
    if where == "full":
        with open("/dev/full", "w") as full:
            process = child(*flags, stdout=full)
    elif where == "pipe":
        process = child(*flags)
        process.stdout.close()  # as `| head` does
        process.stdout = None
    else:
        process = child(*flags, stdout=None, preexec_fn=lambda: os.close(1))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.count(b"stdout cannot be written (") == (where != "closed")
    assert b"WARNING:root:caf?\n" in said
    assert said.endswith(b"the child is done\n")


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this device")
def test_when_no_stream_can_be_written_the_work_goes_on():
    with open("/dev/full", "w") as full:
        assert child(stdout=full, stderr=full).wait(60) == 0


@posix
@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
def test_a_terminal_of_few_characters_and_one_that_is_gone(gone):
    ours, theirs = os.openpty()
    process = child(stdout=theirs)
    os.close(theirs)
    seen = b""
    try:
        while not gone and (part := os.read(ours, 65536)):
            seen += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, b"Traceback" in said) == (0, False), said
    assert gone or (b"caf? ?" in seen and b"step 3/3" in seen)


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
