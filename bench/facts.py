"""What is true of this machine and of the trainer on it: `python -m bench facts`, one JSON line for each fact.

Each stands by itself: one that cannot be had says why in its line, and costs no other. Without a GPU the same are found
in small, which shows that they can be had, and says nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.measure import copy_rate, median_seconds
from lite_mentor.attention import PackedPlan
from lite_mentor.errors import UserError

PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "numpy", "bitsandbytes", "flash-attn", "tyro",
    "jsonschema", "math-verify", "bm25s", "gguf", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis",
)  # fmt: skip


def versions(device: str) -> dict:
    """Of the packages, the driver and the card; None is not installed."""
    found: dict = {"python": sys.version.split()[0], "cpus": os.cpu_count(), "git": shutil.which("git") is not None}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        found |= {"card": card.name, "sm": f"{card.major}{card.minor}", "multiprocessors": card.multi_processor_count}
        found |= {"cuda": torch.version.cuda, "free_gib": free / 2**30, "total_gib": total / 2**30}
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    """Its version, where the program that knows it is installed."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return None


def rates(device: str) -> dict:
    """The two ceilings: bytes that a large copy reads and writes, operations of a large bf16 product, in a second."""
    n = 8192 if device == "cuda" else 256
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16).unbind()
    product = 2 * n**3 / median_seconds(lambda: a @ b, device)
    return {"copy_gb_per_s": copy_rate(device, 5) / 1e9, "bf16_tflop_per_s": product / 1e12}


def head_product(device: str) -> dict:
    """What cuBLAS makes of the loss head's own product, with bf16 and with float32 results: TFLOP/s."""
    shapes = {"smollm2": (576, 49_152), "qwen3-0.6b": (1024, 151_936)} if device == "cuda" else {"tiny": (64, 1000)}
    found, rows = {}, 768
    for name, (hidden, vocabulary) in shapes.items():
        x, w = (torch.randn(n, hidden, device=device, dtype=torch.bfloat16) for n in (rows, vocabulary))
        flop = 2 * rows * hidden * vocabulary / 1e12
        found[name] = flop / median_seconds(lambda x=x, w=w: x @ w.T, device)
        if device == "cuda":
            wide = median_seconds(lambda x=x, w=w: torch.mm(x, w.T, out_dtype=torch.float32), device)
            found[f"{name}, float32 out"] = flop / wide
    return found


def division(device: str) -> dict:
    """Where all of n calls work the share is exactly 1 for every n, and a group of such rollouts is silent."""
    from mentor_kernels import RewardConfig, group_advantage

    n, found = 64, {}
    calls = torch.arange(1, n + 1, device=device, dtype=torch.float32)
    ones, zeros = torch.ones(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    tools = torch.ones(n, 1, dtype=torch.int64, device=device)
    for backend in ("torch", "triton") if device == "cuda" else ("torch",):
        got = group_advantage(
            tools, tools, ones, ones, ones, zeros, zeros, config=RewardConfig(reward="flex", advantage="gdpo"),
            calls_B=calls, teacher_calls_B=calls, ok_calls_B=calls, groups=1, backend=backend,
        )  # fmt: skip
        off = int((got.terms["valid"] != 1).sum())
        found[backend] = {"not_1": off, "silent": bool(got.zero_variance_G[0])}
    return found


def _forest(device: str, dtype: torch.dtype, head_dim: int) -> tuple[PackedPlan, tuple[torch.Tensor, ...]]:
    """A prompt with some rollouts of it: the plan, and a query, key and value that want gradients."""
    prompt, own, count = (1024, 512, 15) if device == "cuda" else (20, 12, 3)
    plan = PackedPlan([0, *(prompt + i * own for i in range(count))], [-1, *[0] * count], prompt + count * own, device)
    heads = (16, 8, 8) if device == "cuda" else (4, 2, 2)
    make = torch.Generator(device).manual_seed(0)
    T = prompt + count * own
    random = (torch.randn(1, h, T, head_dim, device=device, dtype=dtype, generator=make) for h in heads)
    return plan, tuple(x.requires_grad_() for x in random)


def _with_gradients(attend: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """What it gives, and the gradients of its inputs for the same upstream gradient each time."""
    out = attend()
    upstream = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def attention(device: str) -> dict:
    """A packed row's attention: the kernels that it gets, its time, and whether its gradients repeat bit for bit."""
    found = {}
    for head_dim in (64, 128):
        plan, inputs = _forest(device, torch.bfloat16, head_dim)
        both = lambda p=plan, i=inputs: _with_gradients(lambda: p.attend(0, *i, scaling=0.1), i)  # noqa: E731
        first, second = both(), both()
        found[f"heads of {head_dim}"] = {
            "tokens": inputs[0].shape[2],
            "bits_repeat": all(map(torch.equal, first, second)),
            "ms": 1e3 * median_seconds(both, device),
            "kernels": _kernels(both, 4) if device == "cuda" else [],
        }
    return found


def varlen_equals_mask(device: str) -> dict:
    """The row's attention against one under a mask in float32: relative RMS errors of the output and each gradient."""
    plan, inputs = _forest(device, torch.bfloat16, 64)
    T = inputs[0].shape[2]
    starts = [sum(plan.lengths[:s]) for s in range(len(plan.lengths))]
    seen_TT = torch.zeros(T, T, dtype=torch.bool, device=device)
    for s, path in enumerate(plan.paths):
        for a in path:
            seen_TT[starts[s] : starts[s] + plan.lengths[s], starts[a] : starts[a] + plan.lengths[a]] = True
    seen_TT &= torch.ones_like(seen_TT).tril()
    wide = tuple(x.detach().float().requires_grad_() for x in inputs)

    def masked() -> torch.Tensor:
        repeats = wide[0].shape[1] // wide[1].shape[1]
        k, v = (x.repeat_interleave(repeats, 1) for x in wide[1:])
        return scaled_dot_product_attention(wide[0], k, v, seen_TT, scale=0.1).transpose(1, 2)

    ours, theirs = _with_gradients(lambda: plan.attend(0, *inputs, scaling=0.1), inputs), _with_gradients(masked, wide)
    names = ("output", "by query", "by key", "by value")
    return {n: float((a.float() - b).norm() / b.norm()) for n, a, b in zip(names, ours, theirs, strict=True)}


def gradients(device: str) -> dict:
    """Does the same row give the same loss and the same gradients twice, to the bit? Else how far apart they are."""
    from lite_mentor.loss import backward, batch_loss

    student, batch, config = _tiny_update(device)

    def once() -> list[torch.Tensor]:
        for parameter in student.trainable():
            parameter.grad = None
        loss = batch_loss(student, batch, config).loss
        backward(loss, config)
        return [loss.detach(), *(p.grad.clone() for p in student.trainable())]

    first, second = once(), once()
    apart = [float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in zip(first, second, strict=True)]
    return {"bits_repeat": all(map(torch.equal, first, second)), "worst": max(apart), "tokens": len(batch.ids_T)}


def _tiny_update(device: str):
    """The tiny student with adapters that do something, a full row of random tokens, and its settings."""
    from lite_mentor.config import PRESETS
    from lite_mentor.fit import fullest_row
    from lite_mentor.load import load_student

    config = replace(PRESETS["tiny"], micro_tokens=4096 if device == "cuda" else 400, dtype="bf16")
    student = load_student("tiny", quant="none", dtype="bf16", device=device)
    make = torch.Generator(device).manual_seed(0)
    for p in student.trainable():
        p.data.add_(torch.randn(p.shape, device=device, generator=make) * 0.02)
    return student, fullest_row(config, student.config.vocab_size), config


def waits(device: str) -> dict:
    """How often the host waits for the GPU: in a burst of decoding, and in a row of an update."""
    from lite_mentor.loss import backward, batch_loss

    if device != "cuda":
        raise UserError("only a GPU's host waits")
    student, batch, config = _tiny_update(device)
    engine = decoding(student, rows=16, room=200)
    return {
        "burst": _waits_in(engine.step),
        "steps_in_a_burst": engine.burst,
        "row": _waits_in(lambda: backward(batch_loss(student, batch, config).loss, config)),
    }


def _waits_in(run: Callable[[], object]) -> int:
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def decoding(student, rows: int, room: int, **options):
    """An engine with so many rows that decode and never end their turn."""
    from lite_mentor.engine import Engine
    from lite_mentor.rollout import noise

    student.refresh_rollout_weights()
    engine = Engine.of(student, slots=rows, context=60 + room, **options)
    engine.eos_ids = frozenset()
    for i in range(rows):
        engine.submit([*range(40), i], noise(0, 0, str(i), 0, room))
    engine.step()
    return engine


def graphs(device: str) -> dict:
    """Can a decoding step be recorded as a CUDA graph, and does it draw what the step without one draws?"""
    from lite_mentor.load import load_student

    if device != "cuda":
        raise UserError("only a GPU has graphs")
    student, drawn = load_student("tiny", quant="none", dtype="fp32", device=device), []
    for mode in ("off", "on"):
        engine = decoding(student, rows=5, room=40, graphs=mode)
        for _ in range(3):
            engine.step()
        drawn.append([list(sequence.ids) for sequence in engine.alive])
    return {"recorded": bool(engine.decoder.graphs), "same_tokens": drawn[0] == drawn[1]}


def _kernels(run: Callable[[], object], count: int) -> list[str]:
    """The names of the kernels that take most of the time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    return [row.key[:80] for row in rows[:count]]


FACTS = (versions, rates, division, attention, varlen_equals_mask, gradients, graphs, waits, head_product)


def find(fact: Callable[[str], dict], device: str) -> dict:
    """The fact, or in `failed` why it cannot be had; and the seconds it took."""
    begin = time.perf_counter()
    try:
        found = fact(device)
    except Exception as error:  # whatever it is: the other facts are to be had all the same
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"fact": fact.__name__, **_rounded(found), "seconds": round(time.perf_counter() - begin, 2)}


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(argv: list[str]) -> None:
    """Print each fact as it is found."""
    names = [fact.__name__ for fact in FACTS]
    parser = argparse.ArgumentParser(prog="python -m bench facts")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    for fact in FACTS:
        if fact.__name__ in options.only:
            print(json.dumps(find(fact, options.device)), flush=True)
