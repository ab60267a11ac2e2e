"""What `python -m bench soak` does at length, in small: kills, flipped bits, and steps that leave nothing behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import flips, growth
from bench.__main__ import main as bench_main
from bench.kills import differences
from lite_mentor.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="only there can the workers of a killed run be counted")
def test_killed_runs_end_as_the_one_that_nobody_killed(tmp_path):
    # In a process of its own, for it forks; the second kill is aimed at a save.
    flags = ["--kills", "2", "--rl-steps", "2", "--save-every", "1", "--out", str(tmp_path / "soak")]
    environment = os.environ | {"PYTHONPATH": f".{os.pathsep}kernels", "LITE_MENTOR_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bench", "soak", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "soak" / "soak.json").read_text())["kills"]
    assert found["kills"] == 2
    assert [kill["aim"] for kill in found["each_kill"]] == ["moment", "save"]
    assert found["ends_exact"] == found["runs_killed"] >= 1
    assert (found["differences"], found["orphans"]) == ({}, 0)
    assert found["uninterrupted"]["supervised_steps"] == 6
    assert f"| of these ended exactly as the one that nobody killed | {found['runs_killed']} |" in done.stdout
    assert_differences_are_seen(tmp_path / "soak" / "uninterrupted", tmp_path / "soak" / "warm")


def assert_differences_are_seen(one: Path, other: Path) -> None:
    """The comparison is worth something only if it can fail. (Without damage it says that equal seeds run alike.)"""
    assert differences(one, other) == []
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    adapter = other / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"?")
    state = next((other / "checkpoints").glob("*/state.json"))
    state.write_text(state.read_text().replace('"refused_in_a_row": 0', '"refused_in_a_row": 1'))
    (other / "checkpoints" / ".tmp-000009-1").mkdir()
    assert differences(one, other) == [
        "metrics.jsonl",
        "adapter/adapter_model.safetensors",
        "checkpoints/.tmp-000009-1",
        str(state.relative_to(other)),
    ]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITE_MENTOR_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_every_flip_cut_and_removal_is_refused_and_named(tmp_path, cache, capsys):
    flags = ["--flips", "34", "--rl-steps", "1", "--save-every", "1", "--out", str(tmp_path / "soak")]
    assert bench_main(["soak", *flags]) == 0
    rows = json.loads((tmp_path / "soak" / "soak.json").read_text())["flips"]
    assert [(r["what"], r["damage"], r["tried"]) for r in rows] == [
        (what, damage, tried or files)
        for what, files in (("checkpoint", 5), ("a run's lines", 3), ("teacher's cache", 2))
        for damage, tried in (("a flipped bit", 34), ("cut short", 34), ("removed", None))
    ]
    assert all(r["tried"] == r["found"] == r["named"] for r in rows)
    assert "| checkpoint | a flipped bit | 5 | 34 | 34 | 34 |" in capsys.readouterr().out


def test_a_reader_that_does_not_look_is_found_out(tmp_path):
    (tmp_path / "file").write_bytes(b"12345678")

    def careless() -> None:
        if not (tmp_path / "file").exists() or (tmp_path / "file").read_bytes()[:4] != b"1234":
            raise UserError("something is wrong")

    rows = flips._attack("test", [(tmp_path / "file", 8)], careless, 40, random.Random(0))
    flipped = rows[0]
    assert 0 < flipped["found"] < flipped["tried"] == 40
    assert flipped["named"] == 0
    assert flipped["missed"][0].startswith(("file was read: ", "file is not named: "))


def test_steps_leave_nothing_behind(tmp_path, cache):
    found = growth.soak(tmp_path / "run", steps=20, flags=["--sft-steps", "3"])
    assert [sample["step"] for sample in found["samples"]] == list(range(20))
    assert found["growth"]["resident_bytes"] <= found["allowed"]["resident_bytes"]
    assert {k: v for k, v in found["growth"].items() if k != "resident_bytes"} == {
        "open_files": 0, "processes": 0, "threads": 0, "pages_in_use": 0
    }  # fmt: skip
    assert found["held"]


def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert bench_main(["soak", "--kills", "1", "--out", str(tmp_path)]) == 2
    assert "already holds files" in capsys.readouterr().err
    assert bench_main(["soak", "--out", str(tmp_path / "new")]) == 2
    assert "give --kills, --flips or --steps" in capsys.readouterr().err
