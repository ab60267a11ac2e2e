"""Evaluation: nothing is left out of the count, runs are compared on the same examples, adapters are told apart."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os

import pytest
import torch
from sample_tools import no_module

import train
from lite_mentor import evaluate as room
from lite_mentor import label
from lite_mentor.config import PRESETS
from lite_mentor.errors import UserError
from lite_mentor.evaluate import suites
from lite_mentor.load import load_student
from lite_mentor.prompt import Chat
from lite_mentor.run import training_examples
from lite_mentor.statistics import compare
from tests.test_train import SHORT


def test_held_out_suites_never_depend_on_the_seed():
    one, two = (suites(dataclasses.replace(PRESETS["tiny"], seed=s, eval_size=10), no_module) for s in (0, 1))
    assert {n: [e.key for e in v] for n, v in one.items()} == {n: [e.key for e in v] for n, v in two.items()}
    assert [len(v) for v in one.values()] == [10, 5, 5]


def test_a_run_says_how_much_of_a_file_it_does_not_use(tmp_path):
    rows = [{"question": f"What is {n} plus 2?", "answer": n + 2, "tools": ["add"]} for n in range(300)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dataclasses.replace(
        PRESETS["tiny"], task=str(tmp_path / "mine.jsonl"), out=str(tmp_path / "run"), train_size=20, eval_size=10,
        eval_suites=("validation",),
    )  # fmt: skip
    notes = []
    assert len(suites(config, no_module, notes.append)["validation"]) == 10
    with pytest.raises(UserError, match="needs --teacher"):
        training_examples(config, tmp_path, no_module, notes.append)
    assert [note.split()[-4] for note in notes] == ["--eval-size", "--train-size"]


def test_only_the_same_examples_are_compared():
    before = {"keys": ["a", "b"], "correct": [0, 1]}
    assert compare(before, {"keys": ["a", "b"], "correct": [1, 1]})[0] == 0.5
    assert compare(before, {"keys": ["a", "c"], "correct": [1, 1]}) is None
    asked = before | {"facts": "x"}
    assert compare(asked, asked)[0] == 0
    assert compare(asked, asked | {"facts": "y"}) is None


def test_the_command_compares_the_cold_start_with_the_final_adapter(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    assert train.main([*SHORT, "--steps", "1", "--out", str(out)]) == 0
    capsys.readouterr()
    assert room.main([str(out), "--size", "8"]) == 0
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("validation cold_start: ")
    assert second.startswith("validation adapter: ")
    assert "paired bootstrap" in second
    rows = [json.loads(line) for line in (out / "evaluate.jsonl").read_text().splitlines()]
    assert [(r["name"], r["n"]) for r in rows] == [("cold_start", 8), ("adapter", 8)]

    monkeypatch.setattr(room, "evaluate", None)  # what was evaluated is not evaluated again
    assert room.main([str(out), "--size", "8"]) == 0
    assert capsys.readouterr().out.strip().splitlines() == [first, second]
    with pytest.raises(TypeError):
        room.main([str(out), "--size", "8", "--samples", "2"])
    for owner, name in ((room, "facts_of"), (Chat, "fingerprint")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda _: "another")
            with pytest.raises(TypeError):
                room.main([str(out), "--size", "8"])


def test_a_student_is_told_the_same_day_in_all_evaluations_of_a_folder(tmp_path, capsys, monkeypatch):
    command = [str(tmp_path), "--student", "tiny", "--preset", "tiny", "--adapters", "none", "--size", "2"]
    assert room.main(command) == 0
    file = tmp_path / "evaluate.jsonl"
    row = json.loads(file.read_text())
    assert row["date"] == str(datetime.date.today())
    file.write_text(json.dumps(row | {"date": "2026-12-01"}) + "\n")
    assert room.main([*command, "--suites", "validation", "test"]) == 0
    assert [json.loads(line)["date"] for line in file.read_text().splitlines()] == ["2026-12-01"] * 2


def test_a_student_without_a_run_is_sampled_and_passes_at_k(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path / "cache"))
    right = iter([1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    monkeypatch.setattr(room, "_is_right", lambda chat, rollout, example: next(right))
    command = [str(tmp_path / "out"), "--student", "tiny", "--preset", "tiny", "--adapters", "none", "--size", "3"]
    assert room.main([*command, "--samples", "4"]) == 0
    # pass@2 by hand: 1 - C(3, 2) / C(4, 2) = 1/2, 0 and 1; pass@4 is 1, 0 and 1.
    said = capsys.readouterr().out
    assert "validation none: 41.7% of 3 (95 % interval 0.0% to 100.0%); pass@2 50.0%; pass@4 66.7%\n" in said
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "evaluate.jsonl").read_text().splitlines()]
    assert row["correct"] == [1, 0, 4]
    assert (row["samples"], row["temperature"], row["pass@4"]) == (4, 1.0, pytest.approx(2 / 3))


def test_the_base_after_an_adapter_is_the_base(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LITE_MENTOR_CACHE", str(tmp_path / "cache"))
    student = load_student("tiny", quant="none", dtype="fp32", lora_rank=64, lora_alpha=64)
    with torch.no_grad():
        for tensor in student.adapter_state().values():
            tensor.add_(0.5)
    student.save_adapter(tmp_path / "other")
    command = [str(tmp_path / "out"), "--student", "tiny", "--preset", "tiny", "--size", "2"]
    assert room.main([*command, "--adapters", "none", str(tmp_path / "other"), "none"]) == 0
    first, _, again = capsys.readouterr().out.strip().splitlines()
    assert again.startswith(first)
    rows = [json.loads(line) for line in (tmp_path / "out" / "evaluate.jsonl").read_text().splitlines()]
    assert [r["name"] for r in rows] == ["none", str(tmp_path / "other")]  # the third was read from the first
    assert rows[0]["weights"] != rows[1]["weights"]


RESULT = {"name": "x", "suite": "test", "n": 1, "accuracy": 1.0, "ci95": [0.2, 1.0], "keys": ["a"], "correct": [1],
          "date": "2026-12-01", "pass@2": 1.0}  # fmt: skip


@pytest.mark.parametrize("cut", [b"", b'{"na', b"{}\n", b"\xff\n", b"[" * 100_000 + b"\n"])
def test_a_result_is_kept_beside_lines_that_are_none(tmp_path, cut):
    file = tmp_path / "evaluate.jsonl"
    file.write_bytes(cut)
    room._keep(RESULT, file)
    assert room._results(file) == [RESULT]
    assert file.read_bytes().startswith(cut)


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", None), ("accuracy", "1"), ("ci95", [1]), ("keys", ["a", "b"]), ("correct", [1, 1]), ("date", 5),
     ("date", "\x1b"), ("pass@2", "all"), ("name", 1), ("suite", [])],
)  # fmt: skip
def test_a_line_of_another_format_is_no_result(tmp_path, field, value):
    file = tmp_path / "evaluate.jsonl"
    without = {k: v for k, v in RESULT.items() if k != field}
    file.write_text(json.dumps({**RESULT, field: value}) + "\n" + (json.dumps(without) + "\n") * (field != "pass@2"))
    assert room._results(file) == []


@pytest.mark.parametrize(
    ("setting", "value", "sentence"),
    [("max_turns", 0, "--max-turns is 0"), ("lora_rank", 0, "--lora-rank is 0"), ("cache_gib", -3.0, "--cache-gib"),
     ("device", "meta", "--device"), ("date", "xxxxxxxxxx", "--date"), ("levels", [], "--levels is empty"),
     ("backend", "triton", "--backend triton needs a GPU")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_the_student_is_loaded(
    tmp_path, capsys, monkeypatch, setting, value, sentence
):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(room, "load_student", None)
    monkeypatch.setattr("lite_mentor.loss.interpreted", lambda: False)
    settings = {**PRESETS["tiny"].asdict(), "device": "cpu", setting: value}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert room.main([str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_what_only_the_update_reads_is_no_reason_to_refuse(tmp_path):
    settings = {**PRESETS["tiny"].asdict(), "device": "cpu", "micro_tokens": 400, "drop_mass": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert room._config(room.Options(tmp_path, max_prompt_tokens=2000)).max_prompt_tokens == 2000


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_results_are_kept_in_a_file_of_this_folder(tmp_path):
    file, outside = tmp_path / "evaluate.jsonl", tmp_path / "outside"
    assert room._results(file) == []
    file.symlink_to(outside)
    with pytest.raises(UserError, match=r"evaluate.jsonl cannot be written \(it is a link\)"):
        room._keep({}, file)
    assert not outside.exists()
    file.unlink()
    os.mkfifo(file)
    for use in (lambda: room._results(file), lambda: room._keep({}, file)):
        with pytest.raises(UserError, match="it is not a file"):
            use()


def test_an_interrupt_is_no_traceback(tmp_path, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "_config", interrupted)
    assert room.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "stopped; what is finished is kept: run the same command again to go on\n"
    monkeypatch.setattr(label, "parse", interrupted)
    assert label.main(["--model", "x"]) == 130
    assert capsys.readouterr().err == "stopped; nothing was written\n"


def test_what_can_be_wrong_is_one_sentence(tmp_path, capsys):
    assert room.main([str(tmp_path)]) == 2
    assert "there is no config.json" in capsys.readouterr().err
    assert room.main([str(tmp_path), "--student", "tiny", "--preset", "nope"]) == 2
    assert "there is no such preset" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert room.main([str(tmp_path / "file" / "x"), "--student", "tiny"]) == 2
    assert "cannot be made (Not a directory)" in capsys.readouterr().err
    assert room.main([str(tmp_path), "--student", "tiny", "--samples", "0"]) == 2
    assert "take one sample or more" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="its kinds of files")
@pytest.mark.parametrize("flags", [[], ["--student", "tiny", "--preset", "tiny"]], ids=["a run", "a student"])
def test_a_folder_that_leads_elsewhere_is_refused(tmp_path, capsys, flags):
    (tmp_path / "evaluate.jsonl").symlink_to(tmp_path / "theirs")
    assert room.main([str(tmp_path), *flags]) == 2
    assert "evaluate.jsonl is a symbolic link" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()
