"""Logprob and entropy of target tokens, straight from hidden states and a frozen head.

Mathematics. For row n with hidden state h and target y, over the vocabulary v:

    x_v = softcap(scale h.W_v)         z_v = x_v / T          softcap(x) = c tanh(x / c), or x itself
    logp    = z_y - logsumexp(z)       entropy = H = -sum_v p_v log p_v,  p = softmax(z)

The target is kept out of the running sums: with m and s the maximum and the sum of exp(z - m) over the OTHER columns,

    logp = -softplus(log s + m - z_y)          1 - p_y = -expm1(logp)

so a confident token, whose z_y exceeds the others by 20 nats, keeps a logprob below 0 and its gradient: formed as
z_y - logsumexp it would round to 0. The entropy is accumulated from e (z - m), which does not cancel; the difference of
logsumexp and E_p[z] would. m and log s stay apart for the same reason: a common offset of the logits never meets a
small number.

The head is frozen, so the expensive part of the gradient does not depend on what comes from upstream:

    d logp / d h = J = scale / T ((1 - p_y) k_y W_y - sum_{v != y} p_v k_v W_v),    k = d softcap / d x = 1 - (x / c)^2

J is made in the forward, by the sweep over the vocabulary that makes the logprobs: a running sum of exp(z - m) k W,
rescaled when m grows. Any loss then costs one scaling of J's rows in its backward. The entropy's gradient,

    d H / d h = -scale / T sum_v p_v (log p_v + H) k_v W_v,

needs H first. It is recomputed in the backward, and only when something upstream asks for it.

Bytes and FLOPs, in units of one GEMM of the head (2 N H V FLOPs): score 1, score and J 2, an entropy bonus 2 more; the
plain way (logits, log_softmax, autograd, frozen head) takes 2 and holds two or three float32 [N, V], 200 KB a row and
copy at V = 49,152. Here a tile of logits has at most TILE_ROWS x TILE_COLUMNS entries. The vocabulary is the outer
loop, so the head is read, and converted to float32, once a sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mentor_kernels.backend import resolve_backend

TILE_ROWS = 512
TILE_COLUMNS = 4096
HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A column that must not count. Finite, so that 0 * (z - m) is 0; far below START, so that exp(BARRED - START) is 0.
BARRED = -3e38
START = -1e30


class LogprobOut(NamedTuple):
    """What `linear_logprob` returns, float32 [N] each, in nats."""

    logprob_N: torch.Tensor
    entropy_N: torch.Tensor


# --- the torch backend: the readable reference, and the path that CPUs run -----------------------------------------


@contextmanager
def _float32_sums(hidden_NH: torch.Tensor) -> Iterator[None]:
    """Matmuls of this file keep float32 sums: a surrounding autocast would round every logit to 8 bits.

    On the CPU, operands that come from bf16 may use the bf16 instructions: two such values, widened to float32, lose
    nothing when they are narrowed again. The logits stay those of a float32 matmul, at up to 2.5 times its speed.
    """
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if hidden_NH.dtype is not torch.bfloat16 or hidden_NH.device.type != "cpu":
            yield
            return
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _tiles(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, int]]:
    """(rows, float32 tile of the head, its first column) for every tile of logits, columns outermost."""
    wide = _wide(hidden_NH.dtype)
    for first in range(0, weight_VH.shape[0], TILE_COLUMNS):
        weight_CH = weight_VH[first : first + TILE_COLUMNS].to(wide)
        for row in range(0, hidden_NH.shape[0], TILE_ROWS):
            yield slice(row, row + TILE_ROWS), weight_CH, first


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _logits(
    hidden_RH: torch.Tensor, weight_CH: torch.Tensor, temperature: float, softcap: float | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z of one tile, and the slope k of the softcap (None without one)."""
    z_RC = hidden_RH @ weight_CH.T
    if softcap is None:
        return (z_RC if scale == temperature else z_RC.mul_(scale / temperature)), None
    tanh_RC = z_RC.mul_(scale / softcap).tanh_()
    return tanh_RC * (softcap / temperature), 1 - tanh_RC.square_()


def _forward_torch(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    jacobian: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob_N, entropy_N, shift_2N, jacobian_NH); shift is (max, log of the sum above it) over the whole vocabulary.

    The statistics do not depend on `jacobian`, which only decides whether the last output has rows.
    """
    N, H = hidden_NH.shape
    hidden_NH = hidden_NH.to(_wide(hidden_NH.dtype))
    m_N, s_N, a_N, target_z_N = hidden_NH.new_tensor([START, 0.0, 0.0, BARRED])[:, None].repeat(1, N)
    target_slope_N = hidden_NH.new_ones(N)
    sum_NH = hidden_NH.new_zeros(N if jacobian else 0, H)
    for rows, weight_CH, first in _tiles(hidden_NH, weight_VH):
        z_RC, slope_RC = _logits(hidden_NH[rows], weight_CH, temperature, softcap, scale)
        column_R1 = (targets_N[rows] - first)[:, None]
        inside_R1 = (column_R1 >= 0) & (column_R1 < z_RC.shape[1])
        column_R1 = column_R1.clamp(0, z_RC.shape[1] - 1)
        here_R1 = z_RC.gather(1, column_R1)
        target_z_N[rows] = torch.where(inside_R1, here_R1, target_z_N[rows][:, None])[:, 0]
        z_RC.scatter_(1, column_R1, here_R1.masked_fill(inside_R1, BARRED))

        m_R = torch.maximum(m_N[rows], z_RC.amax(1))
        shrink_R = torch.exp(m_N[rows] - m_R)
        a_N[rows] = shrink_R * (a_N[rows] + s_N[rows] * (m_N[rows] - m_R))
        m_N[rows] = m_R
        z_RC.sub_(m_R[:, None])
        e_RC = z_RC.exp()
        s_N[rows] = s_N[rows] * shrink_R + e_RC.sum(1)
        a_N[rows] += z_RC.mul_(e_RC).sum(1)
        if jacobian:
            if slope_RC is not None:
                target_slope_N[rows] = torch.where(
                    inside_R1, slope_RC.gather(1, column_R1), target_slope_N[rows][:, None]
                )[:, 0]
                e_RC.mul_(slope_RC)
            sum_NH[rows] = (sum_NH[rows] * shrink_R[:, None]).addmm_(e_RC, weight_CH)

    logprob_N, entropy_N, shift_2N = _finish_rows(m_N, s_N, a_N, target_z_N)
    if jacobian:
        others_N = -torch.exp(m_N - shift_2N[0] - shift_2N[1])
        own_N = -torch.expm1(logprob_N) * target_slope_N
        target_NH = weight_VH[targets_N].to(hidden_NH.dtype)
        sum_NH.mul_(others_N[:, None]).addcmul_(own_N[:, None], target_NH).mul_(scale / temperature)
    return logprob_N, entropy_N, shift_2N, sum_NH


def _finish_rows(
    m_N: torch.Tensor, s_N: torch.Tensor, a_N: torch.Tensor, target_z_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put the target back: its logprob, the entropy, and (max, log of the sum) over the whole vocabulary."""
    logprob_N = F.logsigmoid(target_z_N - m_N - s_N.log())
    top_N = torch.maximum(m_N, target_z_N)
    others_N, target_N = torch.exp(m_N - top_N), torch.exp(target_z_N - top_N)
    total_N = s_N * others_N + target_N
    # One of the two is 1: log1p of the rest keeps a small entropy's digits.
    log_total_N = torch.where(target_N == 1, torch.log1p(s_N * others_N), total_N.log())
    weighted_N = others_N * (a_N + s_N * (m_N - top_N)) + target_N * (target_z_N - top_N)
    return logprob_N, log_total_N - weighted_N / total_N, torch.stack([top_N, log_total_N])


def _entropy_backward_torch(
    grad_entropy_N: torch.Tensor,
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    entropy_N: torch.Tensor,
    shift_2N: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """grad_entropy_N times d entropy / d hidden, in float32."""
    hidden_NH = hidden_NH.to(_wide(hidden_NH.dtype))
    grad_NH = torch.zeros_like(hidden_NH)
    for rows, weight_CH, _ in _tiles(hidden_NH, weight_VH):
        z_RC, slope_RC = _logits(hidden_NH[rows], weight_CH, temperature, softcap, scale)
        log_p_RC = z_RC.sub_(shift_2N[0, rows, None]).sub_(shift_2N[1, rows, None])
        p_RC = log_p_RC.exp()
        p_RC.mul_(log_p_RC.add_(entropy_N[rows, None]))
        if slope_RC is not None:
            p_RC.mul_(slope_RC)
        grad_NH[rows].addmm_(p_RC, weight_CH)
    return grad_NH.mul_((-scale / temperature * grad_entropy_N)[:, None])


# --- the operators that autograd and torch.compile see -------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    jacobian: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    V = weight_VH.shape[0]
    if targets_N.numel() and (targets_N.min() < 0 or targets_N.max() >= V):
        raise ValueError(f"targets_N must lie in [0, {V}), but reach from {targets_N.min()} to {targets_N.max()}")
    with _float32_sums(hidden_NH):
        return _forward_torch(hidden_NH, weight_VH, targets_N, temperature, softcap, scale, jacobian)


@_linear_logprob.register_fake
def _(hidden_NH, weight_VH, targets_N, temperature, softcap, scale, jacobian, backend):
    N, H = hidden_NH.shape
    wide = _wide(hidden_NH.dtype)
    row = hidden_NH.new_empty(N, dtype=wide)
    return (
        row,
        torch.empty_like(row),
        hidden_NH.new_empty(2, N, dtype=wide),
        hidden_NH.new_empty(N if jacobian else 0, H, dtype=wide),
    )


@torch.library.custom_op("mentor_kernels::linear_logprob_entropy_backward", mutates_args=())
def _entropy_backward(
    grad_entropy_N: torch.Tensor,
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    entropy_N: torch.Tensor,
    shift_2N: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    backend: str,
) -> torch.Tensor:
    with _float32_sums(hidden_NH):
        return _entropy_backward_torch(
            grad_entropy_N, hidden_NH, weight_VH, entropy_N, shift_2N, temperature, softcap, scale
        )


@_entropy_backward.register_fake
def _(grad_entropy_N, hidden_NH, weight_VH, entropy_N, shift_2N, temperature, softcap, scale, backend):
    return torch.empty_like(hidden_NH, dtype=_wide(hidden_NH.dtype))


def _setup_context(ctx, inputs, output):
    hidden_NH, weight_VH, _, ctx.temperature, ctx.softcap, ctx.scale, _, ctx.backend = inputs
    _, entropy_N, shift_2N, jacobian_NH = output
    ctx.set_materialize_grads(False)  # None upstream of the entropy means that its gradient costs nothing
    ctx.mark_non_differentiable(shift_2N, jacobian_NH)
    ctx.save_for_backward(hidden_NH, weight_VH, entropy_N, shift_2N, jacobian_NH)


def _backward(ctx, grad_logprob_N, grad_entropy_N, _shift, _jacobian):
    hidden_NH, weight_VH, entropy_N, shift_2N, jacobian_NH = ctx.saved_tensors
    grad_NH = None
    if grad_logprob_N is not None:
        grad_NH = grad_logprob_N[:, None] * jacobian_NH
    if grad_entropy_N is not None:
        entropy_NH = _entropy_backward(
            grad_entropy_N, hidden_NH, weight_VH, entropy_N, shift_2N, ctx.temperature, ctx.softcap, ctx.scale,
            ctx.backend,
        )  # fmt: skip
        grad_NH = entropy_NH if grad_NH is None else grad_NH + entropy_NH
    if grad_NH is not None:
        grad_NH = grad_NH.to(hidden_NH.dtype)
    return grad_NH, None, None, None, None, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup_context)


# --- the public function -------------------------------------------------------------------------------------------


def linear_logprob(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> LogprobOut:
    """Logprob of each target and entropy of its distribution, z = softcap(scale hidden @ weight.T) / temperature.

    hidden_NH and weight_VH are float32, bfloat16 or float16, both the same; targets_N is int64 in [0, V). Any N (0
    too), H and V. The outputs are float32, from logits that were summed and kept in float32 (float64 in, float64 out).

    Differentiable in hidden_NH through both outputs; the head is frozen and never gets a gradient. Under no_grad, or
    when hidden_NH needs no gradient, only the score is computed, with bitwise the same result for the same rows.

    Raises ValueError for a target outside [0, V), for shapes, dtypes or devices that do not agree, for a temperature or
    softcap that is not positive, and for an unknown backend.
    """
    _check(hidden_NH, weight_VH, targets_N, temperature, softcap)
    logprob_N, entropy_N, _, _ = _linear_logprob(
        hidden_NH,
        weight_VH,
        targets_N,
        float(temperature),
        None if softcap is None else float(softcap),
        float(scale),
        torch.is_grad_enabled() and hidden_NH.requires_grad,
        resolve_backend(backend, hidden_NH.device),
    )
    return LogprobOut(logprob_N, entropy_N)


def _check(hidden_NH, weight_VH, targets_N, temperature, softcap) -> None:
    if hidden_NH.dim() != 2 or weight_VH.dim() != 2 or targets_N.dim() != 1:
        raise ValueError(
            "expected hidden_NH [N, H], weight_VH [V, H] and targets_N [N], not shapes "
            f"{tuple(hidden_NH.shape)}, {tuple(weight_VH.shape)} and {tuple(targets_N.shape)}"
        )
    if hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden_NH has H = {hidden_NH.shape[1]}, but weight_VH has H = {weight_VH.shape[1]}")
    if hidden_NH.shape[0] != targets_N.shape[0]:
        raise ValueError(f"hidden_NH has {hidden_NH.shape[0]} rows, but targets_N has {targets_N.shape[0]}")
    if weight_VH.shape[0] == 0:
        raise ValueError("weight_VH has no rows: the vocabulary is empty")
    if hidden_NH.dtype != weight_VH.dtype or hidden_NH.dtype not in HIDDEN_DTYPES:
        raise ValueError(
            "hidden_NH and weight_VH must both be float32, bfloat16 or float16, "
            f"not {hidden_NH.dtype} and {weight_VH.dtype}"
        )
    if targets_N.dtype != torch.int64:
        raise ValueError(f"targets_N must be int64, not {targets_N.dtype}")
    if not hidden_NH.device == weight_VH.device == targets_N.device:
        raise ValueError(
            "hidden_NH, weight_VH and targets_N must be on one device, "
            f"not {hidden_NH.device}, {weight_VH.device} and {targets_N.device}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, not {softcap}")
