"""The parts of a rollout and of an update that no other bench times alone: `python -m bench micro`, a JSON line each.

    sample    a token of each row of logits, as the engine draws it
    paged     attention of decoding rows over pages of keys and values
    tables    a burst's tables of pages on the host: as nested lists, and as they are patched
    decode    a whole decoding step of the engine, from a CUDA graph and without one: wall clock, GPU, launches
    layer     a decoder layer at the width of a packed row, without attention: with adapters, without, its bare products

Each is held against its floor: the bytes that it must move over what a copy moves in the same time on this machine, or
its operations over those of a large bf16 product. Without a GPU the sizes are tiny, which shows only that all run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from mentor_kernels import PagedRows, paged_attention, sample

from bench.facts import decoding, rates
from bench.measure import machine, median_seconds
from bench.random_student import random_student
from bench.rollout import weight_bytes
from lite_mentor.load import load_student
from lite_mentor.paging import PagePool, RowBlock, Span
from lite_mentor.student import Student

SMALL = dict(
    hidden_size=64, intermediate_size=128, vocab_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
"""Of a student on a CPU."""


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do in a second."""

    bytes: float
    flop: float


def sampling(device: str, ceilings: Ceilings) -> Iterator[dict]:
    """Rows of float32 logits over Qwen3's vocabulary; the floor reads them once."""
    V = 151_936 if device == "cuda" else 300
    for B in (1, 8, 64, 128) if device == "cuda" else (2,):
        logits_BV, uniform_B = torch.randn(B, V, device=device) * 3, torch.rand(B, device=device)
        ways = dict(plain={}, greedy=dict(temperature=0.0), top_k=dict(top_k=20), top_p=dict(top_p=0.95))
        us = {
            name: 1e6 * median_seconds(lambda z=logits_BV, u=uniform_B, how=how: sample(z, u, **how), device)
            for name, how in ways.items()
        }
        yield {"what": "sample", "rows": B, "us": us, "floor_us": 1e6 * logits_BV.nbytes / ceilings.bytes}


def paged(device: str, ceilings: Ceilings) -> Iterator[dict]:
    """Heads of Qwen3-0.6B; every row reads its own keys and values, and all together the shared prefix once."""
    D, kv_heads, heads, page = 128, 8, 16, 16
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = ((8, 600, 0), (64, 600, 0), (128, 300, 400), (64, 3000, 0)) if device == "cuda" else ((2, 40, 8),)
    for B, own, prefix in sizes:
        first, count = -(-prefix // page), -(-own // page)
        keys, values = torch.randn(2, first + B * count, page, kv_heads, D, device=device, dtype=dtype).unbind()
        tables_BN = torch.arange(B * count, device=device).view(B, count) + first
        shared_B = torch.full((B,), prefix, device=device)
        rows = PagedRows(tables_BN, shared_B, shared_B + own, prefix, page)
        query_BQD = torch.randn(B, heads, D, device=device, dtype=dtype)
        run = lambda q=query_BQD, k=keys, v=values, r=rows: paged_attention(q, k, v, r, scaling=0.1)  # noqa: E731
        seconds, moved = median_seconds(run, device), (B * own + prefix) * 2 * kv_heads * D * keys.itemsize
        yield {
            "what": "paged attention", "rows": B, "own": own, "prefix": prefix, "us": 1e6 * seconds,
            "of_bandwidth": moved / seconds / ceilings.bytes,
        }  # fmt: skip


def tables(device: str, ceilings: Ceilings) -> Iterator[dict]:
    """128 rows of as many pages as the presets modern and paper have; host time, and the copy to the device."""
    rows, steps, page = 128, 8, 16
    pool = PagePool(layers=1, pages=1, page=page, kv_heads=1, head_dim=1, device=device, dtype=torch.float32)
    for width in (224, 608):
        held = [[r * width + i for i in range(width - 8)] for r in range(rows)]
        ids, uniforms, block = [1] * rows, [[0.5] * steps] * rows, RowBlock(pool, rows, steps, width)

        def spans(held=held) -> list[Span]:
            return [Span(pages, 0, len(pages) * page - 8, len(pages) * page - 7) for pages in held]

        def nested(spans=spans, width=width) -> None:
            torch.tensor([s.pages + [pool.spare] * (width - len(s.pages)) for s in spans()], device=device)

        def patch(change=lambda: None, block=block, spans=spans, ids=ids, uniforms=uniforms) -> None:
            change()
            block.fill(spans(), ids, uniforms)

        def grow(held=held) -> None:
            for pages in held[::2]:
                pages[-1] += 1

        patch()
        ways = {
            "nested_lists": nested, "unchanged": patch, "half_end_elsewhere": lambda p=patch, g=grow: p(g),
            "all_moved": lambda p=patch, h=held: p(lambda: h.append(h.pop(0))),
        }  # fmt: skip
        us = {name: 1e6 * median_seconds(run, device) for name, run in ways.items()}
        yield {"what": "tables", "rows": rows, "pages": width, "us": us}


def student_of(device: str, layers: int | None, **options: object) -> Student:
    """Qwen3-0.6B's shape with random weights; on a CPU a tiny one."""
    changes = {"num_hidden_layers": layers} if layers else {}
    with tempfile.TemporaryDirectory() as folder:
        random_student(Path(folder), "qwen3-0.6b", **({} if device == "cuda" else SMALL), **changes)
        return load_student(folder, quant="none", dtype="bf16", device=device, **options)


def decode(device: str, ceilings: Ceilings) -> Iterator[dict]:
    """Milliseconds of one step on the wall clock and of the GPU's kernels, and how many kernels; the floor reads the
    weights, keys and values once."""
    student = student_of(device, None if device == "cuda" else 2)
    for mode in ("off", "on") if device == "cuda" else (None,):
        for rows in (8, 64) if device == "cuda" else (2,):
            engine = decoding(student, rows, 500, **({"graphs": mode} if mode else {}))
            for _ in range(3):
                engine.step()
            wall = _wall_seconds(engine.step, device, 5) / engine.burst
            pool, length = engine.pool, len(engine.alive[0].ids)
            token_bytes = sum(cache[:, 0, 0].nbytes for cache in (pool.keys, pool.values))
            floor = (weight_bytes(student) + rows * length * token_bytes) / ceilings.bytes
            found = {
                "what": "decode step",
                "graphs": mode,
                "rows": rows,
                "ms_wall": 1e3 * wall,
                "floor_ms": 1e3 * floor,
            }
            yield found | (_on_the_gpu(engine.step, engine.burst) if device == "cuda" else {})
            engine.abandon()


def _wall_seconds(run, device: str, repeats: int) -> float:
    """Of one of several calls that follow each other."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - begin) / repeats


def _on_the_gpu(run, steps: int) -> dict:
    """Milliseconds that kernels ran in each of so many steps, how many there were, and where the time went."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_device_time_total)
    rows = [row for row in rows if row.self_device_time_total > 0]
    return {
        "ms_gpu": sum(row.self_device_time_total for row in rows) / 1e3 / steps,
        "kernels": sum(row.count for row in rows) / steps,
        "us_of": {row.key[:48]: row.self_device_time_total / steps for row in rows[:6]},
    }


class NoAttention:
    """A plan that leaves attention out."""

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """The query, and the keys and values so that they get a gradient."""
        repeats = query.shape[1] // key.shape[1]
        return (query + (key + value).repeat_interleave(repeats, 1)).transpose(1, 2)


def layer(device: str, ceilings: Ceilings) -> Iterator[dict]:
    """The difference between three layers and one; the floor is the layer's own products at the speed of a large one.

    Backward is that of the adapters: the products are done once more for the gradient of the input.
    """
    tokens, times = 8192 if device == "cuda" else 32, {}
    for layers in (1, 3):
        student = student_of(device, layers, lora_rank=32, lora_alpha=64)
        vocabulary = student.config.vocab_size
        ids, at = torch.randint(vocabulary, (1, tokens), device=device), torch.arange(tokens, device=device)[None]
        upstream = torch.randn(tokens, student.config.hidden_size, device=device, dtype=torch.bfloat16)

        def forward(context=nullcontext, student=student, ids=ids, at=at) -> None:
            with torch.no_grad(), context():
                student.hidden(ids, at, NoAttention())

        def both(student=student, ids=ids, at=at, upstream=upstream) -> None:
            student.hidden(ids, at, NoAttention()).backward(upstream)

        ways = {"forward": forward, "bare_forward": lambda s=student, f=forward: f(s.reference), "both": both}
        times[layers] = {name: median_seconds(run, device, 5) for name, run in ways.items()}
    ms = {name: 1e3 * (times[3][name] - times[1][name]) / 2 for name in times[1]}
    weights = sum(p.numel() for n, p in student.base.named_parameters() if "layers.0." in n and "lora_" not in n)
    floor = 1e3 * 2 * weights * tokens / ceilings.flop
    yield {"what": "layer", "tokens": tokens, "ms": ms, "floor_ms": {"forward": floor, "both": 2 * floor}}


PARTS = {"sample": sampling, "paged": paged, "tables": tables, "decode": decode, "layer": layer}


def main(argv: list[str]) -> None:
    """Print each figure as it comes; a part that fails says so and costs no other."""
    parser = argparse.ArgumentParser(prog="python -m bench micro")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    found = rates(options.device)
    ceilings = Ceilings(found["copy_gb_per_s"] * 1e9, found["bf16_tflop_per_s"] * 1e12)
    print(json.dumps({"command": "python -m bench micro " + " ".join(argv), **machine(options.device), **found}))
    failed = []
    for name in options.only:
        try:
            for row in PARTS[name](options.device, ceilings):
                print(json.dumps(row), flush=True)
        except Exception as error:  # whatever it is: the other figures are to be had all the same
            print(json.dumps({"what": name, "failed": f"{type(error).__name__}: {str(error)[:300]}"}), flush=True)
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
