"""Makes soft labels: what a larger model thinks of each token of the teacher's records that the cold start learns from.

    python -m lite_mentor.label --model Qwen/Qwen3-8B --preset modern --soft-labels cache/soft.safetensors
    python train.py --preset modern --soft-labels cache/soft.safetensors

All flags but --model, --labels and --adapter are train.py's own, so that the same records are laid out in the same
tokens; only here --soft-labels is written. The model reads them as the student would; it must have the student's
vocabulary, token for token (Qwen3-8B for Qwen3-1.7B).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from rich.progress import track

from lite_mentor import sft, soft
from lite_mentor.assets import scratch_folder
from lite_mentor.batch import pack
from lite_mentor.config import Config, parse
from lite_mentor.device import compute_device
from lite_mentor.errors import UserError, guard_terminal, say
from lite_mentor.load import load_student, load_tokenizer
from lite_mentor.loss import sampled_hidden
from lite_mentor.prompt import Chat
from lite_mentor.run import training_examples
from lite_mentor.sandbox import open_sandbox
from lite_mentor.student import Student
from lite_mentor.types import Rollout

LOGIT_ROWS = 256
"""Tokens whose logits over the whole vocabulary are held at once: 150 MB for Qwen3."""


def label(teacher: Student, name: str, rollouts: Sequence[Rollout], k: int) -> soft.SoftLabels:
    """The teacher's k likeliest tokens at every sampled token of the rollouts."""
    ids, logps, first, rows = [], [], {}, 0
    for rollout in track(rollouts, "labels", disable=not sys.stdout.isatty()):
        key = soft.key_of(rollout)
        if key in first:
            continue
        first[key] = rows
        for logp_RK, ids_RK in likeliest(teacher, rollout, k):
            ids.append(ids_RK.int().cpu())
            logps.append(logp_RK.cpu())
            rows += len(ids_RK)
    return soft.SoftLabels(name, torch.cat(ids), torch.cat(logps), first)


@torch.no_grad()
def likeliest(teacher: Student, rollout: Rollout, k: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """(logprobs, ids) [R, k] of one rollout's sampled tokens, LOGIT_ROWS at a time."""
    (batch,) = pack([rollout], [0.0], len(rollout.ids))
    words = len(teacher.tokenizer)  # a head may have more rows, which stand for nothing
    for hidden_RH in sampled_hidden(teacher, batch).split(LOGIT_ROWS):
        yield torch.log_softmax(teacher.rollout_logits(hidden_RH), -1)[:, :words].topk(k)


def student_records(config: Config) -> tuple[list[Rollout], dict[str, int]]:
    """The cold start's records as this run's student reads them, and its vocabulary."""
    # The quarantine's folder is for this time, for the run will write it again.
    with scratch_folder() as scratch, open_sandbox(config.sandbox) as sandbox:
        if sandbox.way == "limits only":
            say(sandbox.note, sys.stderr)
        examples, teacher = training_examples(config, scratch, sandbox.describe, say)
    tokenizer = load_tokenizer(config.student)
    chosen = examples[: config.sft_steps * config.sft_batch]
    rollouts = sft.teacher_rollouts(Chat(tokenizer, config.date), chosen, teacher, config)
    return rollouts, tokenizer.get_vocab()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 after one sentence; 130 when interrupted."""
    guard_terminal()
    parser = argparse.ArgumentParser(
        prog="python -m lite_mentor.label", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="the larger model: a folder, a hub id, or smollm2-135m")
    parser.add_argument("--adapter", type=Path, help="a folder with PEFT adapters for it, of this run's --lora-rank")
    parser.add_argument("--labels", type=int, default=16, metavar="K", help="tokens kept at each position (16)")
    # Written to, so it is asked for here: a resumed run's config.json, which may be a stranger's, could name any file.
    parser.add_argument("--soft-labels", type=Path, metavar="FILE", help="the file to write")
    own, rest = parser.parse_known_args(argv)
    try:
        config = parse(rest)
        if not own.soft_labels or not config.sft_steps:
            raise UserError("--soft-labels must name the file to write, and --sft-steps must not be 0.")
        if own.labels < 1:
            raise UserError(f"--labels is {own.labels}; keep 1 token or more at each position.")
        soft.check_path(own.soft_labels)
        config = replace(config, device=compute_device(config.device), date=config.date or str(date.today()))
        rollouts, vocabulary = student_records(config)
        teacher = load_student(
            own.model, quant=config.quant, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha,
            device=config.device, dtype=config.dtype, rollout_weights="unmerged",
            context=config.longest_rollout,
        )  # fmt: skip
        if teacher.tokenizer.get_vocab() != vocabulary:
            raise UserError(f"{own.model} has another vocabulary than {config.student}; take a model of its family.")
        if own.adapter:
            teacher.load_adapter(own.adapter)
        labels = label(teacher, own.model, rollouts, min(own.labels, len(vocabulary)))
        soft.write(own.soft_labels, replace(labels, date=config.date))
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; nothing was written", sys.stderr)
        return 130
    mass = float(labels.logp_NK.exp().sum(1).mean())
    say(
        f"{own.soft_labels}: {len(labels.ids_NK)} tokens of {len(labels.first)} records, "
        f"{labels.ids_NK.shape[1]} labels each, which hold {mass:.2%} of the probability"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
