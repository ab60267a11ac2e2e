"""Does a preset fit the card it is named after? `python -m bench caps --preset 8gb`, on any larger card, offline.

The card's size is emulated: torch may take that much less what the driver keeps for a process, and code that asks for
free memory hears what such a card would say. The student has random weights of the preset's size. The run is opened as
train.py opens it (the fullest row is differentiated, then the engine takes its cache), and one step at full length
follows: rollouts until the length limit, an update on all of them.

`fits` means that the memory which torch RESERVED at most, and what the process holds of the card beside it, are
together no more than the card's size. What is allocated within it is less, and says nothing of fragmentation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from bench.measure import machine
from bench.random_student import random_student
from lite_mentor.config import PRESETS, Config
from lite_mentor.errors import UserError
from lite_mentor.reward import score
from lite_mentor.rollout import roll_out
from lite_mentor.run import Run, prepare
from lite_mentor.types import Scored
from train import update

GIB = 2**30
CARDS = {"8gb": (8, "qwen3-0.6b"), "12gb": (12, "qwen3-1.7b"), "16gb": (16, "qwen3-1.7b"), "24gb": (24, "qwen3-4b")}
"""By preset: the card's GiB, and the shape of its student."""
CONTEXT_GIB = 0.6
"""What a process holds of a card beside torch's memory: CUDA's context and the code of the kernels. An estimate; what
it was is reported."""
PROMPTS = 2
"""Of the step. Its rollouts are as long as the preset's but few: only a row of them is differentiated at once."""


@contextmanager
def card_of(gib: float) -> Iterator[None]:
    """Within it, torch takes no more than such a card has, and tells of no more."""
    room = int((gib - CONTEXT_GIB) * GIB)
    whole = torch.cuda.get_device_properties(0).total_memory
    if room > whole:
        raise UserError(f"A card of {gib} GiB cannot be emulated on one of {whole / GIB:.1f} GiB.")

    def mem_get_info(device: object = None) -> tuple[int, int]:
        return max(0, room - torch.cuda.memory_reserved()), int(gib * GIB)

    torch.cuda.set_per_process_memory_fraction(room / whole)
    try:
        with patch.object(torch.cuda, "mem_get_info", mem_get_info):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def settings(preset: str, student: Path, out: Path, device: str) -> Config:
    """The preset, with a task whose questions need no real student; its lengths are the preset's."""
    return replace(
        PRESETS[preset], student=str(student), out=str(out), device=device, task="tiny", levels=(1,), train_size=300,
        sft_steps=0, eval_suites=("validation",), eval_size=4, sandbox="off",
    )  # fmt: skip


def whole_step(run: Run) -> dict[str, float]:
    """Rollouts and an update on all of them, as in training; with advantages that are not 0, whatever they earned."""
    run = replace(run, config=replace(run.config, prompts_per_step=PROMPTS))
    c, begin = run.config, time.perf_counter()
    run.refresh_rollouts()
    rollouts = roll_out(
        run.engine, run.chat, run.take(0), group_size=c.group_size, limits=run.limits, sampling=run.sampling,
        seed=c.seed, step=0, run_call=run.run_call,
    )  # fmt: skip
    middle = time.perf_counter()
    scored: Sequence[Scored] = score(run.by_key, rollouts, run.teacher, c)[0]
    learned = update(run, [replace(s, advantage=(-1.0) ** i) for i, s in enumerate(scored)], 0)
    end = time.perf_counter()
    longest = max(len(rollout.ids) - rollout.prompt_length for rollout in rollouts)
    return {
        "rollouts": len(rollouts), "longest": longest, "rollout_s": middle - begin, "update_s": end - middle,
        "grad_norm": learned["grad_norm"],
    }  # fmt: skip


def prove(config: Config) -> dict:
    """Open the run, take the step; `fits` is False where it ran out of memory or refused to start for lack of it."""
    found: dict = {"fits": True}
    try:
        with prepare(config) as run:
            found |= {"micro_tokens": run.config.micro_tokens, "engine": run.engine.describe(), **whole_step(run)}
    except (torch.OutOfMemoryError, UserError) as error:
        found |= {"fits": False, "why": str(error).splitlines()[0]}
    return found


def memory(gib: float, free: int, whole: int) -> dict[str, float | bool]:
    """The most that torch reserved and allocated, and what the process held beside; `free` as the real card says it."""
    reserved, beside = torch.cuda.max_memory_reserved(), whole - free - torch.cuda.memory_reserved()
    return {
        "reserved_gib": reserved / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated() / GIB,
        "context_gib": beside / GIB,
        "within": reserved + beside <= gib * GIB,
    }


def main(argv: list[str]) -> None:
    """One JSON line; exit status 1 when the preset does not fit."""
    parser = argparse.ArgumentParser(prog="python -m bench caps")
    parser.add_argument("--preset", choices=CARDS, required=True)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("bench caps measures a GPU's memory, and PyTorch sees no GPU here.")
    gib, shape = CARDS[options.preset]
    about = {"command": "python -m bench caps " + " ".join(argv), **machine("cuda"), "gib": gib, "student": shape}
    with tempfile.TemporaryDirectory() as folder:
        student = random_student(Path(folder) / "student", shape)
        torch.cuda.init()
        with card_of(gib):
            found = prove(settings(options.preset, student, Path(folder) / "run", "cuda"))
    found |= memory(gib, *torch.cuda.mem_get_info())
    found["fits"] = found["fits"] and found["within"]
    print(json.dumps(about | found), flush=True)
    if not found["fits"]:
        sys.exit(1)
