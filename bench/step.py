"""Seconds and tokens/s of each stage of an RL step, and peak memory, as the real trainer runs it.

The student is cold-started first (not timed): an untrained one babbles to the length limit, and its step is not the
step that users wait for. The first RL step is a warm-up; the figures are medians over the others.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.measure import machine
from lite_mentor.config import parse
from lite_mentor.run import prepare
from train import cold_start, train_step

STAGES = ("rollout", "tools", "score", "update", "step")


def main(argv: list[str]) -> None:
    """Measure `--steps` steps (default 5) of the preset, print a Markdown table, and one JSON line under it."""
    config = parse(argv)
    if not any(word.startswith("--steps") for word in argv):
        config = replace(config, steps=5)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, out=str(Path(folder) / "run"))
        with prepare(config) as run:
            cold_start(run)
            train_step(run, 0)
            rows = [train_step(run, step) for step in range(1, config.steps + 1)]
            device = run.config.device
    middle = {key: statistics.median(row[key] for row in rows) for key in measured_keys(rows)}
    print(table(middle))
    print(json.dumps({"command": "python -m bench step " + " ".join(argv), **machine(device), **middle}))


def measured_keys(rows: list[dict]) -> list[str]:
    """The numeric metrics that every row has."""
    return [key for key in rows[0] if all(isinstance(row.get(key), (int, float)) for row in rows)]


def table(middle: dict[str, float]) -> str:
    """The stages as Markdown: seconds, share of the step, and tokens/s where a stage makes or reads tokens."""
    tokens = {
        "rollout": middle["tokens/sampled"],
        "update": middle.get("tokens/trained"),
        "step": middle["tokens/sampled"],
    }
    lines = ["| stage | s | share | tokens/s |", "|---|---|---|---|"]
    for stage in STAGES:
        if f"time/{stage}" not in middle:  # no tool was called
            continue
        seconds = middle[f"time/{stage}"]
        rate = f"{tokens[stage] / seconds:.0f}" if tokens.get(stage) else ""
        lines.append(f"| {stage} | {seconds:.2f} | {seconds / middle['time/step']:.0%} | {rate} |")
    lines.append(f"\npeak memory {middle['memory/peak'] / 2**30:.2f} GiB")
    return "\n".join(lines)
