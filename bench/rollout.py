"""Sampled tokens/s of whole rollouts, one turn or several with injected results: our engine against transformers.

`generate` is transformers' own with a dynamic cache, `batching` its continuous batching with a paged cache that shares
the blocks of equal prefixes. All sample at temperature 1 over the full vocabulary from the same float weights, and
every turn has the same number of tokens; they differ in what they compute again at each turn. Rounds are interleaved;
the figures are medians. Prompts are random ids: half of each is common to all, as the text that describes the tools is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from bench.step import machine
from lite_mentor.engine import Engine, Sampling
from lite_mentor.rollout import noise
from lite_mentor.student import load_student


def main(argv: list[str]) -> None:
    """Measure, print a Markdown table, and one JSON line under it."""
    options = parse(argv)
    student = load_student(options.student, quant="none", dtype=options.dtype, device=options.device)
    student.refresh_rollout_weights()
    model = student.rollout_model  # the very weights that the engine samples from
    prompts, results = texts(options, student.head_weight_VH.shape[0])
    engine = Engine.of(student, slots=len(prompts), context=length(options))
    engine.eos_ids, engine.sampling = frozenset(), Sampling()
    ways = {
        "engine": lambda: by_engine(engine, prompts, results, options),
        "generate": lambda: by_generate(model, prompts, results, options),
        "batching": lambda: by_batching(model, prompts, results, options),
    }
    rows = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            rows[name].append(timed(way, student.device))
    sampled = len(prompts) * (options.turns + 1) * options.new
    middle = {name: middle_of(measured[1:], sampled) for name, measured in rows.items()}  # the first one warms up
    cache = sum(x.nbytes for x in (engine.pool.keys, engine.pool.values))
    found = {**vars(options), "sampled": sampled, **middle, "cache_bytes": cache}
    for name in ("generate", "batching"):
        found[f"times_{name}"] = middle["engine"]["tokens_per_s"] / middle[name]["tokens_per_s"]
    print(table(found))
    print(json.dumps({"command": "python -m bench rollout " + " ".join(argv), **machine(options.device), **found}))


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; unknown ones end the program with a usage line."""
    parser = argparse.ArgumentParser(prog="python -m bench rollout")
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    sizes = dict(prompts=4, group=4, turns=2, prompt=256, new=24, result=16, rounds=3)
    notes = dict(turns="tool turns before the last one", new="tokens sampled in a turn", result="tokens injected")
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=notes.get(name))
    return parser.parse_args(argv)


def length(options: argparse.Namespace) -> int:
    """Tokens of a finished sequence."""
    return options.prompt + (options.turns + 1) * options.new + options.turns * options.result


def texts(options: argparse.Namespace, vocabulary: int) -> tuple[list[list[int]], list[list[int]]]:
    """The prompt of each sequence, and what is injected after each tool turn."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    shared = draw(options.prompt // 2)
    prompts = [shared + draw(options.prompt - len(shared)) for _ in range(options.prompts)]
    return [p for p in prompts for _ in range(options.group)], [draw(options.result) for _ in range(options.turns)]


def timed(run: Callable[[], dict[str, float]], device: torch.device) -> dict[str, float]:
    """What `run` returns, and its seconds in all."""
    start = time.perf_counter()
    parts = run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return {"total": time.perf_counter() - start, **parts}


@torch.inference_mode()
def by_engine(engine: Engine, prompts, results, options) -> dict[str, float]:
    """Seconds in forwards that read a prompt or a result (prefill), in the other forwards (decode), and of the rest."""
    engine.weights_changed()
    seconds = {"prefill": 0.0, "decode": 0.0}
    forward = engine.forward

    def watched(ids_1T, positions_1T, plan):
        start = time.perf_counter()
        out = forward(ids_1T, positions_1T, plan)
        if out.is_cuda:
            torch.cuda.synchronize()
        seconds["prefill" if plan.multiple else "decode"] += time.perf_counter() - start
        return out

    engine.forward, begin = watched, time.perf_counter()
    room = length(options) - options.prompt
    turn_of = {id(engine.submit(p, noise(0, 0, str(i), i, room))): 0 for i, p in enumerate(prompts)}
    while engine.busy:
        for s in engine.step():
            engine.release(s)
        for s in [s for s in engine.speaking if len(s.ids) - s.turn_start == options.new]:
            engine.speaking.remove(s)
            engine.resume(s, results[turn_of[id(s)]])
            turn_of[id(s)] += 1
    engine.forward = forward
    return {**seconds, "sampling": time.perf_counter() - begin - sum(seconds.values())}


@torch.inference_mode()
def by_generate(model, prompts, results, options) -> dict[str, float]:
    """Every turn is a generate of its own with a dynamic cache, on all that was said before."""
    how = settings(options)
    ids_BT = torch.tensor(prompts, device=model.device)
    model.set_attn_implementation("sdpa")
    for injected in [*results, None]:
        ids_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=how)
        if injected is not None:
            ids_BT = torch.cat([ids_BT, torch.tensor(injected, device=model.device).expand(len(ids_BT), -1)], 1)
    model.set_attn_implementation("lite_mentor")
    if ids_BT.shape[1] != length(options):
        raise RuntimeError(f"generate stopped at {ids_BT.shape[1]} tokens instead of {length(options)}")
    return {}


def by_batching(model, prompts, results, options) -> dict[str, float]:
    """Every turn is a batch of requests to one manager, whose cache finds again what earlier turns left in it."""
    page = 16
    room = len(prompts) * (length(options) + page)
    how = ContinuousBatchingConfig(page_size=page, num_blocks=-(-room // page), max_batch_tokens=2048)
    rows = [list(prompt) for prompt in prompts]
    model.set_attn_implementation("sdpa")
    for injected in [*results, None]:
        found = model.generate_batch(
            rows, generation_config=settings(options), continuous_batching_config=how, persistent_manager=True
        )
        rows = [
            row + list(out.generated_tokens) + (injected or []) for row, out in zip(rows, found.values(), strict=True)
        ]
    model.destroy_cached_continuous_batching_manager()
    model.set_attn_implementation("lite_mentor")
    if {len(row) for row in rows} != {length(options)}:
        raise RuntimeError(f"continuous batching did not come to {length(options)} tokens")
    return {}


def settings(options: argparse.Namespace) -> GenerationConfig:
    """Plain sampling of a fixed number of tokens."""
    return GenerationConfig(
        max_new_tokens=options.new, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0
    )


def middle_of(rows: list[dict[str, float]], sampled: int) -> dict[str, float]:
    """Medians over the rounds."""
    out = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {**out, "tokens_per_s": sampled / out["total"]}


def table(found: dict) -> str:
    """All as Markdown, and where the engine's time goes."""
    lines = ["| | s | tokens/s | prefill s | decode s | sampling and bookkeeping s |", "|---|---|---|---|---|---|"]
    for name in ("engine", "generate", "batching"):
        row = found[name]
        parts = " | ".join(f"{row[part]:.2f}" if part in row else "" for part in ("prefill", "decode", "sampling"))
        lines.append(f"| {name} | {row['total']:.2f} | {row['tokens_per_s']:.1f} | {parts} |")
    ratios = f"{found['times_generate']:.2f} times generate, {found['times_batching']:.2f} times continuous batching"
    lines.append(f"\n{ratios}; the engine's cache has {found['cache_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)
