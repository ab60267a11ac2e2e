"""Soft labels: a teacher's K likeliest tokens, with their logprobs, at every token that its records have it say.

A record's token says what the teacher did; its distribution says what else it might have done, and how sure it was. The
cold start can learn from both:

    loss of a token  =  (1 - w) (-log p_y)  +  w sum over k of q_k (log q_k - log p_k)

(knowledge distillation, Hinton et al. 2015, arXiv 1503.02531, from a cache). `lite_mentor.label` writes the file. The
labels are found by the tokens that they are for, so those of another prompt, template or record are never mistaken for
them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lite_mentor.errors import UserError
from lite_mentor.files import open_file, replace_file
from lite_mentor.types import Rollout


@dataclass(frozen=True)
class SoftLabels:
    """What a teacher thinks of the sampled tokens of some rollouts."""

    teacher: str
    ids_NK: torch.Tensor
    """int32: the likeliest tokens, of all rollouts' sampled positions one after another."""
    logp_NK: torch.Tensor
    """float32: their logprobs."""
    first: Mapping[str, int]
    """Row of each rollout's first label, by `key_of`."""
    date: str = ""
    """The day that the rollouts' template was told (Config.date)."""

    def of(self, rollouts: Sequence[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [N, K] int64, logprobs [N, K]) of these rollouts' sampled tokens. UserError where there are none."""
        rows = []
        for rollout in rollouts:
            start = self.first.get(key_of(rollout))
            if start is None:
                raise UserError(
                    f"The soft labels of {self.teacher} have none for the record of example {rollout.example_key}; "
                    "make them again with this run's flags: python -m lite_mentor.label."
                )
            rows.append(torch.arange(start, start + int(rollout.sampled.sum())))
        at_N = torch.cat(rows)
        return self.ids_NK[at_N].long(), self.logp_NK[at_N]


def key_of(rollout: Rollout) -> str:
    """Hash of a rollout's tokens, and of which of them are labelled."""
    return hashlib.sha256(rollout.ids.numpy().tobytes() + rollout.sampled.numpy().tobytes()).hexdigest()


def check_path(path: Path) -> None:
    """Raise UserError where `write` could put no file, before hours are spent on what it would hold."""
    if not path.name or os.path.isdir(path):
        raise UserError(f"--soft-labels {path} is a folder; name the file to write in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".tmp-{path.name}", dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make room or rights there.") from error


def write(path: Path, labels: SoftLabels) -> None:
    """One safetensors file, whole or not at all. Raises UserError when it cannot be written."""
    check_path(path)
    tensors = {"ids": labels.ids_NK.contiguous(), "logp": labels.logp_NK.contiguous()}
    about = json.dumps({"teacher": labels.teacher, "first": dict(labels.first), "date": labels.date})
    content = save(tensors, metadata={"labels": about, "sha256": _digest(tensors, about)})
    try:
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make room or rights there.") from error


def read(path: Path) -> SoftLabels:
    """What `write` wrote. Raises UserError when it is not there, damaged, or of another kind."""
    try:
        with open_file(path), safe_open(path, "pt") as file:  # the first waits for no writer of a pipe
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if about["sha256"] != _digest(tensors, about["labels"]):
            raise ValueError("its sha256 does not match its content")
        content = json.loads(about["labels"])
        date = content.get("date", "")
        return SoftLabels(content["teacher"], tensors["ids"], tensors["logp"], content["first"], date)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"--soft-labels {path} cannot be read ({error}); make it with python -m lite_mentor.label."
        ) from error


def _digest(tensors: Mapping[str, torch.Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
