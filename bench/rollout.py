"""Sampled tokens/s of whole rollouts, one turn or several with injected results: our engine against transformers.

`generate` is transformers' own with a dynamic cache, `batching` its continuous batching with a paged cache that shares
the blocks of equal prefixes. All sample at temperature 1 over the full vocabulary from the same float weights, and
every turn has the same number of tokens; they differ in what they compute again at each turn. Rounds are interleaved;
the figures are those of the round with the median time. Prompts are random ids: half of each is common to all, as the
text that describes the tools is.

Decoding is held against the memory's bandwidth: the weights, keys and values that its steps had to read, over the bytes
that a copy reads and writes in the same time on the same machine. What fits into a cache can be over 100 %.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from bench.measure import copy_rate, machine
from bench.random_student import SHAPES, random_student
from lite_mentor.device import compute_device
from lite_mentor.engine import Engine, Sampling
from lite_mentor.load import load_student
from lite_mentor.proof import attending_by
from lite_mentor.rollout import noise
from lite_mentor.student import Student

PARTS = ("prefill", "decode", "sampling", "tools")


def main(argv: list[str]) -> None:
    """For each batch: measure, print a Markdown table, and one JSON line under it."""
    options = parse(argv)
    student = open_student(options)
    rate = copy_rate(options.device, options.rounds + 2)
    about = {"command": "python -m bench rollout " + " ".join(argv), **machine(options.device), "copy_rate": rate}
    for batch in options.batches or [options.prompts * options.group]:
        group = options.group if batch % options.group == 0 else 1
        sizes = argparse.Namespace(**{**vars(options), "prompts": batch // group, "group": group})
        found = measure(student, sizes, rate)
        print(table(found))
        print(json.dumps({**about, **found}), flush=True)


def open_student(options: argparse.Namespace) -> Student:
    """The one that is named, or of a named shape."""
    how = dict(
        quant="none", dtype=options.dtype, device=compute_device(options.device), rollout_weights=options.weights
    )
    if options.student not in SHAPES:
        return load_student(options.student, **how)
    with tempfile.TemporaryDirectory() as folder:
        return load_student(str(random_student(Path(folder), options.student)), **how)


def measure(student: Student, options: argparse.Namespace, rate: float) -> dict:
    """One batch, all ways; `rate` is what the machine copies in bytes a second, read and written."""
    model = student.rollout_model  # the very weights that the engine samples from
    prompts, results = texts(options, student.head_weight_VH.shape[0])
    engine = Engine.of(student, slots=len(prompts), context=length(options), graphs=options.graphs)
    engine.eos_ids, engine.sampling = frozenset(), Sampling()
    ways = {
        "engine": lambda: by_engine(engine, prompts, results, options),
        "generate": lambda: by_generate(model, prompts, results, options),
        "batching": lambda: by_batching(model, prompts, results, options),
    }
    rows = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for _ in range(options.rounds + 1):
        for name, way in ways.items():
            try:
                if name not in failed:
                    rows[name].append(timed(way, student.device))
            except Exception as error:  # of another library: the engine's own figures are to be had all the same
                if name == "engine":
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
    sampled = len(prompts) * (options.turns + 1) * options.new
    # The first one warms up.
    middle = {name: middle_of(measured[1:], sampled) for name, measured in rows.items() if name not in failed}
    ours = middle["engine"]
    ours["rest"] = ours["total"] - sum(ours[part] for part in PARTS)
    moved = ours["decode_steps"] * weight_bytes(student) + ours["decode_kv_bytes"]
    cache = sum(x.nbytes for x in (engine.pool.keys, engine.pool.values))
    found = {**vars(options), "sampled": sampled, **middle, "cache_bytes": cache, "failed": failed}
    found["decoding"] = engine.decoder.describe()
    found |= {"decode_bytes": moved, "of_bandwidth": moved / rate / ours["decode"] if ours["decode"] else None}
    for name in middle.keys() - {"engine"}:
        found[f"times_{name}"] = ours["tokens_per_s"] / middle[name]["tokens_per_s"]
    return found


def weight_bytes(student: Student) -> int:
    """What one forward must read of the weights: all but the embedding, of which a token takes one row; and the head.

    As they lie in memory: on a CPU the head of a bf16 student is a float32 copy.
    """
    model, head_VH = student.rollout_model, student.head_weight_VH
    apart = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    head = head_VH.numel() * (4 if head_VH.device.type == "cpu" else head_VH.itemsize)
    return sum(p.nbytes for p in model.parameters() if id(p) not in apart) + head


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; unknown ones end the program with a usage line."""
    parser = argparse.ArgumentParser(prog="python -m bench rollout")
    parser.add_argument("--student", default="smollm2-135m", help=f"as train.py takes it, or {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument(
        "--graphs", default="auto", choices=["auto", "on", "off"], help="decode from CUDA graphs, as --cuda-graphs"
    )
    parser.add_argument("--weights", default="merged", choices=["merged", "unmerged"], help="what is sampled from")
    sizes = dict(prompts=4, group=4, turns=2, prompt=256, new=24, result=16, rounds=3)
    notes = dict(turns="tool turns before the last one", new="tokens sampled in a turn", result="tokens injected")
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=notes.get(name))
    parser.add_argument(
        "--batches",
        type=int,
        nargs="+",
        default=[],
        help="sequences at once, one measurement each; not prompts * group",
    )
    options = parser.parse_args(argv)
    if options.graphs == "on" and not options.device.startswith("cuda"):
        parser.error("--graphs on needs a GPU")
    if min([*options.batches, *(getattr(options, name) for name in sizes if name != "turns")]) < 1 or options.turns < 0:
        parser.error("sizes and batches are at least 1, --turns at least 0")
    return options


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
        torch.cuda.synchronize(device)
    return {"total": time.perf_counter() - start, **parts}


class Split:
    """Where an engine's time goes, by the wall clock; on a GPU each part waits for the work that it started.

        prefill    forward and head of the steps that read a prompt or a result, whatever else decoded in them
        decode     forward and head of the others
        sampling   the kernel (with CUDA graphs it is part of decode)
        tools      results handed over at the end of a turn (here they are ready: nothing is run)

    What is left of the whole, bookkeeping, plans of attention and copies, is the rest.
    """

    def __init__(self, engine: Engine):
        self.seconds, self.decode_steps, self.decode_kv_bytes = dict.fromkeys(PARTS, 0.0), 0, 0
        self.engine, self.decoder, self._kind = engine, engine.decoder, "prefill"
        self._before = {name: vars(self.decoder).get(name) for name in ("run", "forward", "head", "draw")}

    def __enter__(self) -> Split:
        decoder, pool = self.decoder, self.engine.pool
        forward, head, draw, run_steps = decoder.forward, decoder.head, decoder.draw, decoder.run
        token_bytes = sum(cache[:, 0, 0].nbytes for cache in (pool.keys, pool.values))

        def run(ids, uniforms, spans, *, prefix, sampling):
            steps = len(uniforms[0])
            for k in range(steps):  # each row reads its own keys and values, and all together the prefix once
                self.decode_kv_bytes += token_bytes * (prefix + sum(s.end - s.shared + k for s in spans))
            self.decode_steps += steps
            self._kind = "decode"
            count = self.within if decoder.graphs else lambda _, run, *inputs, **options: run(*inputs, **options)
            out = count("decode", run_steps, ids, uniforms, spans, prefix=prefix, sampling=sampling)
            self._kind = "prefill"
            return out

        decoder.run = run
        decoder.forward = lambda *inputs: self.part(self._kind, forward, *inputs)
        decoder.head = lambda hidden_RH: self.part(self._kind, head, hidden_RH)
        decoder.draw = lambda *inputs: self.part("sampling", draw, *inputs)
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            delattr(self.decoder, name)
            if value is not None:
                setattr(self.decoder, name, value)

    def part(self, name: str, run: Callable, *inputs):
        """As `within`, but not while a graph is recorded: nobody can wait for that."""
        inside = self.decoder.graphs and self._kind == "decode"
        return run(*inputs) if inside else self.within(name, run, *inputs)

    def within(self, name: str, run: Callable, *inputs, **options):
        """What `run` returns; its seconds count for part `name`."""
        begin = time.perf_counter()
        out = run(*inputs, **options)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        self.seconds[name] += time.perf_counter() - begin
        return out


@torch.inference_mode()
def by_engine(engine: Engine, prompts, results, options) -> dict[str, float]:
    """Seconds of each part, and what the decoding steps read of keys and values."""
    engine.weights_changed()
    room = length(options) - options.prompt
    with Split(engine) as split:
        turn_of = {id(engine.submit(p, noise(0, 0, str(i), i, room))): 0 for i, p in enumerate(prompts)}

        def hand_over(sequences) -> None:
            for s in sequences:
                engine.speaking.remove(s)
                engine.resume(s, results[turn_of[id(s)]])
                turn_of[id(s)] += 1

        burst = engine.burst
        try:
            while engine.busy:
                # Turns end by their length here, which no burst may pass.
                engine.burst = min([burst, *(options.new - len(s.ids) + s.turn_start for s in engine.speaking)])
                for s in engine.step():
                    engine.release(s)
                ended = [s for s in engine.speaking if len(s.ids) - s.turn_start == options.new]
                split.within("tools", hand_over, ended)
        finally:
            engine.burst = burst
    return {**split.seconds, "decode_steps": split.decode_steps, "decode_kv_bytes": split.decode_kv_bytes}


@torch.inference_mode()
def by_generate(model, prompts, results, options) -> dict[str, float]:
    """Every turn is a generate of its own with a dynamic cache, on all that was said before."""
    how = settings(options)
    ids_BT = torch.tensor(prompts, device=model.device)
    with attending_by(model, "sdpa"):
        for injected in [*results, None]:
            ids_BT = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=how)
            if injected is not None:
                ids_BT = torch.cat([ids_BT, torch.tensor(injected, device=model.device).expand(len(ids_BT), -1)], 1)
    if ids_BT.shape[1] != length(options):
        raise RuntimeError(f"generate stopped at {ids_BT.shape[1]} tokens instead of {length(options)}")
    return {}


def by_batching(model, prompts, results, options) -> dict[str, float]:
    """Every turn is a batch of requests to one manager, whose cache finds again what earlier turns left in it."""
    page = 16
    room = len(prompts) * (length(options) + page)
    how = ContinuousBatchingConfig(**{page_field(): page}, num_blocks=-(-room // page), max_batch_tokens=2048)
    rows = [list(prompt) for prompt in prompts]
    with attending_by(model, "sdpa"):
        try:
            for injected in [*results, None]:
                found = model.generate_batch(
                    rows, generation_config=settings(options), continuous_batching_config=how, persistent_manager=True
                )
                outs = zip(rows, found.values(), strict=True)
                rows = [row + list(out.generated_tokens) + (injected or []) for row, out in outs]
        finally:
            model.destroy_cached_continuous_batching_manager()
    if {len(row) for row in rows} != {length(options)}:
        raise RuntimeError(f"continuous batching did not come to {length(options)} tokens")
    return {}


def page_field() -> str:
    """What this version of transformers calls the tokens of a page: `block_size` until 5.17, later `page_size`."""
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    return "page_size" if "page_size" in names else "block_size"


def settings(options: argparse.Namespace) -> GenerationConfig:
    """Plain sampling of a fixed number of tokens."""
    return GenerationConfig(
        max_new_tokens=options.new, do_sample=True, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0
    )


def middle_of(rows: list[dict[str, float]], sampled: int) -> dict[str, float]:
    """The round whose total is the median (the lower of two): its parts, unlike medians of each, add up."""
    out = sorted(rows, key=lambda row: row["total"])[(len(rows) - 1) // 2]
    return {**out, "tokens_per_s": sampled / out["total"]}


def table(found: dict) -> str:
    """All as Markdown, and where the engine's time goes."""
    parts = [*PARTS, "rest"]
    lines = [
        "| | s | tokens/s | " + " | ".join(f"{part} s" for part in parts) + " |",
        "|---" * (len(parts) + 3) + "|",
    ]
    for name in ("engine", "generate", "batching"):
        if name in found["failed"]:
            lines.append(f"| {name} | failed: {found['failed'][name]} |")
            continue
        row = found[name]
        split = " | ".join(f"{row[part]:.2f}" if part in row else "" for part in parts)
        lines.append(f"| {name} | {row['total']:.2f} | {row['tokens_per_s']:.1f} | {split} |")
    names = {"generate": "generate", "batching": "continuous batching"}
    ratios = ", ".join(f"{found[f'times_{n}']:.2f} times {what}" for n, what in names.items() if f"times_{n}" in found)
    batch, cache = found["prompts"] * found["group"], found["cache_bytes"] / 2**20
    lines.append(f"\nbatch {batch}: {ratios or 'nothing to compare with'}; the engine's cache has {cache:.0f} MiB")
    if found["of_bandwidth"] is not None:
        steps, share = found["engine"]["decode_steps"], found["of_bandwidth"]
        each = found["decode_bytes"] / steps / 2**20
        lines.append(
            f"decode: {steps} steps, {each:.1f} MiB of weights, keys and values each: {share:.0%} of what a copy moves"
        )
    return "\n".join(lines)
