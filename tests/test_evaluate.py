"""Evaluation: nothing is left out of the count, runs are compared on the same examples, adapters are told apart."""

from __future__ import annotations

import dataclasses
import json

import pytest

import train
from lite_mentor import evaluate as room
from lite_mentor.config import PRESETS
from lite_mentor.evaluate import compare, suites
from tests.test_train import SHORT


def test_held_out_suites_never_depend_on_the_seed():
    one, two = (suites(dataclasses.replace(PRESETS["tiny"], seed=s, eval_size=10)) for s in (0, 1))
    assert {n: [e.key for e in v] for n, v in one.items()} == {n: [e.key for e in v] for n, v in two.items()}
    assert [len(v) for v in one.values()] == [10, 5]


def test_only_the_same_examples_are_compared():
    before = {"keys": ["a", "b"], "correct": [0, 1]}
    assert compare(before, {"keys": ["a", "b"], "correct": [1, 1]})[0] == 0.5
    with pytest.raises(ValueError, match="not made on the same examples"):
        compare(before, {"keys": ["a", "c"], "correct": [1, 1]})


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


def test_what_can_be_wrong_is_one_sentence(tmp_path, capsys):
    assert room.main([str(tmp_path)]) == 2
    assert "there is no config.json" in capsys.readouterr().err
