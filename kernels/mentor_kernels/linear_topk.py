"""Logprobs of K chosen tokens a row, and the KL to a teacher who is known by them, without another sweep.

Mathematics. All tokens of a row share its logsumexp, so the target's logprob (linear_logprob.py) brings the others':

    log p_k = logp + z_k - z_y          z_v = softcap(scale h.W_v) / T

A teacher with the same vocabulary, known by its K likeliest tokens and their probabilities q_k, is followed by

    KL_K = sum_k q_k (log q_k - log p_k)

    d KL_K / d h  =  scale / T (Q sum_v p_v k_v W_v - sum_k q_k k_k W_k),       Q = sum_k q_k

This is KL(teacher || student) less the terms of the tokens that were not cached. It is smallest, Q log Q, where the
student gives those K tokens the shares q_k / Q and the rest nothing: with Q near 1, next to the teacher. The sum over
the vocabulary is in the Jacobian that `linear_logprob` made: the chain rule of the first line scales its row by -Q, and
only K + 1 rows of the head are gathered and added.

Bytes and FLOPs: the K + 1 gathered rows of H numbers are read twice, and 4 N K H FLOPs spent on them: K / V of the
sweep's. The torch backend holds GATHERED_BYTES of such rows at once, the Triton backend one block of them a program.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mentor_kernels.backend import resolve_backend
from mentor_kernels.linear_logprob import Head, check_head, check_ids, check_triton, rows_last_contiguous, wide_dtype

GATHERED_BYTES = 32 << 20
BLOCK_K, BLOCK_H, WARPS = 16, 128, 4
"""Rows and columns of the head that a program holds: 16 registers a thread."""


class TeacherTopK(NamedTuple):
    """A teacher's likeliest tokens at each row, and how much the KL to them counts (`linear_policy_loss`)."""

    ids_NK: torch.Tensor
    """int64."""
    logp_NK: torch.Tensor
    """float32; -inf stands for no token."""
    weight: float


# --- the torch backend ----------------------------------------------------------------------------------------------


def _chunks(hidden_NH: torch.Tensor, ids_NK: torch.Tensor) -> list[slice]:
    """Rows whose part of the head, widened, takes GATHERED_BYTES."""
    wide = wide_dtype(hidden_NH.dtype).itemsize
    rows = max(1, GATHERED_BYTES // max(1, wide * ids_NK.shape[1] * hidden_NH.shape[1]))
    return [slice(first, first + rows) for first in range(0, len(ids_NK), rows)]


def _dots_torch(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    wide = wide_dtype(hidden_NH.dtype)
    out_NK = hidden_NH.new_empty(ids_NK.shape, dtype=wide)
    for rows in _chunks(hidden_NH, ids_NK):
        weight_RKH = weight_VH[ids_NK[rows]].to(wide)
        torch.sum(weight_RKH.mul_(hidden_NH[rows, None]), 2, out=out_NK[rows])
    return out_NK


def _by_hidden_torch(grad_NK: torch.Tensor, weight_VH: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    out_NH = weight_VH.new_empty(ids_NK.shape[0], weight_VH.shape[1])
    for rows in _chunks(out_NH, ids_NK):
        weight_RKH = weight_VH[ids_NK[rows]].to(grad_NK.dtype)
        out_NH[rows] = weight_RKH.mul_(grad_NK[rows, :, None]).sum(1)
    return out_NH


# --- the Triton backend: one row, and blocks of BLOCK_K x BLOCK_H of the head, a program -----------------------------


@triton.jit
def _gathered_dots(
    hidden_ptr, weight_ptr, ids_ptr, out_ptr, V, H, K, hidden_stride, weight_stride,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[n, k] = hidden[n] . weight[ids[n, k]] for a block of k; NaN where the id is outside the vocabulary."""
    blocks = tl.cdiv(K, BLOCK_K)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    k_K = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    id_K = tl.load(ids_ptr + n * K + k_K, mask=k_K < K, other=0)
    inside_K = (id_K >= 0) & (id_K < V)
    sum_KH = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for first in range(0, H, BLOCK_H):
        h_H = first + tl.arange(0, BLOCK_H)
        hidden_H = tl.load(hidden_ptr + n * hidden_stride + h_H, mask=h_H < H, other=0).to(tl.float32)
        weight_KH = tl.load(
            weight_ptr + id_K[:, None] * weight_stride + h_H[None, :],
            mask=inside_K[:, None] & (h_H < H)[None, :], other=0,
        ).to(tl.float32)  # fmt: skip
        sum_KH += weight_KH * hidden_H[None, :]
    tl.store(out_ptr + n * K + k_K, tl.where(inside_K, tl.sum(sum_KH, 1), float("nan")), mask=k_K < K)


@triton.jit
def _gathered_sum(
    grad_ptr, weight_ptr, ids_ptr, out_ptr, V, H, K, weight_stride, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr
):
    """out[n, h] = sum_k grad[n, k] weight[ids[n, k], h] for a block of h, in the order of k."""
    blocks = tl.cdiv(H, BLOCK_H)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    h_H = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    sum_KH = tl.zeros((BLOCK_K, BLOCK_H), tl.float32)
    for first in range(0, K, BLOCK_K):
        k_K = first + tl.arange(0, BLOCK_K)
        id_K = tl.load(ids_ptr + n * K + k_K, mask=k_K < K, other=0)
        inside_K = (id_K >= 0) & (id_K < V)
        grad_K = tl.load(grad_ptr + n * K + k_K, mask=k_K < K, other=0)
        weight_KH = tl.load(
            weight_ptr + id_K[:, None] * weight_stride + h_H[None, :],
            mask=inside_K[:, None] & (h_H < H)[None, :], other=0,
        ).to(tl.float32)  # fmt: skip
        sum_KH += weight_KH * grad_K[:, None]
    tl.store(out_ptr + n * H + h_H, tl.sum(sum_KH, 0).to(out_ptr.dtype.element_ty), mask=h_H < H)


def _dots_triton(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    hidden_NH, weight_VH, ids_NK = rows_last_contiguous(hidden_NH), rows_last_contiguous(weight_VH), ids_NK.contiguous()
    (N, K), (V, H) = ids_NK.shape, weight_VH.shape
    out_NK = hidden_NH.new_empty(N, K, dtype=torch.float32)
    if out_NK.numel():
        _gathered_dots[(N * triton.cdiv(K, BLOCK_K),)](
            hidden_NH, weight_VH, ids_NK, out_NK, V, H, K, hidden_NH.stride(0), weight_VH.stride(0),
            BLOCK_K=BLOCK_K, BLOCK_H=BLOCK_H, num_warps=WARPS,
        )  # fmt: skip
    return out_NK


def _by_hidden_triton(grad_NK: torch.Tensor, weight_VH: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    weight_VH, ids_NK, grad_NK = rows_last_contiguous(weight_VH), ids_NK.contiguous(), grad_NK.contiguous()
    (N, K), (V, H) = ids_NK.shape, weight_VH.shape
    out_NH = weight_VH.new_empty(N, H)
    if out_NH.numel():
        _gathered_sum[(N * triton.cdiv(H, BLOCK_H),)](
            grad_NK, weight_VH, ids_NK, out_NH, V, H, K, weight_VH.stride(0),
            BLOCK_K=BLOCK_K, BLOCK_H=BLOCK_H, num_warps=WARPS,
        )  # fmt: skip
    return out_NH


def follow_teacher(
    hidden_RH: torch.Tensor,
    targets_R: torch.Tensor,
    logprob_R: torch.Tensor,
    head: Head,
    ids_RK: torch.Tensor,
    teacher_logp_RK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(KL_K [R], its slope by the target's logprob [R], the rest of its gradient by hidden_RH [R, H])."""
    tokens_RK = torch.cat([targets_R[:, None], ids_RK], 1)
    x_RK, k_RK = _dots_triton(hidden_RH, head.weight_VH, tokens_RK) * head.scale, 1.0
    if head.softcap is not None:
        tanh_RK = torch.tanh(x_RK / head.softcap)
        x_RK, k_RK = head.softcap * tanh_RK, 1 - tanh_RK.square()
    kl_R = topk_kl(logprob_R[:, None] + (x_RK[:, 1:] - x_RK[:, :1]) / head.temperature, teacher_logp_RK)
    q_RK = teacher_logp_RK.exp()
    mass_R1 = q_RK.sum(1, keepdim=True)
    by_dot_RK = head.scale / head.temperature * torch.cat([mass_R1, -q_RK], 1) * k_RK
    return kl_R, -mass_R1[:, 0], _by_hidden_triton(by_dot_RK, head.weight_VH, tokens_RK)


# --- the operators that autograd and torch.compile see --------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::gathered_dots", mutates_args=())
def _gathered(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, ids_NK: torch.Tensor, backend: str) -> torch.Tensor:
    check_ids("targets_N and ids_NK", ids_NK, weight_VH, backend)
    with torch.cuda.device_of(hidden_NH):
        return (_dots_triton if backend == "triton" else _dots_torch)(hidden_NH, weight_VH, ids_NK)


@_gathered.register_fake
def _(hidden_NH, weight_VH, ids_NK, backend):
    return hidden_NH.new_empty(ids_NK.shape, dtype=wide_dtype(hidden_NH.dtype))


@torch.library.custom_op("mentor_kernels::gathered_dots_backward", mutates_args=())
def _by_hidden(grad_NK: torch.Tensor, weight_VH: torch.Tensor, ids_NK: torch.Tensor, backend: str) -> torch.Tensor:
    with torch.cuda.device_of(weight_VH):
        return (_by_hidden_triton if backend == "triton" else _by_hidden_torch)(grad_NK, weight_VH, ids_NK)


@_by_hidden.register_fake
def _(grad_NK, weight_VH, ids_NK, backend):
    return weight_VH.new_empty(ids_NK.shape[0], weight_VH.shape[1])


def _setup_context(ctx, inputs, output):
    _, weight_VH, ids_NK, ctx.backend = inputs
    ctx.save_for_backward(weight_VH, ids_NK)


def _backward(ctx, grad_NK):
    return _by_hidden(grad_NK, *ctx.saved_tensors, ctx.backend), None, None, None


_gathered.register_autograd(_backward, setup_context=_setup_context)


# --- the public functions -------------------------------------------------------------------------------------------


def linear_topk(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    logprob_N: torch.Tensor,
    ids_NK: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Logprobs [N, K], float32, of the tokens ids_NK (int64), from the targets' logprobs that `linear_logprob` gave.

    The same hidden_NH, weight_VH, targets_N, temperature, softcap and scale as there; any K. Differentiable in
    hidden_NH and in logprob_N, and through it in hidden_NH again: together that is the whole gradient. An id that is
    the target has exactly the target's logprob.

    Raises ValueError for shapes, dtypes or devices that do not agree and for ids outside [0, V) (NaN instead from
    Triton on a GPU, as in `linear_logprob`).
    """
    check_head(hidden_NH, weight_VH, targets_N, temperature, softcap)
    if logprob_N.shape != targets_N.shape:
        raise ValueError(f"logprob_N must be [N] for N = {len(targets_N)} rows, not {tuple(logprob_N.shape)}")
    check_token_ids(ids_NK, targets_N)
    backend = resolve_backend(backend, hidden_NH.device)
    if backend == "triton":
        check_triton(hidden_NH)
    x_NK = _gathered(hidden_NH, weight_VH, torch.cat([targets_N[:, None], ids_NK], 1), backend) * scale
    if softcap is not None:
        x_NK = softcap * torch.tanh(x_NK / softcap)
    return logprob_N[:, None] + (x_NK[:, 1:] - x_NK[:, :1]) / temperature


def topk_kl(logp_NK: torch.Tensor, teacher_logp_NK: torch.Tensor) -> torch.Tensor:
    """KL_K [N] in nats of a teacher's cached tokens: sum over k of q_k (log q_k - log p_k).

    A teacher_logp of -inf stands for no token. Differentiable in logp_NK.
    """
    q_NK = teacher_logp_NK.exp()
    # 0 log 0 is 0, and must not become NaN in the gradient.
    gap_NK = torch.where(q_NK > 0, teacher_logp_NK, 0.0) - torch.where(q_NK > 0, logp_NK, 0.0)
    return (q_NK * gap_NK).sum(1)


def check_token_ids(ids_NK: torch.Tensor, targets_N: torch.Tensor) -> None:
    if ids_NK.dim() != 2 or len(ids_NK) != len(targets_N):
        raise ValueError(f"ids_NK must be [N, K] for N = {len(targets_N)} rows, not {tuple(ids_NK.shape)}")
    if ids_NK.dtype != torch.int64 or ids_NK.device != targets_N.device:
        raise ValueError(f"ids_NK must be int64 on {targets_N.device}, not {ids_NK.dtype} on {ids_NK.device}")


def check_teacher(teacher: TeacherTopK, targets_N: torch.Tensor) -> None:
    check_token_ids(teacher.ids_NK, targets_N)
    logp_NK = teacher.logp_NK
    if logp_NK.shape != teacher.ids_NK.shape or logp_NK.dtype != torch.float32 or logp_NK.device != targets_N.device:
        raise ValueError(
            f"the teacher's logp_NK must be float32 {tuple(teacher.ids_NK.shape)} on {targets_N.device} like its ids, "
            f"not {logp_NK.dtype} {tuple(logp_NK.shape)} on {logp_NK.device}"
        )
