"""How many kernels one decoder layer of Qwen3-0.6B's width launches, and how many bytes they move for each token.

Nothing is timed, and no GPU is needed: every operation that PyTorch dispatches is counted as one launch, unless it only
makes a view or allocates; its bytes are those of its tensors, read or written. Models of one and of three layers are
compared, so that what does not belong to a layer drops out; rows of two lengths, so that weights do. Attention is left
out: its part returns the query and, backward, leaves gradients of the right shapes to everyone.

What is one kernel on CUDA alone (F.rms_norm, a float32 product of bf16 matrices) counts as one launch here as well. A
library's kernel may be several launches on a GPU, as cuBLAS's are where it splits a product.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import machine
from bench.rollout import QWEN3, SHAPES
from lite_mentor import lora
from lite_mentor.norms import fuse_norms
from lite_mentor.student import Student, load_student
from lite_mentor.tiny import tiny_student

ALLOCATES = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"}
LAYERS, LENGTHS = (1, 3), (16, 48)


class Counter(TorchDispatchMode):
    """Counts `launches` and `bytes` while it is active."""

    launches = bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        returns = operation._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        if operation.namespace == "aten" and not view and operation._schema.name[6:] not in ALLOCATES:
            self.launches += 1
            self.bytes += moved([args, kwargs, out])
        return out


def moved(values: object) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts; what is repeated by a stride of 0 is there once."""
    if isinstance(values, torch.Tensor):
        there = [n for n, stride in zip(values.shape, values.stride(), strict=True) if stride]
        return values.itemsize * torch.Size(there).numel()
    if isinstance(values, dict):
        values = values.values()
    return sum(moved(v) for v in values) if hasattr(values, "__iter__") and not isinstance(values, str) else 0


COUNTER = Counter()


def as_one(run: Callable) -> Callable:
    """`run`, counted as one launch that reads its inputs and writes its output."""

    def counted(*inputs, **options):
        launches, before = COUNTER.launches, COUNTER.bytes
        out = run(*inputs, **options)
        COUNTER.launches, COUNTER.bytes = launches + 1, before + moved([inputs, options, out])
        return out

    return counted


class Norm(torch.autograd.Function):
    """F.rms_norm with a frozen weight, as it is on CUDA; its gradient is not computed, only counted."""

    @staticmethod
    def forward(ctx, normalized_shape, weight, eps, x):
        ctx.save_for_backward(x, weight)
        return as_one(F.rms_norm)(x, normalized_shape, weight=weight, eps=eps)

    @staticmethod
    def backward(ctx, dout):
        return None, None, None, as_one(lambda dout, x, weight: torch.empty_like(x))(dout, *ctx.saved_tensors)


class Query(torch.autograd.Function):
    """Attention's place: everyone gets a gradient, nothing is launched."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return query.transpose(1, 2)

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


class NoAttention:
    """A plan for the model's forward."""

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        return Query.apply(query, key, value)


def train(student: Student, ids_1T: torch.Tensor, positions_1T: torch.Tensor) -> None:
    """Forward, recomputation and backward."""
    student.hidden(ids_1T, positions_1T, NoAttention()).sum().backward()


@torch.no_grad()
def forward(student: Student, ids_1T: torch.Tensor, positions_1T: torch.Tensor) -> None:
    """With adapters."""
    student.hidden(ids_1T, positions_1T, NoAttention())


def reference(student: Student, ids_1T: torch.Tensor, positions_1T: torch.Tensor) -> None:
    """Without."""
    with student.reference():
        forward(student, ids_1T, positions_1T)


@torch.inference_mode()
def twin(student: Student, ids_1T: torch.Tensor, positions_1T: torch.Tensor) -> None:
    """From the weights that are sampled from."""
    student.rollout_hidden(ids_1T, positions_1T, NoAttention())


WAYS = {"forward with adapters": forward, "forward without": reference, "forward, recomputation, backward": train,
        "decoding, merged weights": twin}  # fmt: skip


def main(argv: list[str]) -> None:
    """Count, print a Markdown table, and one JSON line under it."""
    argparse.ArgumentParser(prog="python -m bench launches").parse_args(argv)
    students = [student_of(layers) for layers in LAYERS]
    with patch.object(lora, "float32_product", as_one(lora.float32_product)):
        found = {name: one_layer(students, way) for name, way in WAYS.items()}
    print("| a layer of Qwen3-0.6B's width, without attention: counted, not timed | launches | KB a token |")
    print("|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['launches']:g} | {row['bytes'] / 1e3:.0f} |")
    print(json.dumps({"command": "python -m bench launches", **machine("cpu"), **found}))


def student_of(layers: int) -> Student:
    """With random weights and norms as on CUDA."""
    shape = {**QWEN3, **SHAPES["qwen3-0.6b"], "vocab_size": 338, "num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        path = str(tiny_student(Path(folder), **shape))
        student = load_student(path, quant="none", dtype="bf16", gradient_checkpointing=True)
    for model in (student.base, student.rollout_model):
        for name in fuse_norms(model):
            norm = model.get_submodule(name)
            norm.forward = partial(Norm.apply, *norm.forward.keywords.values())
    return student


def one_layer(students: list[Student], way: Callable) -> dict[str, float]:
    """Launches of one layer, and the bytes that they move for each token beside the weights."""
    counts = torch.zeros(len(LAYERS), len(LENGTHS), 2, dtype=torch.float64)
    for i, student in enumerate(students):
        for j, length in enumerate(LENGTHS):
            row = student, torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None]
            way(*row)  # from now on there are gradients to add to
            COUNTER.launches = COUNTER.bytes = 0
            with COUNTER:
                way(*row)
            counts[i, j] = torch.tensor([COUNTER.launches, COUNTER.bytes])
    of_a_layer = (counts[1] - counts[0]) / (LAYERS[1] - LAYERS[0])
    more_bytes = (of_a_layer[1, 1] - of_a_layer[0, 1]).item()
    return {"launches": of_a_layer[1, 0].item(), "bytes": more_bytes / (LENGTHS[1] - LENGTHS[0])}
