"""The operators against what people use instead, through one contract, side by side in one run.

    python -m bench kernels [--shapes smollm2 qwen3-0.6b] [--rows 2048] [--peers all] [--out DIR]
    python -m bench kernels --choose [--seconds 120] [--shapes qwen3-0.6b] [--out DIR]

The loss head: every candidate gets the same hidden states, head, targets and upstream gradient, which differs from row
to row (peers.py). The policy loss and the advantages: vectors.py. A result that is wrong against float64 is listed as
wrong and not timed. On a CPU the torch backend runs, and no Triton time is printed. On CUDA both run, and in bf16 the
last line is what they say for HEAD_BACKENDS in mentor_kernels/backend.py. --choose leaves everything else out, and
first times the candidates of mentor_kernels/head_launches.py (choose.py): the line is then about the best of them.

The floor is one GEMM of the head for `score` and two for a gradient, or the bytes that must move, at the rates that a
plain GEMM and a large copy reach in the same run. Memory is what a call adds to what was there: allocated on CUDA,
resident on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Literal

import torch
import triton
import tyro
from mentor_kernels.head_launches import LAUNCHES, head_candidates, launches_of

from bench import choose, vectors
from bench.measure import compare, copy_rate, dirty, machine, relative_error, seconds, table
from bench.peers import Candidate, Inputs, candidates
from lite_mentor.device import compute_device
from lite_mentor.errors import UserError

SHAPES = {
    "smollm2": (576, 49_152),
    "qwen3-0.6b": (1024, 151_936),
    "qwen3-1.7b": (2048, 151_936),
    "tiny": (64, 1_000),
}
"""Hidden size and vocabulary."""
TRITON, TORCH = "ours, triton", "ours, torch"
SWEEP = 0.7
"""The launches' share of --seconds; the rest is for the backends."""
ENOUGH = 0.8
"""Of cuBLAS's speed: with it Triton is chosen, for less memory and, in `linear_policy_loss`, fewer GEMMs."""
Mode = Literal["score", "train", "bonus"]
Operator = Literal["head", "policy", "advantage"]


@dataclass(frozen=True)
class Options:
    """Time, memory and error of the operators."""

    operators: tuple[Operator, ...] = ("head", "policy", "advantage")
    shapes: tuple[Literal["smollm2", "qwen3-0.6b", "qwen3-1.7b", "tiny"], ...] = ("smollm2",)
    """Of the head: whose hidden size and vocabulary."""
    rows: tuple[int, ...] = (2048,)
    """Of the head: sampled tokens in one call."""
    modes: tuple[Mode, ...] = ("score", "train", "bonus")
    dtype: Literal["bf16", "fp32"] = "bf16"
    peers: tuple[str, ...] = ("all",)
    """Other libraries, by name; all or none. torch's own ways are always there."""
    repeats: int = 7
    """Turns of each candidate; the median counts."""
    choose: bool = False
    """Which launches of the head's kernels, and which of its two backends, should be this GPU's default? Only these."""
    seconds: int = 120
    """Of --choose: after so many, what is not measured yet is left out."""
    device: str = "auto"
    out: Path | None = None
    """Folder for kernels.json and kernels.md, written anew after each table."""


def make_inputs(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Inputs:
    """The same for the same sizes. Logits peaked as a language model's: a spread of 3, the target likely."""
    make = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocabulary, hidden, generator=make) * 3 / math.sqrt(hidden)
    targets_N = torch.randint(0, vocabulary, (rows,), generator=make)
    hidden_NH = torch.randn(rows, hidden, generator=make) + weight_VH[targets_N] * torch.rand(rows, 1, generator=make)
    grads = torch.randn(2, rows, generator=make) / rows
    return Inputs(
        hidden_NH.to(device, dtype), weight_VH.to(device, dtype), targets_N.to(device), *grads.to(device).unbind()
    )


def reference(inputs: Inputs, mode: str, rows: int = 256) -> torch.Tensor:
    """float64, in chunks of rows."""
    weight_VH, out = inputs.weight_VH.double(), []
    for at in range(0, len(inputs.targets_N), rows):
        part = slice(at, at + rows)
        hidden = inputs.hidden_NH[part].double().requires_grad_(mode != "score")
        log_p = torch.log_softmax(hidden @ weight_VH.T, -1)
        logp = log_p.gather(1, inputs.targets_N[part, None])[:, 0]
        if mode == "score":
            out.append(logp)
            continue
        loss = (logp * inputs.grad_logprob_N[part].double()).sum()
        if mode == "bonus":
            loss = loss - ((log_p.exp() * log_p).sum(1) * inputs.grad_entropy_N[part].double()).sum()
        out.append(torch.autograd.grad(loss, hidden)[0])
    return torch.cat(out)


CHECKED_ROWS = 1024
"""At most so many rows, spread over all, are compared with float64, in which a consumer GPU is very slow."""
WRONG = {"score": 0.5, "train": 0.1, "bonus": 0.1}
"""Errors beyond these are defects and not rounding: of a logprob in nats, of a gradient relative (RMS)."""


def error(found: torch.Tensor, wanted: torch.Tensor, mode: str) -> float:
    """Largest error of a logprob, or the gradient's relative error."""
    return float((found.double() - wanted).abs().max()) if mode == "score" else relative_error(found, wanted)


def gemm_seconds(inputs: Inputs, device: str, repeats: int) -> float:
    """The fastest GEMM of the head in the inputs' dtype, the floor's unit; on a CPU its tiles stay in the cache."""
    rows, columns = (1024, len(inputs.weight_VH)) if device.startswith("cuda") else (512, 4096)
    out = inputs.hidden_NH.new_empty(min(rows, len(inputs.targets_N)), min(columns, len(inputs.weight_VH)))

    def run():
        for weight in inputs.weight_VH.split(out.shape[1]):
            for part in inputs.hidden_NH.split(len(out)):
                torch.mm(part, weight.T, out=out[: len(part), : len(weight)])

    run()
    return min(seconds(run, device) for _ in range(repeats))


def measure(inputs: Inputs, mode: str, found: dict[str, Candidate], device: str, repeats: int) -> list[dict]:
    """One row for each candidate of the head."""
    some = slice(None, None, -(-len(inputs.targets_N) // CHECKED_ROWS))
    tensors = {name: value[some] for name, value in vars(inputs).items() if name != "weight_VH"}
    wanted = reference(Inputs(**tensors, weight_VH=inputs.weight_VH), mode)
    return compare(
        {name: lambda c=candidate: c(inputs, mode) for name, candidate in found.items()},
        lambda result: error(result[some], wanted, mode),
        WRONG[mode],
        (1 if mode == "score" else 2) * gemm_seconds(inputs, device, repeats),
        device,
        repeats,
    )


class Report:
    """Tables as they come, on the screen and in `out`: a run that is stopped keeps those that it finished."""

    def __init__(self, about: dict, out: Path | None):
        self.about, self.out, self.results = about, out, []
        self.text = [json.dumps(about)]
        print(self.text[0], flush=True)
        if out:
            out.mkdir(parents=True, exist_ok=True)

    def add(self, title: str, baseline: str, found: list[dict], **labels: str | int) -> None:
        self.results += [{**labels, **row} for row in found]
        self.say(f"\n{title}\n\n{table(found, baseline)}")
        if self.out:
            (self.out / "kernels.json").write_text(json.dumps({**self.about, "results": self.results}, indent=1))

    def say(self, text: str) -> None:
        self.text.append(text)
        print(text, flush=True)
        if self.out:
            (self.out / "kernels.md").write_text("\n".join(self.text) + "\n")


def main(argv: list[str]) -> None:
    """Print, and with --out write, a table for each operator, shape, number of rows and mode."""
    options = tyro.cli(Options, args=argv, prog="python -m bench kernels")
    device = compute_device(options.device)
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # the peers launch their kernels on the current one
    if min(options.repeats, options.seconds, *options.rows) < 1:
        raise UserError("--repeats, --seconds and --rows must be 1 or more.")
    if options.choose and not device.startswith("cuda"):
        raise UserError("--choose needs a GPU: elsewhere the head has the torch backend alone, so drop the flag.")
    if options.choose and options.dtype != "bf16":
        raise UserError(f"--choose is about bf16, which HEAD_BACKENDS is for; drop --dtype {options.dtype}.")
    begin = time.monotonic()
    found, versions = candidates(device, ("none",) if options.choose else options.peers)
    report = Report(
        {
            "command": " ".join(["python -m bench kernels", *argv]),
            **machine(device),
            "triton": triton.__version__,
            "dirty": dirty(),
            "threads": torch.get_num_threads(),
            "peers": versions,
        },
        options.out,
    )
    if options.choose:
        choose_all(options, {name: found[name] for name in (TRITON, TORCH)}, device, report, begin)
        return
    small = [name for name in vectors.BENCHES if name in options.operators]
    rate = copy_rate(device, options.repeats) if small else 0.0
    for name in small:
        rows = vectors.BENCHES[name](device, options.repeats, rate)
        report.add(vectors.TITLES[name], "plain torch", rows, operator=name)
    if "head" in options.operators:
        head(options, found, device, report)
        if TRITON in found and options.dtype == "bf16":
            report.say("\n" + choice(report.results, torch.cuda.get_device_capability(device), report.about))


def head(options: Options, found: dict[str, Candidate], device: str, report: Report, until: float = math.inf) -> None:
    """The tables of the loss head; those that would begin after `until` (time.monotonic) are left out."""
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    for shape in options.shapes:
        hidden, vocabulary = SHAPES[shape]
        for count in options.rows:
            inputs = make_inputs(count, hidden, vocabulary, dtype, device)
            for mode in options.modes:
                title = f"{shape} (H = {hidden}, V = {vocabulary}), {count} rows, {options.dtype}, {mode}"
                if report.results and time.monotonic() > until:
                    report.say(f"{title}: no time")
                    continue
                report.add(
                    title,
                    TORCH if options.choose else "all logits",
                    measure(inputs, mode, found, device, options.repeats),
                    operator="head", shape=shape, rows=count, dtype=options.dtype, mode=mode,
                )  # fmt: skip


def choose_all(options: Options, found: dict[str, Candidate], device: str, report: Report, begin: float) -> None:
    """The sweep of the launches, then with the best of them the two backends, and at the end the lines to paste."""
    capability = torch.cuda.get_device_capability(device)
    arch = capability[0] * 10 + capability[1]
    table = launches_of(arch)
    problems = [
        choose.trials(make_inputs(min(options.rows), *SHAPES[shape], torch.bfloat16, device))
        for shape in options.shapes
    ]
    results = choose.sweep(
        {field: head_candidates(field, arch) for field in choose.ORDER},
        problems,
        lambda run: seconds(run, device),
        begin + SWEEP * options.seconds,
        report.say,
        options.repeats,
    )
    entry = choose.lines(results, table, capability, report.about)
    report.say("\n" + entry)  # already now: what follows may fail or be stopped
    del problems
    LAUNCHES[capability] = choose.chosen(results, table)
    options = replace(options, modes=tuple(sorted(options.modes, key=lambda mode: mode != "train")))
    head(options, found, device, report, begin + options.seconds)
    line = choice(report.results, capability, report.about)
    report.say(f"\nFor LAUNCHES in mentor_kernels/head_launches.py:\n\n{entry}\n")
    report.say(f"For HEAD_BACKENDS in mentor_kernels/backend.py:\n\n{line}")


def choice(results: list[dict], capability: tuple[int, int], about: dict) -> str:
    """The line for HEAD_BACKENDS: the card, its backend, and Triton's speed over cuBLAS's (geometric mean, range).

    A backend that failed or was wrong in any table is not chosen; UserError if that holds for both. What trains decides
    where it was measured: the tables of `train`.
    """
    training = [row for row in results if row.get("mode") == "train"]
    results = training or results
    ours = {name: [row for row in results if row["candidate"] == name] for name in (TRITON, TORCH)}
    broken = {name: row["problem"] for name, rows in ours.items() for row in rows if "problem" in row}
    reason = "; ".join(f"{name}: {problem}" for name, problem in broken.items())
    if len(broken) == 2:
        raise UserError(f"No backend of the head passed on this GPU: {reason}.")
    chosen = "torch" if TRITON in broken else "triton"
    if not broken:
        speed = [by_torch["seconds"] / by_triton["seconds"] for by_triton, by_torch in zip(*ours.values(), strict=True)]
        mean = geometric_mean(speed)
        chosen = "triton" if mean >= ENOUGH else "torch"
        reason = f"Triton at {mean:.2f} of cuBLAS ({min(speed):.2f} to {max(speed):.2f} in {len(speed)} tables)"
    return f'    {capability}: "{chosen}",  # {reason}; {about["device"]}, {about["date"]}, {about["commit"]}'
