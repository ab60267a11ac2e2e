"""How much of the head's gradient could be skipped, if a tile of little probability were: on real hidden states.

K3 multiplies a block of rows by every tile of the vocabulary. A tile in which no row of the block has more than a
threshold of probability could be left out, at an error in a row of the gradient of at most

    2 delta max_v |W_v| |scale| / temperature,     delta = the row's dropped probability

The kernels do not: this is the measurement that says whether they should. Rollouts are sampled as a run's
first step would, and packed as its loss would see them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from bench.measure import machine
from lite_mentor.batch import pack
from lite_mentor.config import Config, parse
from lite_mentor.loss import sampled_hidden
from lite_mentor.rollout import roll_out
from lite_mentor.run import prepare
from lite_mentor.student import Student
from train import cold_start

BLOCK_ROWS, TILE_COLUMNS = 128, 128
THRESHOLDS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def main(argv: list[str]) -> None:
    """Print a Markdown table and one JSON line, for the student of any configuration of train.py, cold-started."""
    hidden_NH, student, config = hidden_states(parse(argv))
    rows = [keep_rate(hidden_NH, student, config.temperature, threshold) for threshold in THRESHOLDS]
    print("| threshold | tiles kept | most dropped in a row | mean dropped |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['threshold']:.0e} | {row['kept']:.1%} | {row['dropped_max']:.1e} | {row['dropped_mean']:.1e} |")
    about = {"command": " ".join(["python -m bench keep-rate", *argv]), **machine(config.device)}
    print(json.dumps({**about, "student": config.student, "tokens": len(hidden_NH), "rows": rows}))


def hidden_states(config: Config) -> tuple[torch.Tensor, Student, Config]:
    """Hidden states [N, H] of the tokens that one step samples, in the order of its packed rows."""
    with tempfile.TemporaryDirectory() as folder, prepare(replace(config, out=str(Path(folder) / "run"))) as run:
        c = run.config
        cold_start(run)
        run.refresh_rollouts()
        rollouts = roll_out(
            run.engine, run.chat, run.take(0), group_size=c.group_size, limits=run.limits,
            sampling=run.sampling, seed=c.seed, step=0, run_call=run.run_call,
        )  # fmt: skip
        batches = pack(rollouts, [0.0] * len(rollouts), c.micro_tokens)
        with torch.no_grad():
            return torch.cat([sampled_hidden(run.student, b) for b in batches]), run.student, c


@torch.no_grad()
def keep_rate(hidden_NH: torch.Tensor, student: Student, temperature: float, threshold: float) -> dict[str, float]:
    """Tiles kept over all tiles, and the probability that a row loses by the others."""
    kept = tiles = 0
    dropped = []
    for block_RH in hidden_NH.split(BLOCK_ROWS):
        z_RV = student.logit_scale * (block_RH.float() @ student.head_weight_VH.float().T)
        if student.softcap is not None:
            z_RV = student.softcap * torch.tanh(z_RV / student.softcap)
        p_RV = (z_RV / temperature).softmax(-1)
        p_RV = torch.nn.functional.pad(p_RV, (0, -p_RV.shape[1] % TILE_COLUMNS))
        mass_RT = p_RV.unflatten(1, (-1, TILE_COLUMNS)).sum(2)
        keep_T = (mass_RT > threshold).any(0)
        kept, tiles = kept + int(keep_T.sum()), tiles + len(keep_T)
        dropped.append(mass_RT[:, ~keep_T].sum(1))
    dropped_N = torch.cat(dropped)
    return {
        "threshold": threshold,
        "kept": kept / tiles,
        "dropped_max": float(dropped_N.max()),
        "dropped_mean": float(dropped_N.mean()),
    }
