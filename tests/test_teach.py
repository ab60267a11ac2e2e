"""Filling the teacher's cache: from solutions, from a random student; killed and resumed."""

from __future__ import annotations

import ast
import dataclasses
import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from lite_mentor import prompt, teach
from lite_mentor import run as training
from lite_mentor.config import PRESETS
from lite_mentor.errors import UserError
from lite_mentor.prompt import Chat
from lite_mentor.sft import teacher_rollout
from lite_mentor.tasks import SUITES, load_suite, make_example
from lite_mentor.teach import Options, command, main, oracle
from lite_mentor.teacher import open_cache
from lite_mentor.tiny import tiny_tokenizer
from lite_mentor.tools import calculator_tools, caller

TOOLS = [tool for tool in calculator_tools() if tool.name in ("add", "multiply")]
ROOT = Path(teach.__file__).parent


run = caller()


def solved(**meta):
    steps = (
        {"thought": "", "tool": "multiply", "arguments": {"a": 2, "b": 3}},
        {"thought": "Now add one.", "tool": "add", "arguments": {"a": "#1", "b": 1}},
    )
    meta = {"steps": steps, "final": "It is {answer}."} | meta
    return make_example("What is 2 * 3 + 1?", ["7"], TOOLS, suite="made", **meta)


# --- the oracle ------------------------------------------------------------------------------------------------


def test_the_oracle_writes_the_solution_one_call_a_turn():
    record = oracle(solved(), run)
    assert record.messages == (
        {
            "role": "assistant",
            "content": '<tool_call>{"name": "multiply", "arguments": {"a": 2, "b": 3}}</tool_call>',
        },
        {"role": "tool", "content": "6"},
        {
            "role": "assistant",
            "content": 'Now add one.\n<tool_call>{"name": "add", "arguments": {"a": 6, "b": 1}}</tool_call>',
        },
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "It is \\boxed{7}."},
    )
    assert [(c.name, dict(c.arguments), c.status, c.result) for c in record.calls] == [
        ("multiply", {"a": 2, "b": 3}, "ok", "6"),
        ("add", {"a": 6, "b": 1}, "ok", "7"),
    ]
    assert (record.example_key, record.teacher, record.answer, record.correct) == (solved().key, "oracle", "7", True)


def test_the_oracle_answers_at_once_where_no_tool_is_needed():
    for example in load_suite("math_varied", split="train", size=40, seed=0, levels=(0,)):
        record = oracle(example, run)
        assert record.correct
        assert record.calls == ()
        assert [message["role"] for message in record.messages] == ["assistant"]
        assert f"\\boxed{{{example.answer[0]}}}" in record.messages[0]["content"]


def test_the_oracles_words_are_what_the_student_learns_to_say():
    chat, record = Chat(tiny_tokenizer()), oracle(solved(), run)
    rollout = teacher_rollout(chat, solved(), record)
    said = chat.decode(rollout.ids[rollout.sampled].tolist())
    assert said == "".join(m["content"] + "<|im_end|>" for m in record.messages if m["role"] == "assistant")


@pytest.mark.parametrize("suite", SUITES)
def test_the_oracle_solves_every_suite(suite):
    for example in load_suite(suite, split="validation", size=20, seed=1):
        record = oracle(example, run)
        assert record.correct
        assert len(record.calls) == len(example.meta["steps"]) == example.meta["level"]


def test_the_oracle_needs_solutions():
    example = make_example("What is 2 * 3?", ["6"], TOOLS, suite="mine")
    with pytest.raises(UserError, match=r"The oracle needs built-in tasks: example \w+ of mine comes without"):
        oracle(example, run)


def test_a_solution_that_does_not_run_stops_everything():
    broken = solved(steps=({"thought": "", "tool": "add", "arguments": {"a": "one", "b": 1}},))
    with pytest.raises(ValueError, match=r"the solution of example \w+ does not run"):
        oracle(broken, run)


# --- the command -----------------------------------------------------------------------------------------------


def tiny(out, *flags):
    return main(["--suite", "tiny", "--size", "5", "--out", str(out), *flags])


def test_fill_then_fill_more(tmp_path, capsys):
    assert tiny(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 records, 5 of them new; 5 correct, 0 rejected\n"
    five = (tmp_path / "records.jsonl").read_bytes()
    assert tiny(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 records, 0 of them new; 5 correct, 0 rejected\n"
    assert (tmp_path / "records.jsonl").read_bytes() == five
    assert tiny(tmp_path, "--size", "8", "--seed", "3") == 0
    assert (tmp_path / "records.jsonl").read_bytes().startswith(five)
    cache = open_cache(tmp_path)
    cache.covers(load_suite("tiny", split="train", size=5, seed=0) + load_suite("tiny", split="train", size=8, seed=3))
    assert cache.manifest.command == ("--suite", "tiny", "--source", "oracle", "--size", "8", "--seed", "3")


def test_after_a_kill_in_the_middle_of_a_line(tmp_path, caplog):
    assert tiny(tmp_path) == 0
    file = tmp_path / "records.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"records.jsonl is cut short after line 4"):
        open_cache(tmp_path)
    assert tiny(tmp_path) == 0
    assert file.read_bytes() == whole
    dropped = len(whole.splitlines()[-1]) - 9
    assert caplog.messages == [f"{file}: dropped {dropped} bytes of an unfinished last line"]
    assert len(open_cache(tmp_path)) == 5


def test_another_source_is_refused(tmp_path, capsys):
    assert tiny(tmp_path) == 0
    assert tiny(tmp_path, "--source", "local", "--student", "tiny") == 2
    error = f"error: {tmp_path} was filled with teacher 'oracle', not 'local:tiny'; choose another --out.\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--suite", "nope"], "error: There is no task suite 'nope'"),
        (["--suite", "nope.jsonl"], "error: There is no file nope.jsonl"),
        (["--source", "endpoint"], "error: --source endpoint needs --base-url and --model.\n"),
        (["--source", "local"], "error: --source local needs --student: a folder, a hub id, or smollm2-135m.\n"),
        (["--max-turns", "0"], "error: --max-turns is 0; it must be at least 1.\n"),
        (["--source", "local", "--max-new-tokens", "0"], "error: --max-new-tokens is 0; it must be at least 1.\n"),
        (["--concurrency", "0"], "error: --concurrency is 0; it must be at least 1.\n"),
        (["--temperature", "nan"], "error: --temperature is nan; it must be at least 0.\n"),
        (["--requests-per-minute", "nan"], "error: --requests-per-minute is nan; it must be at least 0.\n"),
        (["--temperature", "inf"], "error: --temperature is inf; it must be finite.\n"),
    ],
)
def test_a_user_error_is_one_sentence(tmp_path, capsys, flags, sentence):
    assert tiny(tmp_path, *flags) == 2
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize("at", [1, 3])
def test_ctrl_c_keeps_what_was_answered(tmp_path, capsys, monkeypatch, at):
    """Also before anything was."""
    asked = []

    def interrupted(example, run):
        asked.append(example)
        if len(asked) == at:
            raise KeyboardInterrupt
        return oracle(example, run)

    monkeypatch.setattr(teach, "oracle", interrupted)
    assert tiny(tmp_path) == 130
    assert capsys.readouterr().err.startswith("stopped; finished records are kept")
    assert open_cache(tmp_path).manifest.records == at - 1
    assert tiny(tmp_path) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 5 records, {6 - at} of them new; 5 correct, 0 rejected\n"


def test_a_run_goes_on_with_a_first_fill_that_was_interrupted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path))
    config = dataclasses.replace(PRESETS["tiny"], train_size=5, levels=(1,))
    examples = load_suite("tiny", split="train", size=5, seed=0, levels=(1,))
    fills = []

    def interrupted(command, check):
        fills.append(command)
        with monkeypatch.context() as patched:
            if len(fills) == 1:
                patched.setattr(teach, "oracle", lambda e, run: oracle(e, run) if e in examples[:3] else 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    main(command[3:])
                return SimpleNamespace(returncode=130)
            return SimpleNamespace(returncode=main(command[3:]))

    monkeypatch.setattr(training.subprocess, "run", interrupted)
    with pytest.raises(UserError, match="could not be filled"):
        training.open_teacher(config, examples, print)
    for _ in range(2):
        assert len(training.open_teacher(config, examples, print)) == 5
    assert len(fills) == 2
    assert "5 records, 2 of them new" in capsys.readouterr().out


def test_unknown_flags_are_errors(tmp_path):
    with pytest.raises(SystemExit) as caught:
        tiny(tmp_path, "--sise", "3")
    assert caught.value.code == 2


def test_the_command_is_told_in_full():
    options = Options(Path("x"), suite="math", size=2000, levels=(1, 2), max_turns=3)
    assert command(options) == ["--suite", "math", "--source", "oracle", "--levels", "1", "2", "--max-turns", "3"]


def test_the_users_own_tasks_are_no_work_for_the_oracle(tmp_path, capsys):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"question": "What is 2 * 3?", "answer": "6", "tools": ["multiply"]}\n')
    assert main(["--suite", str(tasks), "--out", str(tmp_path / "cache")]) == 2
    assert capsys.readouterr().err.startswith("error: The oracle needs built-in tasks")


def test_training_does_not_import_it():
    for file in [*ROOT.rglob("*.py"), ROOT.parent / "train.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"teach", "lite_mentor.teach"} & set(names), file


# --- a model on this machine -----------------------------------------------------------------------------------


def test_a_random_student_teaches_nothing(tmp_path, capsys, monkeypatch):
    flags = ["--source", "local", "--student", "tiny", "--max-new-tokens", "40", "--concurrency", "3"]
    assert tiny(tmp_path, *flags) == 0
    assert capsys.readouterr().out.endswith("5 records, 5 of them new; 0 correct, 5 rejected\n")
    cache = open_cache(tmp_path)
    assert (len(cache), cache.rejected, cache.manifest.teacher) == (0, 5, "local:tiny")
    decoding = dict(cache.manifest.decoding)
    assert (decoding.pop("date"), len(decoding.pop("prompt"))) == (str(datetime.date.today()), 16)
    assert decoding == {"temperature": 0.0, "max_turns": 8, "max_new_tokens": 40}
    with pytest.raises(UserError, match=r"\(local:tiny\) answered none of the 5 examples correctly"):
        cache.usable(load_suite("tiny", split="train", size=5, seed=0))
    monkeypatch.setattr(prompt, "datetime", SimpleNamespace(date=SimpleNamespace(today=lambda: "2031-01-01")))
    assert tiny(tmp_path, *flags) == 0  # under the day on which the cache was begun
    assert "0 of them new" in capsys.readouterr().out
    monkeypatch.setattr(Chat, "fingerprint", lambda self: "another template")
    assert tiny(tmp_path, *flags) == 2
    assert "was filled with decoding" in capsys.readouterr().err
