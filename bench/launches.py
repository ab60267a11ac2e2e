"""How many kernels a decoder layer of Qwen3-0.6B's width launches, and how many bytes they move for each token.

Nothing is timed and no GPU is needed: each operation that PyTorch dispatches is one launch, unless it makes a view or
allocates, and moves the bytes of its tensors. One layer is three less one, halved; the bytes are the difference of two
lengths, so that weights drop out. Attention is left out. What is one kernel on CUDA alone (F.rms_norm, and float32
products of bf16 matrices) counts as one here; what is several there, as a product that cuBLAS splits, does too.
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
from bench.random_student import QWEN3, SHAPES
from lite_mentor import lora
from lite_mentor.load import load_student
from lite_mentor.norms import fuse_norms
from lite_mentor.student import Student
from lite_mentor.tiny import tiny_student

ALLOCATES = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"}
LAYERS, LENGTHS = (1, 3), (16, 48)


class Counter(TorchDispatchMode):
    """Counts `launches` and `bytes` while it is active."""

    launches = bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        alias = operation._schema.returns[0].alias_info if operation._schema.returns else None
        view = alias is not None and not alias.is_write
        if operation.namespace == "aten" and not view and operation._schema.name[6:] not in ALLOCATES:
            self.launches, self.bytes = self.launches + 1, self.bytes + moved([args, kwargs, out])
        return out

    def as_one(self, run: Callable) -> Callable:
        """`run`, counted as one launch that reads its inputs and writes its output."""

        def counted(*inputs, **options):
            before = self.launches, self.bytes
            out = run(*inputs, **options)
            self.launches, self.bytes = before[0] + 1, before[1] + moved([inputs, options, out])
            return out

        return counted


def moved(values: object) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts; what a stride of 0 repeats is there once."""
    if isinstance(values, torch.Tensor):
        there = [n for n, stride in zip(values.shape, values.stride(), strict=True) if stride]
        return values.itemsize * torch.Size(there).numel()
    values = values.values() if isinstance(values, dict) else values
    return sum(moved(v) for v in values) if isinstance(values, (tuple, list, type({}.values()))) else 0


COUNTER = Counter()


class Norm(torch.autograd.Function):
    """F.rms_norm with a frozen weight, as it is on CUDA; its gradient is counted, not computed."""

    @staticmethod
    def forward(ctx, normalized_shape, weight, eps, x):
        ctx.save_for_backward(x, weight)
        return COUNTER.as_one(F.rms_norm)(x, normalized_shape, weight=weight, eps=eps)

    @staticmethod
    def backward(ctx, dout):
        return None, None, None, COUNTER.as_one(lambda dout, x, weight: torch.empty_like(x))(dout, *ctx.saved_tensors)


class NoAttention(torch.autograd.Function):
    """A plan that returns the query, leaves a gradient to everyone, and launches nothing."""

    @staticmethod
    def attend(layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        return NoAttention.apply(query, key, value)

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return query.transpose(1, 2)

    @staticmethod
    def backward(ctx, dout):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


@torch.no_grad()
def reference(student: Student, *row) -> None:
    """The forward with the adapters off."""
    with student.reference():
        student.hidden(*row)


WAYS: dict[str, Callable] = {
    "forward with adapters": torch.no_grad()(Student.hidden),
    "forward without": reference,
    "forward, recomputation and backward": lambda student, *row: student.hidden(*row).sum().backward(),
    "a decoding step, merged weights": torch.inference_mode()(Student.rollout_hidden),
}


def main(argv: list[str]) -> None:
    """Count, print a Markdown table, and one JSON line under it."""
    argparse.ArgumentParser(prog="python -m bench launches").parse_args(argv)
    students = [student_of(layers) for layers in LAYERS]
    with patch.object(lora, "float32_product", COUNTER.as_one(lora.float32_product)):
        found = {name: of_a_layer(students, way) for name, way in WAYS.items()}
    print("| a layer of Qwen3-0.6B's width, without attention: counted, not timed | launches | KB a token |")
    print("|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['launches']:g} | {row['bytes'] / 1e3:.0f} |")
    print(json.dumps({"command": "python -m bench launches", **machine("cpu"), **found}))


def student_of(layers: int) -> Student:
    """With random weights, and norms as on CUDA."""
    shape = {**QWEN3, **SHAPES["qwen3-0.6b"], "vocab_size": 338, "num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as folder:
        path = str(tiny_student(Path(folder), **shape))
        student = load_student(path, quant="none", dtype="bf16", gradient_checkpointing=True)
    for model in (student.base, student.rollout_model):
        for norm in map(model.get_submodule, fuse_norms(model)):
            norm.forward = partial(Norm.apply, *norm.forward.keywords.values())
    return student


def of_a_layer(students: list[Student], way: Callable) -> dict[str, float]:
    """Launches of one layer, and the bytes that they move for each token beside the weights."""
    counts = torch.zeros(len(students), len(LENGTHS), 2, dtype=torch.float64)
    for i, student in enumerate(students):
        for j, length in enumerate(LENGTHS):
            row = student, torch.zeros(1, length, dtype=torch.long), torch.arange(length)[None], NoAttention
            way(*row)  # from now on there are gradients to add to
            COUNTER.launches = COUNTER.bytes = 0
            with COUNTER:
                way(*row)
            counts[i, j] = torch.tensor([COUNTER.launches, COUNTER.bytes])
    short, long = (counts[1] - counts[0]) / (LAYERS[1] - LAYERS[0])
    return {"launches": long[0].item(), "bytes": (long - short)[1].item() / (LENGTHS[1] - LENGTHS[0])}
