"""How much of the head's gradient can be left out, and how wrong it is then: on real hidden states.

K3 multiplies a block of rows by every tile of the vocabulary, or with a `drop_mass` by those alone that
mentor_kernels/active_tiles.py lists. Here that function picks the tiles, of real hidden states, and the gradient of the
logprobs is made in float32 with all tiles and with those: how many are kept, and the error beside its bound

    2 drop_mass max_v |W_v| |scale| / temperature

Rollouts are sampled as a run's first step would, and packed as its loss would see them. On a GPU the kernels that skip
the tiles are timed too; in Triton's interpreter a time would say nothing.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mentor_kernels import linear_logprob
from mentor_kernels.active_tiles import active_tiles

from bench.measure import machine, seconds
from lite_mentor.batch import pack
from lite_mentor.config import Config, parse
from lite_mentor.loss import sampled_hidden
from lite_mentor.rollout import roll_out
from lite_mentor.run import prepare
from lite_mentor.student import Student
from train import cold_start

# Of the kernels: rows that share their tiles, columns of a tile, rows of a chunk.
BLOCK_ROWS, TILE_COLUMNS, CHUNK_ROWS = 128, 128, 1024
TURNS = 9
DROP_MASSES = (3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)


def main(argv: list[str]) -> None:
    """Print a Markdown table and one JSON line, for the student of any configuration of train.py, cold-started."""
    *rows, student, config = sampled_rows(parse(argv))
    rates = [keep_rate(*rows, student, config.temperature, drop_mass) for drop_mass in DROP_MASSES]
    print("| drop_mass | tiles kept | in the order of the text | error, relative RMS | of the sum | largest / bound |")
    print("|---|---|---|---|---|---|")
    for row in rates:
        print(
            f"| {row['drop_mass']:.0e} | {row['kept']:.1%} | {row['kept_in_order']:.1%} | {row['error']:.1e} | "
            f"{row['error_of_sum']:.1e} | {row['error_of_bound']:.2f} |"
        )
    if config.device.startswith("cuda"):
        times = score_and_gradient_seconds(*rows[:2], student, config.temperature, config.device)
        for row in rates:
            row["seconds_of_exact"] = times[row["drop_mass"]] / times[0.0]
            print(f"drop_mass {row['drop_mass']:.0e}: {row['seconds_of_exact']:.2f} of the time of the whole gradient")
    about = {"command": " ".join(["python -m bench keep-rate", *argv]), **machine(config.device)}
    print(json.dumps({**about, "student": config.student, "tokens": len(rows[0]), "rows": rates}))


def sampled_rows(config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Student, Config]:
    """Hidden states [N, H], ids and advantages [N] of the tokens that one step samples, in its packed rows' order.

    The advantages are 1 and -1 in turn: of each group as many of the one as of the other, as centred ones would be.
    """
    with tempfile.TemporaryDirectory() as folder, prepare(replace(config, out=str(Path(folder) / "run"))) as run:
        c = run.config
        cold_start(run)
        run.refresh_rollouts()
        rollouts = roll_out(
            run.engine, run.chat, run.take(0), group_size=c.group_size, limits=run.limits,
            sampling=run.sampling, seed=c.seed, step=0, run_call=run.run_call,
        )  # fmt: skip
        batches = pack(rollouts, [1.0 - 2.0 * (i % 2) for i in range(len(rollouts))], c.micro_tokens)
        with torch.no_grad():
            hidden_NH = torch.cat([sampled_hidden(run.student, b) for b in batches])
        targets_N, advantage_N = (
            torch.cat([getattr(b, name) for b in batches]).to(hidden_NH.device) for name in ("targets_N", "advantage_N")
        )
        return hidden_NH, targets_N, advantage_N, run.student, c


@torch.no_grad()
def keep_rate(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    advantage_N: torch.Tensor,
    student: Student,
    temperature: float,
    drop_mass: float,
) -> dict[str, float]:
    """Tiles kept over all tiles, sorted as the kernels do and unsorted; the error of d logprob / d hidden.

    The error has a direction, for it is always a tail that is not pushed down. So it is given of their sum too, weighed
    by the advantages.
    """
    weight_VH, scale = student.head_weight_VH.float(), student.logit_scale / temperature
    longest = float(weight_VH.norm(dim=1).max()) * abs(scale)
    kept = in_order = tiles = 0
    errors, whole = [], []
    for hidden_RH, targets_R in zip(hidden_NH.float().split(CHUNK_ROWS), targets_N.split(CHUNK_ROWS), strict=True):
        x_RV, slope_RV = hidden_RH @ weight_VH.T * student.logit_scale, None
        if student.softcap is not None:
            tanh_RV = torch.tanh(x_RV / student.softcap)
            x_RV, slope_RV = student.softcap * tanh_RV, 1 - tanh_RV**2
        others_RV = (x_RV / temperature).softmax(-1).scatter(1, targets_R[:, None], 0)
        width = others_RV.shape[1]
        padded_RV = F.pad(others_RV, (0, -width % TILE_COLUMNS))
        weight_TR = padded_RV.unflatten(1, (-1, TILE_COLUMNS)).sum(2).T
        order_R, tiles_BT, counts_B = active_tiles(weight_TR, drop_mass, BLOCK_ROWS)
        kept += int(counts_B.sum())
        blocks = weight_TR.split(BLOCK_ROWS, 1)
        in_order += sum(int(active_tiles(block_TR, drop_mass, BLOCK_ROWS).counts_B.sum()) for block_TR in blocks)
        tiles += tiles_BT.numel()

        # The target's coefficient is the sum of those kept, or under a softcap of all, as in K3.
        left_out_RV = others_RV.clone()
        for block, rows_B in enumerate(order_R.split(BLOCK_ROWS)):
            left_out_T = torch.ones(len(weight_TR), device=others_RV.device)
            left_out_T[tiles_BT[block, : counts_B[block]].long()] = 0
            left_out_RV[rows_B] *= left_out_T.repeat_interleave(TILE_COLUMNS)[:width]
        for by_RV, found, own in ((left_out_RV, errors, slope_RV is None), (others_RV, whole, True)):
            by_z_RV = by_RV.scatter(1, targets_R[:, None], -by_RV.sum(1, keepdim=True) if own else 0)
            found.append((by_z_RV if slope_RV is None else by_z_RV * slope_RV) @ weight_VH * scale)
    error_NH, gradient_NH = torch.cat(errors), torch.cat(whole)
    return {
        "drop_mass": drop_mass,
        "kept": kept / tiles,
        "kept_in_order": in_order / tiles,
        "error": float(error_NH.norm() / gradient_NH.norm()),
        "error_of_sum": float((advantage_N @ error_NH).norm() / (advantage_N @ gradient_NH).norm()),
        "error_of_bound": float(error_NH.norm(dim=1).max()) / (2 * drop_mass * longest),
    }


def score_and_gradient_seconds(
    hidden_NH: torch.Tensor, targets_N: torch.Tensor, student: Student, temperature: float, device: str
) -> dict[float, float]:
    """drop_mass -> seconds of the Triton kernels for logprobs and their gradient, medians of turns."""
    masses = (0.0, *DROP_MASSES)
    times: dict[float, list[float]] = {drop_mass: [] for drop_mass in masses}
    hidden_NH = hidden_NH.detach().requires_grad_()
    for _ in range(1 + TURNS):
        for drop_mass in masses:
            how = dict(softcap=student.softcap, scale=student.logit_scale, drop_mass=drop_mass, backend="triton")
            run = partial(linear_logprob, hidden_NH, student.head_weight_VH, targets_N, temperature=temperature, **how)
            times[drop_mass].append(seconds(run, device))
    return {drop_mass: statistics.median(taken[1:]) for drop_mass, taken in times.items()}  # the first compiled
