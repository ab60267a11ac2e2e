"""The programme of stages: its budget, what a stage that fails costs, and that every command of its plans exists."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench import all as everything
from bench import caps, kernels, rollout
from bench.__main__ import COMMANDS
from bench.__main__ import main as bench_main
from bench.stages import Programme, Stage
from lite_mentor.config import PRESETS, parse

ROOT = Path(__file__).parent.parent


def stage(name: str, code: str, limit: float = 60, **how) -> Stage:
    return Stage(name, (sys.executable, "-c", code), limit, **how)


def run(tmp_path: Path, *lanes: list[Stage], seconds: float = 60) -> dict[str, dict]:
    """By stage, what summary.json says."""
    programme = Programme(tmp_path / "out", tmp_path / "work", {"command": "test"}, time.monotonic() + seconds)
    programme.run(lanes)
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    return {row["stage"]: row for row in found["stages"]}


LEAVES = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
"""A stage that ends before a process that it started."""
HANGS = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far', flush=True); raise SystemExit(7)"


@pytest.fixture
def in_the_background():
    """As in a job that a shell started with `&`, which is deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stage_that_fails_or_hangs_costs_itself_alone(tmp_path, in_the_background):
    found = run(
        tmp_path,
        [stage("fails", "print('why'); raise SystemExit(3)"), stage("hangs", HANGS, 8), stage("after", "print('x')")],
        [stage("leaves", LEAVES), Stage("absent", ("/nonexistent/program",), 5)],
        [stage("needs", "", needs=("json", "no_such_package")), stage("shows", "print('a\\nb\\nc')", show=2)],
    )
    statuses = {name: row["status"] for name, row in found.items()}
    assert statuses.pop("absent").startswith("could not start")
    assert statuses == {
        "fails": 3, "hangs": "stopped after 8 s", "after": 0, "leaves": 0, "needs": "needs no_such_package", "shows": 0,
    }  # fmt: skip
    assert found["fails"]["lines"] == ["why"]
    assert found["hangs"]["lines"] == ["so far"]  # interrupted first, so that it can say how far it came
    assert found["after"]["lines"] == []
    assert found["shows"]["lines"] == ["b", "c"]
    summary, log = ((tmp_path / "out" / name).read_text() for name in ("summary.md", "log.txt"))
    assert "| hangs | stopped after 8 s |" in summary
    assert "    why\n" in summary
    assert "===== fails: 3" in log
    left = f"/proc/{(tmp_path / 'work' / 'leaves.txt').read_text().strip()}/exe"
    limit = time.monotonic() + 30  # of the 60 that it would live: a kill takes its time
    while os.path.exists(left):
        assert time.monotonic() < limit


def test_the_budget_is_kept_and_what_does_not_fit_is_said(tmp_path):
    begin = time.monotonic()
    found = run(tmp_path, [stage("long", HANGS), stage("late", "print('never')")], seconds=6)
    assert time.monotonic() - begin < 30  # of the 60 that it would hang
    assert found["long"]["status"] == "stopped after 6 s"
    assert found["late"]["status"] == "no time"
    assert not (tmp_path / "work" / "late.txt").exists()


def test_files_are_packed_without_weights(tmp_path):
    code = "import pathlib, sys; [pathlib.Path(sys.argv[1], n).write_text('1') for n in ('a.json', 'b.safetensors')]"
    work = tmp_path / "work"
    run(tmp_path, [Stage("writes", (sys.executable, "-c", code, str(work)), 60)])
    with tarfile.open(tmp_path / "out" / "files.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["a.json", "writes.txt"]


ENDED = """
import sys
from bench import all as everything
from bench.stages import Stage
lane = [Stage("hangs", (sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"), 60)]
everything.on_a_cpu = lambda work, small: {"works": [lane], "fast": [], "learns": []}
everything.main(["--small", "--out", sys.argv[1]])
"""


def test_what_runs_ends_with_the_programme(tmp_path):
    """As where a machine is taken back."""
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels"))),
    }
    command = [sys.executable, "-c", ENDED, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    limit, pid = time.monotonic() + 60, ""
    while not pid and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.2)
        pid = "".join(path.read_text().strip() for path in tmp_path.glob("lite-mentor-bench-*/hangs.txt"))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert pid, error
    while os.path.exists(f"/proc/{pid}/exe"):
        assert time.monotonic() < limit + 30


@pytest.mark.slow
def test_the_whole_programme_in_small_keeps_its_budget(tmp_path):
    """How much of it ends well depends on what else runs here; the first stage does, and all are accounted for."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "bench", "all", "--small", "--seconds", "18", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "LITE_MENTOR_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert time.monotonic() - begin < 30
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert [row["stage"] for row in rows] == ["facts", "kernels", "micro", "step", "rollout"], ended.stderr
    assert rows[0]["status"] == 0
    late = {"no time", "stopped"}
    wrong = [row for row in rows if row["status"] != 0 and not any(word in str(row["status"]) for word in late)]
    assert wrong == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "files.tar.gz", "log.txt", "summary.json", "summary.md",
    }  # fmt: skip


def test_a_folder_with_results_and_an_unknown_part_are_refused(tmp_path, capsys):
    (tmp_path / "summary.md").write_text("of another run")
    assert bench_main(["all", "--out", str(tmp_path)]) == 2
    assert "already holds files" in capsys.readouterr().err
    assert bench_main(["all", "--small", "--out", str(tmp_path / "new"), "--parts", "works", "nothing"]) == 2
    assert "--parts nothing: here are works fast learns, and facts kernels" in capsys.readouterr().err


def test_parts_are_groups_or_stages(tmp_path):
    lanes = everything.on_a_gpu(tmp_path)
    assert tuple(lanes) == everything.GROUPS
    found = everything.chosen(lanes, ["fast", "caps-8gb"])
    assert [s.name for lane in found["learns"] for s in lane] == ["caps-8gb"]
    assert found["fast"] == lanes["fast"]
    assert not any(found["works"])


def stages_of(plan: everything.Lanes) -> list[Stage]:
    return [s for group in plan.values() for lane in group for s in lane]


@pytest.mark.parametrize("where", ["gpu", "cpu", "small"])
def test_every_command_of_a_plan_is_one_that_parses(tmp_path, where):
    plan = everything.on_a_gpu(tmp_path) if where == "gpu" else everything.on_a_cpu(tmp_path, small=where == "small")
    stages = stages_of(plan)
    assert len({s.name for s in stages}) == len(stages)
    for s in stages:
        python, *words = s.command
        assert python == sys.executable
        if words[0].endswith("train.py"):
            parse(words[1:])
        elif words[1] == "bench":
            assert words[2] in COMMANDS
            if words[2] == "step":
                parse(words[3:])
            if words[2] == "rollout":
                rollout.parse(words[3:])
            if words[2] == "kernels":
                kernels.tyro.cli(kernels.Options, args=words[3:])
        else:
            assert words[:2] == ["-m", "pytest"]


def test_the_gpu_tests_are_all_of_them_in_order_of_worth(tmp_path):
    files = [Path(word).name for word in everything.gpu_tests(tmp_path) if word.endswith(".py")]
    assert files[:4] == ["test_no_sync.py", "test_exactness.py", "test_varlen.py", "test_gather_rows.py"]
    assert {"test_bench.py", "test_sample.py", "test_group_advantage.py"} <= set(files)
    assert "test_reward.py" not in files
    assert len(set(files)) == len(files)


def test_every_preset_that_names_a_card_is_proven():
    assert set(everything.CARDS) == set(caps.CARDS) == {name for name in PRESETS if name.endswith("gb")}
    assert all(name == f"{gib}gb" for name, (gib, _) in caps.CARDS.items())
