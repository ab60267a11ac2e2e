"""Rows gathered by an index, some of them several times, with a gradient that is added up in a fixed order.

Mathematics. Row k of the result is row index_k of the source, each of its groups r times side by side (which makes
query heads out of the KV heads that they share; r is 1 elsewhere):

    out[k, g r + j] = source[index_k, g]                                       j = 0 .. r - 1

    d source[t, g]  = sum over the k with index_k = t of sum over j of d out[k, g r + j]

The sums are made in float32 in the order of k, then of j, and rounded once. The forward is `torch.index_select`, whose
own gradient on CUDA adds by atomics: in another order each time, so the last bits differ from run to run. Here
`RowCopies` knows the copies of every row before the GPU starts, and one program adds those of a row.

Bytes: both directions are bound by memory. The forward reads and writes K G r D numbers, the backward reads as many and
writes T G D. The copies are 8 (2 K + T) bytes of index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mentor_kernels.backend import resolve_backend
from mentor_kernels.head_launches import Launch
from mentor_kernels.linear_logprob import check_triton, wide_dtype


@dataclass(frozen=True, eq=False)
class RowCopies:
    """Which rows are gathered, and where the copies of each went; all int64, on one device."""

    index_K: torch.Tensor
    """The source's row of each copy."""
    ends_T: torch.Tensor
    """Copies of row t are `places_K[ends_T[t - 1] : ends_T[t]]`, from 0 for the first row."""
    places_K: torch.Tensor
    """The copies, by the row that they are of, in order."""

    @classmethod
    def of(cls, index_K: torch.Tensor, rows: int, device: torch.device | str = "cpu") -> RowCopies:
        """Of an index into `rows` rows that is on the CPU. Raises ValueError for one outside of them."""
        if index_K.dim() != 1 or index_K.dtype != torch.int64 or index_K.device.type != "cpu":
            raise ValueError(f"index_K must be int64 [K] on the CPU, not {index_K.dtype} {tuple(index_K.shape)}")
        if len(index_K) and (int(index_K.min()) < 0 or int(index_K.max()) >= rows):
            raise ValueError(f"index_K reaches from {index_K.min()} to {index_K.max()}, outside of {rows} rows")
        ends_T = torch.bincount(index_K, minlength=rows).cumsum(0)
        return cls(*(x.to(device) for x in (index_K, ends_T, index_K.argsort(stable=True))))


# --- the torch backend ----------------------------------------------------------------------------------------------


def _add_torch(grad_KED: torch.Tensor, copies: RowCopies, repeats: int) -> torch.Tensor:
    """On the CPU in the order above; on CUDA only under torch's deterministic algorithms."""
    _, E, D = grad_KED.shape
    grad_KGRD = grad_KED.to(wide_dtype(grad_KED.dtype)).unflatten(1, (E // repeats, repeats))
    grad_NGD = grad_KGRD.transpose(1, 2).flatten(0, 1)
    sum_TGD = grad_NGD.new_zeros(len(copies.ends_T), E // repeats, D)
    return sum_TGD.index_add_(0, copies.index_K.repeat_interleave(repeats), grad_NGD).to(grad_KED.dtype)


# --- the Triton backend: a row of the source, and a block of its columns, a program -----------------------------------

ADD = Launch(dict(BLOCK=1024), warps=4, stages=3)


@triton.jit
def _add_copies(grad_ptr, ends_ptr, places_ptr, out_ptr, C, D, repeats, BLOCK: tl.constexpr):
    """Row t of the gradient, of C = G D columns: its copies' rows of `repeats` C columns, one after the other."""
    row = tl.program_id(0).to(tl.int64)
    c_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column_B = c_B // D * D * repeats + c_B % D
    first = tl.load(ends_ptr + row - 1, mask=row > 0, other=0)
    sum_B = tl.zeros([BLOCK], tl.float32)
    for copy in range(first, tl.load(ends_ptr + row)):
        copy_ptr = grad_ptr + tl.load(places_ptr + copy) * repeats * C
        for j in range(repeats):
            sum_B += tl.load(copy_ptr + column_B + j * D, mask=c_B < C, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * C + c_B, sum_B.to(out_ptr.dtype.element_ty), mask=c_B < C)


def _add_triton(grad_KED: torch.Tensor, copies: RowCopies, repeats: int) -> torch.Tensor:
    grad_KED = grad_KED.contiguous()
    (_, E, D), T = grad_KED.shape, len(copies.ends_T)
    G = E // repeats
    out_TGD = grad_KED.new_empty(T, G, D)
    if out_TGD.numel():
        _add_copies[(T, triton.cdiv(G * D, ADD.blocks["BLOCK"]))](
            grad_KED, copies.ends_T, copies.places_K, out_TGD, G * D, D, repeats,
            **ADD.blocks, num_warps=ADD.warps, num_stages=ADD.stages,
        )  # fmt: skip
    return out_TGD


# --- the operators that autograd and torch.compile see ----------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::gather_rows", mutates_args=())
def _gather_rows(
    source_TGD: torch.Tensor, index_K: torch.Tensor, ends_T: torch.Tensor, places_K: torch.Tensor, repeats: int,
    backend: str,
) -> torch.Tensor:  # fmt: skip
    source_TGRD = source_TGD[:, :, None].expand(-1, -1, repeats, -1)
    return source_TGRD.index_select(0, index_K).flatten(1, 2)


@_gather_rows.register_fake
def _(source_TGD, index_K, ends_T, places_K, repeats, backend):
    _, G, D = source_TGD.shape
    return source_TGD.new_empty(index_K.shape[0], G * repeats, D)


@torch.library.custom_op("mentor_kernels::gather_rows_backward", mutates_args=())
def _by_source(
    grad_KED: torch.Tensor, index_K: torch.Tensor, ends_T: torch.Tensor, places_K: torch.Tensor, repeats: int,
    backend: str,
) -> torch.Tensor:  # fmt: skip
    with torch.cuda.device_of(grad_KED):
        return (_add_triton if backend == "triton" else _add_torch)(
            grad_KED, RowCopies(index_K, ends_T, places_K), repeats
        )


@_by_source.register_fake
def _(grad_KED, index_K, ends_T, places_K, repeats, backend):
    _, E, D = grad_KED.shape
    return grad_KED.new_empty(ends_T.shape[0], E // repeats, D)


def _setup_context(ctx, inputs, output):
    _, *copies, ctx.repeats, ctx.backend = inputs
    ctx.save_for_backward(*copies)


def _backward(ctx, grad_KED):
    return _by_source(grad_KED, *ctx.saved_tensors, ctx.repeats, ctx.backend), None, None, None, None, None


_gather_rows.register_autograd(_backward, setup_context=_setup_context)


# --- the public function ----------------------------------------------------------------------------------------------


def gather_rows(
    source_TGD: torch.Tensor, copies: RowCopies, *, repeats: int = 1, backend: str | None = None
) -> torch.Tensor:
    """The rows that `copies` names, [K, G repeats, D]; any K, T, G and D, 0 too.

    Differentiable in the source, whose gradient has the same bits each time (with the torch backend on CUDA only under
    torch's deterministic algorithms). The source is float32, bfloat16 or float16, for the torch backend float64 too.

    Raises ValueError for shapes or devices that do not agree, for repeats below 1, and for an unknown backend.
    """
    if source_TGD.dim() != 3 or len(source_TGD) != len(copies.ends_T) or repeats < 1:
        raise ValueError(
            f"expected source_TGD [T, G, D] of the {len(copies.ends_T)} rows that the copies are of and repeats of 1 "
            f"or more, not {tuple(source_TGD.shape)} and {repeats}"
        )
    if source_TGD.device != copies.index_K.device:
        raise ValueError(f"source_TGD is on {source_TGD.device}, but its copies on {copies.index_K.device}")
    backend = resolve_backend(backend, source_TGD.device)
    if backend == "triton":
        check_triton(source_TGD)
    return _gather_rows(source_TGD, copies.index_K, copies.ends_T, copies.places_K, repeats, backend)
