"""A few hundred generated cases of everything that `python -m bench fuzz` attacks, and the fuzzer against itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import pytest

from bench import fuzz, hostile
from bench.__main__ import main as bench_main
from bench.hostile import Target

CASES = {"calls": 400, "answers": 30, "prompts": 120, "episodes": 64, "bfcl": 200}
"""Of the others: 120."""


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_nothing_breaks(name):
    row, failures = fuzz.attack(name, fuzz.TARGETS[name], CASES.get(name, 120), seed=1)
    assert failures == []
    assert row["cases"] >= CASES.get(name, 120)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_case_can_be_kept_and_drawn_again(name):
    for number in range(20):
        case = fuzz.TARGETS[name].make(Random(f"{name}/1/{number}"))
        again = fuzz.TARGETS[name].make(Random(f"{name}/1/{number}"))
        assert json.dumps(json.loads(json.dumps(case))) == json.dumps(again)


def test_what_breaks_and_what_hangs_is_counted_and_kept(tmp_path, monkeypatch, capsys):
    def check(case: int, folder: Path) -> None:
        if case == 7:
            raise ZeroDivisionError("seven")
        while case == 8:
            time.sleep(0)

    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.05)
    monkeypatch.setattr(fuzz, "TARGETS", {"broken": Target(lambda rng: rng.randrange(10), check)})
    with pytest.raises(SystemExit) as stop:
        bench_main(["fuzz", "--cases", "30", "--out", str(tmp_path)])
    assert stop.value.code == 1
    (row,) = json.loads((tmp_path / "fuzz.json").read_text())["results"]
    kept = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("broken-*.json"))]
    assert {(f["case"], f["error"]) for f in kept} == {(7, "ZeroDivisionError: seven"), (8, "Hang: more than 0.05 s")}
    assert (row["cases"], row["crashes"]) == (30, len(kept))
    assert f"| broken | 30 | {len(kept)} |" in (tmp_path / "fuzz.md").read_text()
    assert all(Random(f"broken/0/{f['number']}").randrange(10) == f["case"] for f in kept)


def test_a_sound_run_ends_well_and_shares_out_its_cases(tmp_path, monkeypatch):
    quiet = Target(lambda rng: 0, lambda case, folder: None)
    targets = {"many": Target(quiet.make, quiet.check, share=3.0), "batches": Target(quiet.make, quiet.check, holds=4)}
    monkeypatch.setattr(fuzz, "TARGETS", targets)
    assert bench_main(["fuzz", "--cases", "20", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "fuzz.json").read_text())["results"]
    assert [(row["target"], row["cases"]) for row in rows] == [("many", 15), ("batches", 8)]
    assert bench_main(["fuzz", "--cases", "0", "--out", str(tmp_path)]) == 2


def test_changes_are_small_and_seeded():
    sound = '{"a": [1, {"b": "text"}]}'
    changes = {hostile.changed(Random(i), sound) for i in range(100)}
    assert len(changes) > 60
    assert changes == {hostile.changed(Random(i), sound) for i in range(100)}
    assert json.loads(sound) == {"a": [1, {"b": "text"}]}
    node = json.loads(sound)
    assert any(hostile.changed_json(Random(i), node) != node for i in range(10))
    assert node == json.loads(sound)  # the sound one stays sound
