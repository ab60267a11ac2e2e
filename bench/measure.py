"""What the benches share: a gate that wrong results do not pass, time, memory, and the tables."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], torch.Tensor]

CACHE_BYTES = 256 << 20
"""Larger than the second-level cache of any GPU (H200: 50 MB, RTX 5090: 96 MB)."""


def compare(
    calls: dict[str, Call],
    error: Callable[[torch.Tensor], float],
    limit: float,
    floor: float,
    device: str,
    repeats: int,
) -> list[dict]:
    """One row for each candidate: its error, and if that is within `limit`, memory and the median of its turns.

    Candidates take turns, so that a machine that slows down slows all of them. On CUDA each turn begins with cold
    caches, and a second call right after it finds them warm. `floor` is the least number of seconds that the hardware
    could take.
    """
    rows = {name: {"candidate": name} for name in calls}
    for name, call in calls.items():
        try:
            rows[name]["error"] = error(call())
        except NotImplementedError as reason:
            rows[name]["problem"] = str(reason)
        except Exception as problem:  # a peer may raise anything; the table says what
            first = (str(problem).splitlines() or [""])[0][:120]
            rows[name]["problem"] = f"failed: {type(problem).__name__}: {first}"
        else:
            if not rows[name]["error"] <= limit:
                rows[name]["problem"] = "wrong, so not timed"
    sound = {name: call for name, call in calls.items() if "problem" not in rows[name]}
    for name, call in sound.items():
        rows[name]["bytes"] = added_bytes(call, device)
    cuda = device.startswith("cuda")
    flood = torch.empty(CACHE_BYTES if cuda else 0, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in sound}
    warm: dict[str, list[float]] = {name: [] for name in sound}
    for _ in range(repeats):
        for name, call in sound.items():
            flood.zero_()
            times[name].append(seconds(call, device))
            if cuda:
                warm[name].append(seconds(call, device))
    for name, taken in times.items():
        middle = statistics.median(taken)
        rows[name] |= {"seconds": middle, "fastest": min(taken), "slowest": max(taken), "of_floor": floor / middle}
        if warm[name]:
            rows[name]["seconds_warm"] = statistics.median(warm[name])
    return list(rows.values())


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """RMS."""
    return float((found.double() - wanted).norm() / wanted.norm())


def seconds(run: Callable[[], object], device: str) -> float:
    """One call."""
    if device.startswith("cuda"):
        with torch.cuda.device(device):  # an event is of the current device
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median_seconds(run: Callable[[], object], device: str, repeats: int = 9) -> float:
    """The median of single calls, after two that warm up."""
    return statistics.median([seconds(run, device) for _ in range(repeats + 2)][2:])


def added_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most that a call adds to the memory in use; None where the system cannot say."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # else the call would reuse what earlier ones gave back
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except (OSError, AttributeError):  # no /proc, or a C library without malloc_trim
        return None
    before = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def copy_rate(device: str, repeats: int) -> float:
    """Bytes read and written in a second by a copy that is larger than the caches."""
    size = 1 << (32 if device.startswith("cuda") else 27)
    source, out = torch.rand(2, size // 8, device=device).unbind()
    out.copy_(source)
    return size / min(seconds(lambda: out.copy_(source), device) for _ in range(repeats))


def machine(device: str) -> dict[str, str | int]:
    """Where and when this was measured."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "device": f"{device}: {name}",
        "cores": os.cpu_count() or 0,
        "torch": torch.__version__,
    }


def dirty() -> bool | None:
    """Do tracked files differ from the commit? None without git."""
    changes = _git("status", "--porcelain", "-uno")
    return None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    """What git prints; None where there is no git, or no repository."""
    try:
        found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if found.returncode else found.stdout.strip()


def table(rows: list[dict], baseline: str) -> str:
    """Markdown; ratios are to `baseline` in the same run."""
    warm = any("seconds_warm" in row for row in rows)
    heads = ["candidate", "ms (fastest to slowest)", *(["ms, warm caches"] if warm else [])]
    heads += ["ratio", "memory MiB", "% of floor", "error"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    base = next((r.get("seconds") for r in rows if r["candidate"] == baseline), None)
    for row in rows:
        size = f"{row['error']:.1e}" if "error" in row else ""
        if "problem" in row:
            lines.append(f"| {row['candidate']} | {row['problem']} {'| ' * (len(heads) - 3)}| {size} |")
            continue
        ratio = f"{row['seconds'] / base:.2f}" if base else ""
        memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}"
        spread = f"{row['seconds'] * 1e3:.4g} ({row['fastest'] * 1e3:.4g} to {row['slowest'] * 1e3:.4g})"
        hot = f" {row['seconds_warm'] * 1e3:.4g} |" if warm else ""
        lines.append(f"| {row['candidate']} | {spread} |{hot} {ratio} | {memory} | {row['of_floor']:.0%} | {size} |")
    return "\n".join(lines)
