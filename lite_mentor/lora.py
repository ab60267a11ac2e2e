"""LoRA in training: base(x) + scaling (x A^T) B^T in the student's dtype, where PEFT widens to float32 and back.

PEFT makes the adapters, names them and keeps them on disk; only the forward of its layers is replaced. Layers that are
given the same input, such as q, k and v, are computed together, with their A one below the other:

    low = scaling x A^T      out = base(x) + low B^T                              (LoRA, arXiv 2106.09685)
    dlow = scaling dout B    dx = dout W + dlow A    dA = dlow^T x    dB = dout^T low

Each product is added in place to what is already there. A and B are float32, and products read copies of them in the
student's dtype; dA and dB are float32.

    T tokens   I inputs   O outputs of one layer   R ranks of all layers that share an input
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.function import once_differentiable


class Adapters:
    """Takes over the forward of all layers in `groups`; those of a group read the same tensor (fused.same_input)."""

    def __init__(self, groups: Sequence[Sequence[LoraLayer]], dtype: torch.dtype):
        self._copies: list[torch.Tensor] = []
        self._originals: list[torch.Tensor] = []
        for layers in groups:
            group = SharedInput(layers, dtype)
            for copy, original in group.pairs():
                if copy.data_ptr() != original.data_ptr():
                    self._copies.append(copy)
                    self._originals.append(original.detach())
            for i, layer in enumerate(layers):
                layer.forward = partial(group.forward, i)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copies that products read equal to A and B as they are now.

        Nothing tells that A and B have changed: torch's fused AdamW and bitsandbytes' optimizers leave a tensor's
        version as it was. So this is called before each forward that is trained, where it costs next to nothing. It
        writes in place, because a CUDA graph may read the copies.
        """
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)


class SharedInput:
    """Adapted layers that are given the same input. The first one to be called computes all of them."""

    def __init__(self, layers: Sequence[LoraLayer], dtype: torch.dtype):
        self.layers = layers
        self.bases = [layer.get_base_layer() for layer in layers]
        (self.scaling,) = {layer.scaling["default"] for layer in layers}
        self.downs = [layer.lora_A["default"].weight for layer in layers]
        self.masters = [layer.lora_B["default"].weight for layer in layers]
        self.ranks = [len(down_RI) for down_RI in self.downs]
        # Where nothing has to be narrowed or joined, these are the adapters themselves.
        downs = [p.detach().to(dtype) for p in self.downs]
        self.down_RI = downs[0] if len(downs) == 1 else torch.cat(downs)
        self.ups = [p.detach().to(dtype) for p in self.masters]
        self._input: Callable[[], torch.Tensor | None] = lambda: None
        self._waiting: dict[int, torch.Tensor] = {}

    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What products read, and what it is to equal."""
        return [*zip(self.down_RI.split(self.ranks), self.downs, strict=True),
                *zip(self.ups, self.masters, strict=True)]  # fmt: skip

    def forward(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Layer i's output. The others' wait until they are asked for with the same `x`, and then are let go."""
        if self.layers[i].disable_adapters:
            return self.bases[i](x)
        if i not in self._waiting or self._input() is not x:
            outs = _Lora.apply(self, x, *self.downs, *self.masters)
            self._input, self._waiting = weakref.ref(x), dict(enumerate(outs))
        return self._waiting.pop(i)


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group: SharedInput, x: torch.Tensor, *adapters: nn.Parameter) -> tuple[torch.Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        # Without a beta, addmm_ is a product with a factor, and writes where it is told.
        low_TR = x_TI.new_empty(len(x_TI), len(group.down_RI))
        low_TR.addmm_(x_TI, group.down_RI.t(), beta=0, alpha=group.scaling)
        outs = [base(x) for base in group.bases]
        for out, low, up_OR in zip(outs, low_TR.split(group.ranks, 1), group.ups, strict=True):
            out.view(len(x_TI), -1).addmm_(low, up_OR.t())
        ctx.group = group
        # The adapters are kept so that autograd complains where they were changed before the backward.
        ctx.save_for_backward(x, low_TR, *adapters)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts: torch.Tensor):
        group, (x, low_TR, *_) = ctx.group, ctx.saved_tensors
        x_TI, douts = x.reshape(-1, x.shape[-1]), [dout.reshape(len(low_TR), -1) for dout in douts]
        dlow_TR, dx_TI = torch.empty_like(low_TR), None
        for dout_TO, dlow, up_OR in zip(douts, dlow_TR.split(group.ranks, 1), group.ups, strict=True):
            dlow.addmm_(dout_TO, up_OR, beta=0, alpha=group.scaling)
        ddowns = float32_product(dlow_TR.t(), x_TI).split(group.ranks)
        dups = [float32_product(d.t(), low) for d, low in zip(douts, low_TR.split(group.ranks, 1), strict=True)]
        if ctx.needs_input_grad[1]:
            dx_TI = dlow_TR @ group.down_RI
            for dout_TO, base in zip(douts, group.bases, strict=True):
                dx_TI.addmm_(dout_TO, dequantised(base).to(x.dtype))
            dx_TI = dx_TI.view_as(x)
        return None, dx_TI, *ddowns, *dups


def float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32; of bf16 matrices, a CPU rounds it to bf16 first."""
    if a.dtype is torch.float32:
        return a @ b
    return (a @ b).float() if a.device.type == "cpu" else torch.mm(a, b, out_dtype=torch.float32)


def dequantised(linear: nn.Module) -> torch.Tensor:
    """The weight [O, I] of a frozen layer, in full where it is kept in four bits."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight, state)
