"""Does a sequence draw the same tokens whoever decodes beside it, and does the trainer agree with the logprobs?

    python -m bench agreement [--student smollm2-135m] [--dtype bf16]

The same prompts and noise are sampled twice: all at once, and one after another on pages of another size. A product's
rounding depends on how many rows it has, so a draw that falls beside a boundary of the CDF can go the other way, and
from there the sequence is another one. Up to that point the logprobs are compared with each other, and over the whole
sequence with those that the trainer computes for an update. Greedy, each is held against transformers' own generate.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import tyro
from mentor_kernels import linear_logprob
from transformers import GenerationConfig

from bench.measure import machine
from lite_mentor.attention import PackedPlan
from lite_mentor.engine import Engine, Sampling, Sequence
from lite_mentor.load import load_student
from lite_mentor.prompt import Chat
from lite_mentor.proof import attending_by
from lite_mentor.rollout import noise
from lite_mentor.student import Student
from lite_mentor.tasks import load_suite


@dataclass(frozen=True)
class Options:
    """Tokens and logprobs of the same sequences, sampled together and alone."""

    student: str = "smollm2-135m"
    dtype: Literal["fp32", "bf16"] = "bf16"
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    task: str = "math"
    """Suite that the prompts come from."""
    sequences: int = 16
    new: int = 64
    """Tokens sampled."""


def sampled(
    student: Student, prompts: list[list[int]], new: int, temperature: float = 1.0, **how: int
) -> list[Sequence]:  # fmt: skip
    """A sequence of each prompt, under noise of its own."""
    engine = Engine.of(student, context=max(map(len, prompts)) + new, **how)
    engine.eos_ids, engine.sampling = frozenset(), Sampling(temperature)
    sequences = [engine.submit(ids, noise(0, 0, str(i), 0, new)) for i, ids in enumerate(prompts)]
    while engine.busy:
        for s in engine.step():
            engine.release(s)
    return sequences


def as_generated(student: Student, sequence: Sequence, new: int) -> bool:
    """Are these the tokens that transformers generates greedily, from the prompt alone and with the same weights?

    It stops at an end of turn, which the sequence here speaks on.
    """
    ids = sequence.ids[: sequence.prompt_length]
    model = student.rollout_model
    how = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids_1T = torch.tensor([ids], device=student.device)
    with attending_by(model, "sdpa"):
        out = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=how)[0].tolist()
    whole = len(out) == len(sequence.ids) or out[-1] in student.eos_ids
    return whole and sequence.ids[: len(out)] == out


@torch.no_grad()
def trainers_logprobs(student: Student, sequence: Sequence) -> list[float]:
    """Of the tokens after the prompt, by one forward of the model that is trained."""
    ids_T, start = torch.tensor(sequence.ids, device=student.device), sequence.prompt_length
    plan = PackedPlan([0], [-1], len(ids_T), student.device)
    hidden_TH = student.hidden(ids_T[None], torch.arange(len(ids_T))[None], plan)
    return linear_logprob(hidden_TH[start - 1 : -1], student.head_weight_VH, ids_T[start:]).logprob_N.tolist()


def compare(student: Student, options: Options) -> dict[str, float]:
    """Equal sequences, tokens before the first difference, and the logprobs' differences in nats."""
    chat = Chat(student.tokenizer)
    examples = load_suite(options.task, split="validation", size=options.sequences, seed=0, levels=None)
    prompts = [chat.prompt_ids(example) for example in examples]
    together = sampled(student, prompts, options.new, slots=options.sequences)
    alone = sampled(student, prompts, options.new, slots=1, page=5)
    same, between, gaps = 0, [], []
    for a, b in zip(together, alone, strict=True):
        first = next((t for t, (x, y) in enumerate(zip(a.ids, b.ids, strict=True)) if x != y), len(a.ids))
        start = a.prompt_length
        same += first - start
        between += [abs(x - y) for x, y in zip(a.logp[start:first], b.logp[start:first], strict=True)]
        gaps += [abs(x - y) for x, y in zip(a.logp[start:], trainers_logprobs(student, a), strict=True)]
    greedy = sampled(student, prompts, options.new, temperature=0.0, slots=options.sequences)
    return {
        "sequences": len(prompts),
        "greedy, equal to generate": sum(as_generated(student, s, options.new) for s in greedy),
        "equal": sum(a.ids == b.ids for a, b in zip(together, alone, strict=True)),
        "tokens": len(prompts) * options.new,
        "tokens before a difference": same,
        "logprob, together and alone, max": max(between, default=0.0),
        "logprob, sampler and trainer, mean": sum(gaps) / len(gaps),
        "logprob, sampler and trainer, max": max(gaps),
    }


def main(argv: list[str]) -> None:
    """Print a table and its JSON."""
    options = tyro.cli(Options, args=argv, prog="python -m bench agreement")
    student = load_student(options.student, quant="none", dtype=options.dtype, device=options.device)
    student.refresh_rollout_weights()
    found = compare(student, options)
    print("\n".join(["| what | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in found.items())]))
    about = {"command": " ".join(["python -m bench agreement", *argv]), **machine(options.device)}
    print(json.dumps({**about, **asdict(options), **found}))
