"""The loss head against what people use instead, through one contract, side by side in one run.

    python -m bench kernels [--shapes smollm2 qwen3-0.6b] [--rows 2048] [--peers all] [--out DIR]

Every candidate gets the same hidden states, head, targets and upstream gradient, which differs from row to row, and
returns logprobs (`score`), or the gradient by the hidden states (`train`; `bonus` with an entropy bonus too). One whose
result is wrong against float64 is listed as wrong and not timed. Candidates take turns, so that a machine that slows
down slows all of them. On a CPU the torch backend runs, and no Triton time is printed.

Memory is what a call adds to what was there: allocated on CUDA, resident on a CPU.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from mentor_kernels import linear_logprob

from bench.step import machine
from lite_mentor.errors import UserError

SHAPES = {
    "smollm2": (576, 49_152),
    "qwen3-0.6b": (1024, 151_936),
    "qwen3-1.7b": (2048, 151_936),
    "tiny": (64, 1_000),
}
"""Hidden size and vocabulary."""
MODES = ("score", "train", "bonus")
Mode = Literal["score", "train", "bonus"]


@dataclass(frozen=True)
class Options:
    """Time and memory of the loss head."""

    shapes: tuple[Literal["smollm2", "qwen3-0.6b", "qwen3-1.7b", "tiny"], ...] = ("smollm2",)
    """Whose hidden size and vocabulary."""
    rows: tuple[int, ...] = (2048,)
    """Sampled tokens in one call."""
    modes: tuple[Mode, ...] = MODES
    dtype: Literal["bf16", "fp32"] = "bf16"
    peers: Literal["all", "none"] = "all"
    """Other libraries, where they import; torch's own ways are always there."""
    repeats: int = 7
    """Turns of each candidate; the median counts."""
    device: str = "auto"
    out: Path | None = None
    """Folder for kernels.json and kernels.md."""


@dataclass(frozen=True)
class Inputs:
    """One problem. The logits are peaked as a language model's: a spread of 3, the target likely."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    targets_N: torch.Tensor
    grad_logprob_N: torch.Tensor
    grad_entropy_N: torch.Tensor


def make_inputs(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, device: str) -> Inputs:
    """The same for the same sizes."""
    make = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocabulary, hidden, generator=make) * 3 / math.sqrt(hidden)
    targets_N = torch.randint(0, vocabulary, (rows,), generator=make)
    hidden_NH = torch.randn(rows, hidden, generator=make) + weight_VH[targets_N] * torch.rand(rows, 1, generator=make)
    grads = torch.randn(2, rows, generator=make) / rows
    return Inputs(
        hidden_NH.to(device, dtype), weight_VH.to(device, dtype), targets_N.to(device), *grads.to(device).unbind()
    )


# --- candidates: inputs -> logprobs (score), or the gradient by the hidden states -----------------------------------

Candidate = Callable[[Inputs, str], torch.Tensor]


def from_head(head: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> Candidate:
    """`head(hidden, weight, targets) -> (logprob, entropy or None)`, run as each mode needs it."""

    def run(inputs: Inputs, mode: str) -> torch.Tensor:
        if mode == "score":
            with torch.no_grad():
                return head(inputs.hidden_NH, inputs.weight_VH, inputs.targets_N)[0]
        hidden_NH = inputs.hidden_NH.detach().requires_grad_()
        logprob_N, entropy_N = head(hidden_NH, inputs.weight_VH, inputs.targets_N)
        outputs, grads = [logprob_N], [inputs.grad_logprob_N.to(logprob_N.dtype)]
        if mode == "bonus":
            if entropy_N is None:
                raise NotImplementedError("gives no entropy")
            outputs, grads = [*outputs, entropy_N], [*grads, inputs.grad_entropy_N.to(entropy_N.dtype)]
        return torch.autograd.grad(outputs, hidden_NH, grads)[0]

    return run


def all_logits(hidden_NH, weight_VH, targets_N):
    """What most trainers do: logits in the model's dtype, log_softmax in float32."""
    log_p_NV = torch.log_softmax((hidden_NH @ weight_VH.T).float(), -1)
    return log_p_NV.gather(1, targets_N[:, None])[:, 0], _entropy(log_p_NV)


def all_logits_float32(hidden_NH, weight_VH, targets_N):
    """The same with logits as exact as ours."""
    log_p_NV = torch.log_softmax(hidden_NH.float() @ weight_VH.float().T, -1)
    return log_p_NV.gather(1, targets_N[:, None])[:, 0], _entropy(log_p_NV)


class _Entropy(torch.autograd.Function):
    """-sum p log p, made only when its gradient or value is used; as an operator of log p."""

    @staticmethod
    def forward(ctx, log_p_NV):
        ctx.save_for_backward(log_p_NV)
        return log_p_NV.new_zeros(log_p_NV.shape[0])

    @staticmethod
    def backward(ctx, grad_N):
        (log_p_NV,) = ctx.saved_tensors
        return -(log_p_NV.exp() * (log_p_NV + 1)).mul_(grad_N[:, None])


def _entropy(log_p_NV: torch.Tensor) -> torch.Tensor:
    """A placeholder value with the entropy's gradient: no mode looks at the value, so nobody pays for it."""
    return _Entropy.apply(log_p_NV)


def torch_linear_cross_entropy(hidden_NH, weight_VH, targets_N):
    """torch's own operator."""
    return -F.linear_cross_entropy(hidden_NH, weight_VH, targets_N, reduction="none"), None


def candidates(device: str, peers: str) -> tuple[dict[str, Candidate], dict[str, str]]:
    """(candidates by name, versions of other libraries or why they are not there)."""
    cuda = device.startswith("cuda")
    found: dict[str, Candidate] = {
        "ours, torch": from_head(lambda h, w, y: linear_logprob(h, w, y, backend="torch")),
        "all logits": from_head(all_logits),
        "all logits, float32": from_head(all_logits_float32),
    }
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = from_head(torch_linear_cross_entropy)
    if cuda:
        found = {"ours, triton": from_head(lambda h, w, y: linear_logprob(h, w, y, backend="triton")), **found}
        found["all logits, torch.compile"] = from_head(torch.compile(all_logits))
    versions: dict[str, str] = {}
    if peers == "all":
        for package, add in {"liger-kernel": _liger, "cut-cross-entropy": _cce}.items():
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not installed"
                continue
            if not cuda:
                versions[package] += " (needs a GPU)"
                continue
            try:
                found |= add()
            except ImportError as error:
                versions[package] += f" (does not import: {error})"
    return found, versions


def _liger() -> dict[str, Candidate]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return {
        "liger-kernel": from_head(lambda h, w, y: (-liger_fused_linear_cross_entropy(h, w, y, reduction="none"), None))
    }


def _cce() -> dict[str, Candidate]:
    from cut_cross_entropy import linear_cross_entropy

    return {
        f"cut-cross-entropy{name}": from_head(
            lambda h, w, y, eps=eps: (-linear_cross_entropy(h, w, y, reduction="none", filter_eps=eps), None)
        )
        for name, eps in {"": "auto", ", exact": None}.items()
    }


# --- measuring -----------------------------------------------------------------------------------------------------


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


WRONG = {"score": 0.5, "train": 0.1, "bonus": 0.1}
"""Errors beyond these are defects and not rounding: of a logprob in nats, of a gradient relative (RMS)."""


def error(found: torch.Tensor, wanted: torch.Tensor, mode: str) -> float:
    """Largest error of a logprob, or the gradient's relative RMS error."""
    if mode == "score":
        return float((found.double() - wanted).abs().max())
    return float((found.double() - wanted).norm() / wanted.norm())


def seconds(run: Callable[[], object], device: str) -> float:
    """One call."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def added_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most that a call adds to the memory in use; None where the system cannot say."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return max(_resident("VmHWM") - before, 0)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def gemm_seconds(inputs: Inputs, device: str, repeats: int) -> float:
    """One GEMM of the head in the inputs' dtype, in chunks of rows that need no large output: the unit of the floor."""
    out = torch.empty(
        min(1024, len(inputs.targets_N)), len(inputs.weight_VH), device=device, dtype=inputs.hidden_NH.dtype
    )

    def run():
        for part in inputs.hidden_NH.split(len(out)):
            torch.mm(part, inputs.weight_VH.T, out=out[: len(part)])

    run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def measure(inputs: Inputs, mode: str, found: dict[str, Candidate], device: str, repeats: int) -> list[dict]:
    """One row for each candidate: error, then memory and the median time, taken in turns."""
    wanted, rows = reference(inputs, mode), {}
    for name, candidate in found.items():
        row = rows[name] = {"candidate": name, "mode": mode}
        try:
            row["error"] = error(candidate(inputs, mode), wanted, mode)
        except NotImplementedError as reason:
            row["problem"] = str(reason)
        except (RuntimeError, ValueError, TypeError) as problem:  # a peer that fails must not end the others' run
            row["problem"] = f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
        else:
            if not row["error"] <= WRONG[mode]:
                row["problem"] = "wrong, so not timed"
    sound = {name: candidate for name, candidate in found.items() if "problem" not in rows[name]}
    times: dict[str, list[float]] = {name: [] for name in sound}
    for name, candidate in sound.items():
        rows[name]["bytes"] = added_bytes(lambda c=candidate: c(inputs, mode), device)
    for _ in range(repeats):
        for name, candidate in sound.items():
            times[name].append(seconds(lambda c=candidate: c(inputs, mode), device))
    unit = gemm_seconds(inputs, device, repeats)
    floor = {"score": 1, "train": 2, "bonus": 2}[mode] * unit
    for name, taken in times.items():
        middle = statistics.median(taken)
        rows[name] |= {"seconds": middle, "fastest": min(taken), "slowest": max(taken), "of_floor": floor / middle}
    return list(rows.values())


def table(rows: list[dict], baseline: str = "all logits") -> str:
    """Markdown; ratios are to `baseline` in the same run."""
    lines = [
        "| candidate | ms (fastest to slowest) | ratio | memory MiB | % of GEMM floor | error |",
        "|---|---|---|---|---|---|",
    ]
    base = next((r.get("seconds") for r in rows if r["candidate"] == baseline), None)
    for row in rows:
        size = f"{row['error']:.1e}" if "error" in row else ""
        if "problem" in row:
            lines.append(f"| {row['candidate']} | {row['problem']} | | | | {size} |")
            continue
        ratio = f"{row['seconds'] / base:.2f}" if base else ""
        memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}"
        spread = f"{row['seconds'] * 1e3:.1f} ({row['fastest'] * 1e3:.1f} to {row['slowest'] * 1e3:.1f})"
        lines.append(f"| {row['candidate']} | {spread} | {ratio} | {memory} | {row['of_floor']:.0%} | {size} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Print, and with --out write, a table for each shape, number of rows and mode."""
    options = tyro.cli(Options, args=argv, prog="python -m bench kernels")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.repeats < 1 or min(options.rows) < 1:
        raise UserError("--repeats and --rows must be 1 or more.")
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    found, versions = candidates(device, options.peers)
    about = {
        "command": " ".join(["python -m bench kernels", *argv]),
        **machine(device),
        "threads": torch.get_num_threads(),
    }
    text, results = [json.dumps({**about, "peers": versions})], []
    print(text[0], flush=True)
    for shape in options.shapes:
        hidden, vocabulary = SHAPES[shape]
        for count in options.rows:
            inputs = make_inputs(count, hidden, vocabulary, dtype, device)
            for mode in options.modes:
                rows = measure(inputs, mode, found, device, options.repeats)
                results += [{"shape": shape, "rows": count, "dtype": options.dtype, **row} for row in rows]
                title = f"{shape} (H = {hidden}, V = {vocabulary}), {count} rows, {options.dtype}, {mode}"
                text.append(f"\n{title}\n\n{table(rows)}")
                print(text[-1], flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "kernels.json").write_text(
            json.dumps({**about, "peers": versions, "results": results}, indent=1)
        )
        (options.out / "kernels.md").write_text("\n".join(text) + "\n")
