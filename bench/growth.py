"""Train for long and watch what must not grow: memory, open files, processes, threads, and pages in use."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lite_mentor.config import parse
from lite_mentor.errors import UserError
from lite_mentor.run import Run, prepare
from train import train

FLAGS = [
    "--preset", "tiny", "--device", "cpu", "--sft-steps", "30", "--sft-batch", "16", "--prompts-per-step", "2",
    "--group-size", "4", "--eval-size", "2", "--train-size", "60", "--max-new-tokens", "32", "--max-turns", "2",
    "--lora-rank", "16", "--micro-tokens", "320", "--save-every", "25",
]  # fmt: skip
SAMPLES = 100
"""How often the run is looked at."""
MOST_GROWTH = {"resident_bytes": 16 << 20, "open_files": 0, "processes": 0, "threads": 0, "pages_in_use": 0}
"""How much more than after the warm-up there may be at the end. Memory is an allocator's: it comes in steps."""


def soak(out: Path, *, steps: int, flags: Sequence[str] = ()) -> dict:
    """A whole run of so many RL steps -> samples, and by how much each quantity grew.

    The first tenth is the warm-up. Growth is the median of the last tenth's samples less that of the second tenth's.
    """
    samples: list[dict] = []
    every = max(1, steps // SAMPLES)
    begin = time.monotonic()
    config = parse([*FLAGS, "--steps", str(steps), "--out", str(out), *flags])
    with prepare(config) as run:
        _after_each_step(run, lambda step: samples.append(_sample(run, step)) if step % every == 0 else None)
        train(run)
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    grew = {name: statistics.median(s[name] for s in late) - statistics.median(s[name] for s in early)
            for name in MOST_GROWTH}  # fmt: skip
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - begin),
        "early": early[0],
        "late": late[-1],
        "growth": grew,
        "allowed": MOST_GROWTH,
        "held": all(grew[name] <= most for name, most in MOST_GROWTH.items()),
        "samples": samples,
    }


def _after_each_step(run: Run, look) -> None:
    """Call `look(step)` whenever the run has logged an RL step."""
    log_step = run.log.step

    def step(metrics) -> None:
        log_step(metrics)
        if metrics["phase"] == "rl":
            look(metrics["step"])

    run.log.step = step


def _sample(run: Run, step: int) -> dict:
    """What this process holds right now; garbage and free heap are given back first."""
    if not sys.platform.startswith("linux"):
        raise UserError("Growth is read from /proc, which only Linux has.")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pool = run.engine.pool
    return {
        "step": step,
        "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "open_files": len(os.listdir("/proc/self/fd")),
        "processes": len(_children(os.getpid())),
        "threads": threading.active_count(),
        "pages_in_use": len(pool.holders) - len(pool.free) - len(run.engine.prefix_pages),
    }


def _children(pid: int) -> list[int]:
    """Children of every thread, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found + [grandchild for child in found for grandchild in _children(child)]
