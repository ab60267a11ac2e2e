"""Everything that says how this machine does, by one command: `python -m bench all --out DIR`, under nine minutes.

Each part runs in a process of its own with a time limit, so that none can take the others with it; what it printed, its
files and its exit status land in DIR, and DIR/summary.md says how each ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from bench.measure import machine
from lite_mentor.errors import UserError


@dataclass(frozen=True)
class Options:
    """Run every bench, one after another."""

    out: Path
    """Folder for the results; must not hold any yet."""
    small: bool = False
    """Tiny sizes: to see that everything runs."""
    parts: tuple[str, ...] = ()
    """Only these."""


@dataclass(frozen=True)
class Part:
    """One command and the most seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: int


def plan(out: Path, *, cuda: bool, small: bool) -> list[Part]:
    """What is run here. The limits add up to less than nine minutes."""
    python = sys.executable
    sizes, short = ["--shapes", "smollm2", "--rows", "512", "2048"], []
    if cuda:
        sizes = ["--shapes", "smollm2", "qwen3-0.6b", "qwen3-1.7b", "--rows", "1024", "8192"]
    if small:
        sizes = ["--shapes", "tiny", "--rows", "64", "--repeats", "2"]
        short = ["--sft-steps", "3", "--prompts-per-step", "4", "--group-size", "4", "--train-size", "120"]
    parts = [
        Part("kernels", (python, "-m", "bench", "kernels", *sizes, "--out", str(out / "kernels")), 130),
        Part("step", (python, "-m", "bench", "step", "--preset", "tiny", "--steps", "3", *short), 45),
    ]
    rollout = (python, "-m", "bench", "rollout")
    if not small and not cuda:
        parts.append(Part("rollout", rollout, 90))
    if cuda:
        if not small:
            large = (*rollout, "--student", "qwen3-0.6b", "--dtype", "bf16", "--rounds", "1", "--batches", "8", "64")
            parts += [
                Part("rollout", (*large, "--graphs", "off"), 75),
                Part("rollout-graphs", (*large, "--graphs", "on"), 60),
            ]
        # -v: a run that is stopped says how far it came; tests whose packages are missing do not stop the others.
        flags = ("-v", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors")
        tests = Part("gpu-tests", (python, "-m", "pytest", *flags), 200)
        parts = [tests, *parts, Part("caps", (python, "train.py", "--check", "--preset", "8gb"), 25)]
    return parts


def run(part: Part, out: Path) -> dict[str, object]:
    """Run one part; its output goes to DIR/NAME.txt."""
    begin = time.monotonic()
    status: int | str
    with open(out / f"{part.name}.txt", "wb") as file:
        try:
            process = subprocess.Popen(part.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            status = f"could not start: {error}"
        else:
            try:
                status = process.wait(part.limit)
            except subprocess.TimeoutExpired:
                status = f"stopped after {part.limit} s"
            finally:
                _stop(process)
    return {"part": part.name, "status": status, "seconds": round(time.monotonic() - begin, 1)}


def _stop(process: subprocess.Popen) -> None:
    """End it and all that it started: what lives on would hold memory of the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(argv: list[str]) -> None:
    """Run the parts, print each one's end as it comes, and write the summary."""
    options = tyro.cli(Options, args=argv, prog="python -m bench all")
    if options.out.exists() and any(options.out.iterdir()):
        raise UserError(f"--out {options.out} already holds files; name a new folder.")
    options.out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    parts = plan(options.out, cuda=cuda, small=options.small)
    unknown = set(options.parts) - {part.name for part in parts}
    if unknown:
        raise UserError(f"--parts {' '.join(sorted(unknown))}: here are {' '.join(part.name for part in parts)}.")
    rows = []
    for part in parts:
        if not options.parts or part.name in options.parts:
            rows.append(run(part, options.out))
            print(f"{rows[-1]['part']}: {rows[-1]['status']} ({rows[-1]['seconds']} s)", flush=True)
    about = {"command": " ".join(["python -m bench all", *argv]), **machine("cuda" if cuda else "cpu")}
    lines = [json.dumps(about), "", "| part | exit status | s |", "|---|---|---|"]
    lines += [f"| [{r['part']}]({r['part']}.txt) | {r['status']} | {r['seconds']} |" for r in rows]
    (options.out / "summary.md").write_text("\n".join(lines) + "\n")
    (options.out / "summary.json").write_text(json.dumps({**about, "parts": rows}, indent=1))
    failed = [str(row["part"]) for row in rows if row["status"] != 0]
    if failed:
        raise UserError(f"{', '.join(failed)} did not end well; see {options.out}.")
