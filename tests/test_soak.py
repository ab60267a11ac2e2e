"""What `python -m bench soak` does at length, in small: kills, flipped bits, and steps that leave nothing behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import faults, flips, growth
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


SMALL = ["--preset", "tiny", "--device", "cpu", "--sft-steps", "1", "--sft-batch", "2", "--prompts-per-step", "1",
         "--group-size", "2", "--eval-size", "1", "--train-size", "20", "--max-new-tokens", "8", "--max-turns", "1",
         "--lora-rank", "2", "--steps", "1", "--eval-suites", "validation"]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc which file a descriptor is")
def test_runs_that_met_a_fault_end_as_the_one_that_met_none(tmp_path, cache, capfd):
    with capfd.disabled():  # forked trainers write to the real files 1 and 2
        found = faults.soak(tmp_path, most=3, flags=SMALL)
    assert [(o["wrong"], o["part"]) for o in found["outcomes"]] == [("", faults.NEW)] * 2 + [("", faults.OPENED)]
    assert found["differences_without_a_fault"] == []
    assert {o["ended"] for o in found["outcomes"]} <= {"went on", "one sentence", "killed", "interrupted"}
    assert "1 of 1" in faults.table(found)


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc which file a descriptor is")
@pytest.mark.parametrize("kind", faults.KINDS)
def test_each_fault_comes_where_it_should(tmp_path, kind):
    """The comparison of runs is worth something only if the faults do come."""
    run = tmp_path / "run"
    injector = faults.Injector(run, faults.Fault(kind, 3), tmp_path / "points.txt")

    def child() -> None:
        injector.install()
        run.mkdir()
        with open(run / "lines", "ab", buffering=0) as file:
            first = file.write(b"12345678")
            os.write(told, f"{first} ".encode())
            for _ in range(2):
                try:
                    os.write(told, f"{file.write(b'abcd')} ".encode())
                    (run / "lines").rename(run / "renamed")
                except OSError as error:
                    os.write(told, f"{error.errno} ".encode())

    told = os.open(tmp_path / "told", os.O_WRONLY | os.O_CREAT)
    pid = os.fork()
    if not pid:
        try:
            child()
        except OSError as error:
            os.write(told, f"raised {error.errno}".encode())
        finally:
            os._exit(0)
    killed = os.waitpid(pid, 0)[1] == signal.SIGKILL
    os.close(told)
    points = (tmp_path / "points.txt").read_text().splitlines()
    assert points[:3] == ["mkdir .", "open lines", "write lines"]
    text = (run / "lines").read_text() if (run / "lines").exists() else (run / "renamed").read_text()
    assert (killed, text, (tmp_path / "told").read_text()) == {
        "a short write": (False, "1234abcdabcd", "4 4 4 2 "),
        "an I/O error": (False, "", "raised 5"),
        "a full disk": (False, "1234", "4 28 28 "),
        "a kill before": (True, "", ""),
        "a kill within": (True, "1234", ""),
        "a Ctrl-C": (False, "", ""),
    }[kind]


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
    assert "give --kills, --faults, --flips or --steps" in capsys.readouterr().err
