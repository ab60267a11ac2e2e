"""Kill a run at random moments, resume it until it ends, and compare it with one that nobody killed.

Every trainer is a process of its own that runs train.main on real files and dies by SIGKILL. It is forked from this
one, which has imported everything already; its global random generators start from the system's entropy, and the run
that it is compared with comes from a fresh interpreter, so that nothing agrees by inheritance.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import train
from lite_mentor.errors import UserError
from lite_mentor.log import LINES

FLAGS = [
    "--preset", "tiny", "--device", "cpu", "--sft-steps", "6", "--sft-batch", "8", "--prompts-per-step", "4",
    "--group-size", "4", "--eval-size", "4", "--train-size", "60", "--max-new-tokens", "48", "--max-turns", "2",
    "--lora-rank", "4", "--temperature", "1.5", "--micro-tokens", "320",
]  # fmt: skip
UNEQUAL = ("time/", "memory/")
"""Metrics in which equal runs differ."""
EXACT = (".safetensors", "adapter_config.json")
"""Files that equal runs write byte for byte, but for the states of random generators."""
MOST_SAVE_SECONDS = 0.02
"""A kill that is aimed at a save comes this long after its first file at the latest."""
ORPHAN_SECONDS = 10.0
"""A killed trainer's own workers must have ended by then."""


def soak(out: Path, *, kills: int, seed: int, flags: Sequence[str]) -> dict:
    """Kill `kills` times, half of them at a random moment of the run and half aimed at one of its saves.

    Returns the counts, every kill, and every difference found; folders of runs that did not end exactly are kept.
    """
    generator = random.Random(seed)
    _adopt_orphans()
    flags = [*FLAGS, *flags]
    _fresh(out / "uninterrupted", flags)
    begin = time.monotonic()
    end(start([*flags, "--out", str(out / "warm")], out / "warm.txt"), out / "warm.txt")
    wall = time.monotonic() - begin
    unequal = {"warm": differences(out / "uninterrupted", out / "warm")}
    struck: list[dict] = []
    runs = 0
    while len(struck) < kills:
        name = f"run-{runs:03d}"
        unequal[name] = _chain(out / name, flags, wall, kills, generator, struck)
        unequal[name] += differences(out / "uninterrupted", out / name)
        if not unequal[name]:
            shutil.rmtree(out / name)
        runs += 1
        print(f"{len(struck)} kills, {runs} runs, {sum(map(bool, unequal.values()))} unequal", flush=True)
    return {
        "kills": len(struck),
        "kills_by_place": dict(Counter(kill["place"] for kill in struck)),
        "runs_killed": runs,
        "ends_exact": sum(not found for name, found in unequal.items() if name != "warm"),
        "orphans": sum(kill["orphans"] for kill in struck),
        "differences": {name: found for name, found in unequal.items() if found},
        "uninterrupted": _about(out / "uninterrupted", wall),
        "each_kill": struck,
    }


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not have in common, but for times, memory and the names of their folders.

    The checkpoints' global random generators are left out: nothing draws from them, and they start from entropy here.
    """
    found = [name for name in LINES if _rows(one / name) != _rows(other / name)]
    for folder in ("cold_start", "adapter", "best", "checkpoints"):
        mine, its = (sorted(str(p.relative_to(run)) for p in (run / folder).rglob("*")) for run in (one, other))
        found += sorted({*mine} ^ {*its})
        exact = [name for name in mine if name.endswith(EXACT) and not name.endswith("rng.safetensors")]
        found += [name for name in exact if name in its and (one / name).read_bytes() != (other / name).read_bytes()]
        states = [name for name in mine if name.endswith("state.json") and name in its]
        found += [name for name in states if _state(one / name) != _state(other / name)]
    return found + sorted({p.name for p in one.iterdir()} ^ {p.name for p in other.iterdir()})


def _rows(path: Path) -> list[dict]:
    lines = path.read_bytes().decode().split("\n")
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(UNEQUAL)} for line in lines[:-1]] + lines[
        -1:
    ]


def _state(path: Path) -> dict:
    """Without the place in the log, which counts the digits of times, the folder's names, and random generators."""
    state = json.loads(path.read_bytes())
    state["config"] = {k: v for k, v in state["config"].items() if k not in ("out", "resume")}
    return {k: v for k, v in state.items() if k not in ("log", "rng")}


def _about(run: Path, wall: float) -> dict:
    rows = _rows(run / "metrics.jsonl")[:-1]
    return {
        "seconds": round(wall, 2),
        "supervised_steps": sum(row["phase"] == "sft" for row in rows),
        "rl_steps": sum(row["phase"] == "rl" for row in rows),
        "rl_steps_that_learned": sum(row["phase"] == "rl" and row["grad_norm"] is not None for row in rows),
    }


# --- one run, killed until it ends ------------------------------------------------------------------------------


def _chain(out: Path, flags: list[str], wall: float, kills: int, generator: random.Random, struck: list) -> list[str]:
    """Start and kill until the run ends by itself; what went wrong on the way, if anything did."""
    text = out.with_suffix(".txt")
    while True:
        resumed = (out / "config.json").exists()
        pid = start(["--resume", str(out)] if resumed else [*flags, "--out", str(out)], text)
        aim = "save" if len(struck) % 2 else "moment"
        begin = time.monotonic()
        if len(struck) == kills:
            alive = True
        elif aim == "moment":
            alive = _wait(pid, generator.uniform(0, wall))
        else:
            alive = _wait_for_save(pid, out / "checkpoints", generator.randint(1, 3))
            alive = alive and _wait(pid, generator.uniform(0, MOST_SAVE_SECONDS))
        if not alive or len(struck) == kills:
            end(pid, text)
            _orphans()
            text.unlink()
            return []
        os.kill(pid, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            continue  # it ended by itself just then; the next start finds a finished run
        seconds = round(time.monotonic() - begin, 3)
        struck.append({"run": out.name, "aim": aim, "seconds": seconds, "place": _place(out), "orphans": _orphans()})


def _place(out: Path) -> str:
    """Where in the run a kill fell, by what is on disk."""
    if not (out / "config.json").exists():
        return "before the run had a folder"
    checkpoints = list((out / "checkpoints").iterdir()) if (out / "checkpoints").exists() else []
    if any(path.name.startswith(".tmp-") for path in checkpoints):
        return "in a save"
    if not checkpoints:
        return "before the first checkpoint" if _rows(out / "metrics.jsonl")[:-1] else "before the first step"
    return "after the last step" if (out / "adapter").exists() else "between saves"


# --- processes --------------------------------------------------------------------------------------------------


def _fresh(out: Path, flags: list[str]) -> None:
    """The whole run in a fresh interpreter, whose strings hash otherwise than ours."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "1234", "PYTHONPATH": path}
    with open(out.with_suffix(".txt"), "wb") as text:
        command = [sys.executable, str(root / "train.py"), *flags, "--out", str(out)]
        done = subprocess.run(command, env=environment, stdout=text, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise UserError(f"The uninterrupted run failed; see {out.with_suffix('.txt')}.")


def start(argv: list[str], text: Path, before: Callable[[], None] = lambda: None) -> int:
    """Fork a trainer that writes to the file `text`, and calls `before` first -> its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        random.seed()
        np.random.seed()
        torch.seed()
        before()
        status = train.main(argv)
    except BaseException:  # a fork must never return into its parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, seconds: float) -> bool:
    """Is the process still alive after so many seconds?"""
    deadline = time.monotonic() + seconds
    while _alive(pid):
        left = deadline - time.monotonic()
        if left <= 0:
            return True
        time.sleep(min(left, 0.005))
    return False


def _wait_for_save(pid: int, folder: Path, nth: int) -> bool:
    """Wait until the process has begun its n-th save; False when it ends before that."""
    stale = _unfinished(folder)  # of a save that an earlier kill cut short
    seen: set[tuple[str, int]] = set()
    while _alive(pid):
        seen |= _unfinished(folder) - stale
        if len(seen) >= nth:
            return True
        time.sleep(0.0005)
    return False


def _unfinished(folder: Path) -> set[tuple[str, int]]:
    """The checkpoints that are not whole yet, by name and inode: the same step may be saved again."""
    if not folder.exists():
        return set()
    with os.scandir(folder) as entries:
        return {(entry.name, entry.inode()) for entry in entries if entry.name.startswith(".tmp-step-")}


def _alive(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def end(pid: int, text: Path) -> None:
    """Wait for a trainer that must end well."""
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        last = (text.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"A trainer that was not killed failed; {text} ends with: {last}")


def _adopt_orphans() -> None:
    """Let the workers of a killed trainer become children of this process, so that they can be counted."""
    pr_set_child_subreaper = 36
    if not sys.platform.startswith("linux") or ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0):
        raise UserError("The kills need Linux: elsewhere nobody can tell whether a killed run leaves workers behind.")


def _orphans() -> int:
    """How many of the workers that ended trainers left behind outlive them; those are killed here."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in map(int, children):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children)
