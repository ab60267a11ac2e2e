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
copy at V = 49,152. The torch backend holds one tile of logits (TILINGS); the vocabulary is its outer loop, so the head
is read, and widened to float32, once a sweep. On CUDA it gives bf16 to cuBLAS as it is, for float32 sums, and rounds e
for the second GEMM as K3 does. The Triton backend keeps logits in registers and stores, for a chunk of rows,
e = exp(z - m) in the head's dtype: WORKSPACE_BYTES, or 512 rows where those take more (twice that with a reference,
linear_kl.py), and 4 bytes of traffic a logit. K3's splits take a tenth of that again. With a `drop_mass`, K3 leaves out
the tiles of the vocabulary that hold almost nothing of a block of rows (active_tiles.py).

The Triton kernels, in the order of the data:

    K1  _tile_statistics   one GEMM. For each row and tile of 128 columns: m, sum e, sum e (z - m), all without the
                           target; the target's z; and e itself, if a gradient will be asked for
    K2  _merge_tiles       a row's tiles together -> logprob, entropy, logsumexp
    K3  _gradient_sums     the other GEMM: the sum over v of p_v phi_v k_v W_v, with p_v = e exp(m_tile - logsumexp)
                           made in registers. phi is 1 for the Jacobian, and c + b (log p_v + H) for a loss whose
                           gradients by logprob and entropy are c and b. Its result is small, [R, H], and its sum long:
                           the vocabulary is split among programs, or most of a large GPU would have none
        _gradient_rows     the splits together, in a fixed order; then the target's own row of the head
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mentor_kernels.active_tiles import active_tiles, tile_weights
from mentor_kernels.backend import interpreted, resolve_head_backend
from mentor_kernels.head_launches import Launch, head_launches

HIDDEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# A column that must not count. Finite, so that 0 * (z - m) is 0; far below START, so that exp(BARRED - START) is 0.
BARRED = -3e38
START = -1e30

# The Triton backend. The width of a tile of statistics is part of the result's bits: it never depends on the path.
STATISTICS_TILE = 128
WORKSPACE_BYTES = 256 << 20
# Of K3 for a block of rows, with 128 of the hidden size each. A chunk has 4 to 8 such blocks, so 256 to 512 programs
# run; with one for each block of the hidden size alone (8 at H = 1,024) most of a large GPU would idle.
PROGRAMS = 64


class LogprobOut(NamedTuple):
    """What `linear_logprob` returns, float32 [N] each, in nats."""

    logprob_N: torch.Tensor
    entropy_N: torch.Tensor


# --- the torch backend: the readable reference, the path that CPUs run, and cuBLAS on CUDA -------------------------


class Tiling(NamedTuple):
    """The logits that the torch backend holds at once, and how their matmuls are fed."""

    rows: int
    columns: int
    narrow: tuple[torch.dtype, ...]
    """Dtypes that matmuls take as they are; all others are widened to float32."""


# A CPU's 8 MB of float32 logits stay in its cache. cuBLAS wants large products, and every operation on a tile is a
# launch: 64 MB. float16 is widened there too, for probabilities below 6e-8 would be 0 in it. Not measured on a GPU yet.
TILINGS = {"cpu": Tiling(512, 4096, ()), "cuda": Tiling(1024, 16_384, (torch.bfloat16,))}


def tiling(device: torch.device) -> Tiling:
    return TILINGS.get(device.type, TILINGS["cpu"])


@contextmanager
def float32_sums(hidden_NH: torch.Tensor) -> Iterator[None]:
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


def tiles(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, int]]:
    """(rows, tile of the head in the dtype of `hidden_NH`, its first column) of all logits, columns outermost."""
    size = tiling(hidden_NH.device)
    for first in range(0, weight_VH.shape[0], size.columns):
        weight_CH = weight_VH[first : first + size.columns].to(hidden_NH.dtype)
        for row in range(0, hidden_NH.shape[0], size.rows):
            yield slice(row, row + size.rows), weight_CH, first


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def operand(hidden_NH: torch.Tensor) -> torch.Tensor:
    """The hidden states in the dtype that matmuls take here."""
    dtype = hidden_NH.dtype
    return hidden_NH if dtype in tiling(hidden_NH.device).narrow else hidden_NH.to(wide_dtype(dtype))


def product(left: torch.Tensor, right: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
    """left @ right, added in place to `onto` if given; sums of narrow operands are float32 too."""
    if left.dtype is wide_dtype(left.dtype):
        return left @ right if onto is None else onto.addmm_(left, right)
    found = torch.mm(left, right, out_dtype=torch.float32)
    return found if onto is None else onto.add_(found)


def accumulate(
    sum_RH: torch.Tensor,
    rounded_R: torch.Tensor,
    factor_RC: torch.Tensor,
    weight_CH: torch.Tensor,
    shrink_R: torch.Tensor | None = None,
) -> None:
    """sum_RH <- shrink sum_RH + factor_RC @ weight_CH, in place.

    The factors are rounded to the head's dtype if that is narrow; rounded_R then sums them as they were rounded.
    """
    rounded_RC = factor_RC.to(weight_CH.dtype)
    if shrink_R is not None:
        sum_RH.mul_(shrink_R[:, None])
        rounded_R.mul_(shrink_R)
    if rounded_RC is not factor_RC:
        rounded_R.add_(rounded_RC.sum(1, dtype=torch.float32))
    product(rounded_RC, weight_CH, onto=sum_RH)


def balanced(hidden_NH: torch.Tensor, softcap: float | None) -> bool:
    """Are the rounded coefficients of a row made to sum to 0? For K3's reason; a softcap's own do not."""
    return softcap is None and hidden_NH.dtype is not wide_dtype(hidden_NH.dtype)


def logits(
    hidden_RH: torch.Tensor, weight_CH: torch.Tensor, temperature: float, softcap: float | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z of one tile, and the slope k of the softcap (None without one)."""
    z_RC = product(hidden_RH, weight_CH.T)
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
    hidden_NH, wide = operand(hidden_NH), wide_dtype(hidden_NH.dtype)
    start = [START, 0.0, 0.0, BARRED, 0.0, 1.0]
    m_N, s_N, a_N, target_z_N, rounded_N, target_slope_N = hidden_NH.new_tensor(start, dtype=wide)[:, None].repeat(1, N)
    sum_NH = hidden_NH.new_zeros(N if jacobian else 0, H, dtype=wide)
    for rows, weight_CH, first in tiles(hidden_NH, weight_VH):
        z_RC, slope_RC = logits(hidden_NH[rows], weight_CH, temperature, softcap, scale)
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
            accumulate(sum_NH[rows], rounded_N[rows], e_RC, weight_CH, shrink_R)

    logprob_N, entropy_N, shift_2N = _finish_rows(m_N, s_N, a_N, target_z_N)
    if jacobian:
        others_N = -torch.exp(m_N - shift_2N[0] - shift_2N[1])
        own_N = -torch.expm1(logprob_N) * target_slope_N
        if balanced(hidden_NH, softcap):
            others_N = -own_N / rounded_N.clamp(min=1)  # less than 1 only where there are no others
        target_NH = weight_VH[targets_N].to(wide)
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
    targets_N: torch.Tensor,
    entropy_N: torch.Tensor,
    shift_2N: torch.Tensor,
    jacobian_NH: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """grad_entropy_N times d entropy / d hidden, in float32; jacobian_NH is the forward's."""
    hidden_NH = operand(hidden_NH)
    grad_NH, rounded_N = torch.zeros_like(hidden_NH, dtype=entropy_N.dtype), torch.zeros_like(entropy_N)
    for rows, weight_CH, _ in tiles(hidden_NH, weight_VH):
        z_RC, slope_RC = logits(hidden_NH[rows], weight_CH, temperature, softcap, scale)
        log_p_RC = z_RC.sub_(shift_2N[0, rows, None]).sub_(shift_2N[1, rows, None])
        p_RC = log_p_RC.exp()
        p_RC.mul_(log_p_RC.add_(entropy_N[rows, None]))
        if slope_RC is not None:
            p_RC.mul_(slope_RC)
        accumulate(grad_NH[rows], rounded_N[rows], p_RC, weight_CH)
    by_N = -scale / temperature * grad_entropy_N
    if not balanced(hidden_NH, softcap):
        return grad_NH.mul_(by_N[:, None])
    # The sum of all coefficients, a rounding error, is taken off in the shares p: sum_v p_v W_v = W_y - T / scale J.
    grad_NH.addcmul_(rounded_N[:, None], weight_VH[targets_N].to(grad_NH.dtype), value=-1)
    return grad_NH.mul_(by_N[:, None]).addcmul_((-rounded_N * grad_entropy_N)[:, None], jacobian_NH)


# --- the Triton backend --------------------------------------------------------------------------------------------


FINISH = Launch(dict(BLOCK_R=16, BLOCK_T=64), warps=4, stages=1)
ROWS = Launch(dict(BLOCK_R=16, BLOCK_H=128), warps=4, stages=2)
# Columns of the product that sums a row's coefficients: the least that tensor cores take, 6 % more of K3's FLOPs.
ONES = tl.constexpr(8)


@triton.jit
def _scaled(dot_RV, inner, outer, SOFTCAP: tl.constexpr):
    """z from the products with the head."""
    if SOFTCAP:
        # tanh from exp(-2|x|), which cannot overflow
        u_RV = tl.exp(-2 * tl.abs(dot_RV * inner))
        tanh_RV = (1 - u_RV) / (1 + u_RV)
        dot_RV = tl.where(dot_RV * inner < 0, -tanh_RV, tanh_RV)
    return dot_RV * outer


@triton.jit
def _tile_statistics(
    hidden_ptr, ref_hidden_ptr, weight_ptr, target_ptr, m_ptr, s_ptr, a_ptr, target_z_ptr, e_ptr,
    ref_m_ptr, ref_s_ptr, drift_ptr, target_d_ptr, d_ptr,
    R, V, H, hidden_stride, ref_hidden_stride, weight_stride, e_stride, inner, outer,
    SOFTCAP: tl.constexpr, STORE: tl.constexpr, EVEN_H: tl.constexpr, BARRED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """K1. Row blocks are the fastest index: those of a chunk share a tile of the head while it is in the cache.

    With a reference it also makes d = z - z_ref, the tile's sum of e d, and the reference's own m and s.
    """
    blocks = tl.cdiv(R, BLOCK_R)
    tile = tl.program_id(0) // blocks
    row_R = (tl.program_id(0) % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    c_V = tl.arange(0, BLOCK_V)
    col_V = tile * BLOCK_V + c_V
    h_H = tl.arange(0, BLOCK_H)
    hidden_RH = hidden_ptr + row_R.to(tl.int64)[:, None] * hidden_stride + h_H[None, :]
    weight_HV = weight_ptr + col_V.to(tl.int64)[None, :] * weight_stride + h_H[:, None]
    dot_RV = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    if ref_hidden_ptr is not None:
        ref_RH = ref_hidden_ptr + row_R.to(tl.int64)[:, None] * ref_hidden_stride + h_H[None, :]
        ref_dot_RV = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for h in range(0, H, BLOCK_H):
        row_ok, col_ok = (row_R < R)[:, None], (col_V < V)[None, :]
        if not EVEN_H:
            row_ok, col_ok = row_ok & (h + h_H < H)[None, :], col_ok & (h + h_H < H)[:, None]
        x_RH = tl.load(hidden_RH + h, mask=row_ok, other=0.0)
        w_HV = tl.load(weight_HV + h, mask=col_ok, other=0.0)
        dot_RV = tl.dot(x_RH, w_HV, dot_RV, input_precision="ieee")
        if ref_hidden_ptr is not None:
            y_RH = tl.load(ref_RH + h, mask=row_ok, other=0.0)
            ref_dot_RV = tl.dot(y_RH, w_HV, ref_dot_RV, input_precision="ieee")

    z_RV = _scaled(dot_RV, inner, outer, SOFTCAP)
    # Everything for one element of the tile costs 64 instructions a thread, so columns are compared in 32 bits, and
    # those that do not count are looked for only in a tile that has some: the last one, and those with a target.
    columns = tl.minimum(V - tile * BLOCK_V, BLOCK_V)
    own_R = tl.load(target_ptr + row_R, mask=row_R < R, other=-1) - tile * BLOCK_V
    own_R = tl.where((own_R >= 0) & (own_R < columns), own_R, -1).to(tl.int32)
    here = tl.max(own_R, 0) >= 0
    at_R = tile * R + row_R
    to_RV = row_R[:, None] * e_stride + col_V[None, :]  # a chunk has fewer than 2^31 logits: _chunk_rows
    if ref_hidden_ptr is not None:
        ref_z_RV = _scaled(ref_dot_RV, inner, outer, SOFTCAP)
        d_RV = z_RV - ref_z_RV
        if here:
            own_d_R = tl.sum(tl.where(c_V[None, :] == own_R[:, None], d_RV, 0.0), 1)
            tl.store(target_d_ptr + row_R, own_d_R, mask=own_R >= 0)
        if columns < BLOCK_V:
            ref_z_RV = tl.where((c_V < columns)[None, :], ref_z_RV, BARRED)
        ref_m_R = tl.max(ref_z_RV, 1)
        tl.store(ref_m_ptr + at_R, ref_m_R, mask=row_R < R)
        tl.store(ref_s_ptr + at_R, tl.sum(tl.exp(ref_z_RV - ref_m_R[:, None]), 1), mask=row_R < R)
        if STORE:
            tl.store(d_ptr + to_RV, d_RV.to(d_ptr.dtype.element_ty), mask=(row_R < R)[:, None])

    if here:
        own_RV = c_V[None, :] == own_R[:, None]
        tl.store(target_z_ptr + row_R, tl.sum(tl.where(own_RV, z_RV, 0.0), 1), mask=own_R >= 0)
        z_RV = tl.where(own_RV, BARRED, z_RV)
    if columns < BLOCK_V:
        z_RV = tl.where((c_V < columns)[None, :], z_RV, BARRED)
    m_R = tl.max(z_RV, 1)
    # exp(BARRED - m) is 0, so a barred column adds nothing to any sum. Only where all are barred, in a last tile of
    # nothing but the target, would it be 1: there the shift is 0.
    alone_R = (own_R >= 0) & (columns == 1)
    z_RV = z_RV - tl.where(alone_R, 0.0, m_R)[:, None]
    e_RV = tl.exp(z_RV)
    if ref_hidden_ptr is not None:
        tl.store(drift_ptr + at_R, tl.sum(e_RV * d_RV, 1), mask=row_R < R)
    tl.store(m_ptr + at_R, m_R, mask=row_R < R)
    tl.store(s_ptr + at_R, tl.sum(e_RV, 1), mask=row_R < R)
    tl.store(a_ptr + at_R, tl.where(alone_R, 0.0, tl.sum(e_RV * z_RV, 1)), mask=row_R < R)
    if STORE:
        tl.store(e_ptr + to_RV, e_RV.to(e_ptr.dtype.element_ty), mask=(row_R < R)[:, None])


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], from 2 atanh(u / (2 + u)): the hardware's log is not accurate near 1."""
    s = u / (2 + u)
    q = s * s
    return 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q / 15)))))))


@triton.jit
def _expm1_small(x):
    """exp(x) - 1 for x in [-0.5, 0], by its series: exp(x) would lose the digits of a small x."""
    return x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))


@triton.jit
def _merge_tiles(
    m_ptr, s_ptr, a_ptr, target_z_ptr, logprob_ptr, entropy_ptr, top_ptr, log_total_ptr, R, tiles,
    START: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """K2. Two sweeps over the tiles of a row: their maximum, then the sums under it."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_T = tl.arange(0, BLOCK_T)
    at_TR = t_T[:, None] * R + row_R[None, :]
    m_TR = tl.full((BLOCK_T, BLOCK_R), START, tl.float32)
    for t in range(0, tiles, BLOCK_T):
        ok_TR = (t + t_T < tiles)[:, None] & (row_R < R)[None, :]
        m_TR = tl.maximum(m_TR, tl.load(m_ptr + t * R + at_TR, mask=ok_TR, other=START))
    m_R = tl.max(m_TR, 0)
    s_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    a_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for t in range(0, tiles, BLOCK_T):
        ok_TR = (t + t_T < tiles)[:, None] & (row_R < R)[None, :]
        from_TR = t * R + at_TR
        shift_TR = tl.load(m_ptr + from_TR, mask=ok_TR, other=START) - m_R[None, :]
        tile_s_TR = tl.load(s_ptr + from_TR, mask=ok_TR, other=0.0)
        tile_a_TR = tl.load(a_ptr + from_TR, mask=ok_TR, other=0.0)
        shrink_TR = tl.exp(shift_TR)
        s_TR += tile_s_TR * shrink_TR
        # shift is -inf-like for a tile of nothing but the target; its sums are 0, and 0 * -3e38 is 0
        a_TR += shrink_TR * (tile_a_TR + tile_s_TR * shift_TR)
    s_R = tl.sum(s_TR, 0)
    a_R = tl.sum(a_TR, 0)

    z_R = tl.load(target_z_ptr + row_R, mask=row_R < R, other=0.0)
    x_R = z_R - m_R - tl.log(s_R)  # the target's margin over all others together
    logprob_R = tl.minimum(x_R, 0.0) - _log1p(tl.exp(-tl.abs(x_R)))
    logprob_R = tl.where(x_R == x_R, logprob_R, x_R)
    top_R = tl.maximum(m_R, z_R)
    others_R = tl.exp(m_R - top_R)
    target_R = tl.exp(z_R - top_R)
    total_R = s_R * others_R + target_R
    # One of the two is 1: log1p of a small rest keeps a small entropy's digits.
    rest_R = s_R * others_R
    log_total_R = tl.where((target_R == 1) & (rest_R < 1), _log1p(rest_R), tl.log(total_R))
    weighted_R = others_R * (a_R + s_R * (m_R - top_R)) + target_R * (z_R - top_R)
    tl.store(logprob_ptr + row_R, logprob_R, mask=row_R < R)
    tl.store(entropy_ptr + row_R, log_total_R - weighted_R / total_R, mask=row_R < R)
    tl.store(top_ptr + row_R, top_R, mask=row_R < R)
    tl.store(log_total_ptr + row_R, log_total_R, mask=row_R < R)


@triton.jit
def _merge_divergence(
    m_ptr, ref_m_ptr, ref_s_ptr, drift_ptr, target_z_ptr, target_d_ptr, top_ptr, log_total_ptr, kl_ptr, level_ptr,
    R, tiles, START: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """K2 for the reference: KL, and the level g + KL that d is measured from in its gradient (linear_kl.py)."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t_T = tl.arange(0, BLOCK_T)
    at_TR = t_T[:, None] * R + row_R[None, :]
    ref_m_TR = tl.full((BLOCK_T, BLOCK_R), START, tl.float32)
    for t in range(0, tiles, BLOCK_T):
        ok_TR = (t + t_T < tiles)[:, None] & (row_R < R)[None, :]
        ref_m_TR = tl.maximum(ref_m_TR, tl.load(ref_m_ptr + t * R + at_TR, mask=ok_TR, other=START))
    ref_m_R = tl.max(ref_m_TR, 0)
    top_R = tl.load(top_ptr + row_R, mask=row_R < R, other=0.0)
    log_total_R = tl.load(log_total_ptr + row_R, mask=row_R < R, other=0.0)
    ref_s_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    drift_TR = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for t in range(0, tiles, BLOCK_T):
        ok_TR = (t + t_T < tiles)[:, None] & (row_R < R)[None, :]
        from_TR = t * R + at_TR
        ref_shift_TR = tl.load(ref_m_ptr + from_TR, mask=ok_TR, other=START) - ref_m_R[None, :]
        ref_s_TR += tl.load(ref_s_ptr + from_TR, mask=ok_TR, other=0.0) * tl.exp(ref_shift_TR)
        share_TR = tl.exp(tl.load(m_ptr + from_TR, mask=ok_TR, other=START) - top_R[None, :] - log_total_R[None, :])
        drift_TR += tl.load(drift_ptr + from_TR, mask=ok_TR, other=0.0) * share_TR
    target_z_R = tl.load(target_z_ptr + row_R, mask=row_R < R, other=0.0)
    target_d_R = tl.load(target_d_ptr + row_R, mask=row_R < R, other=0.0)
    drift_R = tl.sum(drift_TR, 0) + tl.exp(target_z_R - top_R - log_total_R) * target_d_R
    g_R = (top_R - ref_m_R) + (log_total_R - tl.log(tl.sum(ref_s_TR, 0)))
    tl.store(kl_ptr + row_R, drift_R - g_R, mask=row_R < R)
    tl.store(level_ptr + row_R, drift_R, mask=row_R < R)


@triton.jit
def _coefficients(by_logprob_ptr, by_entropy_ptr, by_kl_ptr, row_R, row_ok):
    """A row's largest slope, and the slopes over it: what is rounded to the head's dtype stays near 1.

    A slope that is NaN makes the row's all NaN; the hardware's maximum would drop it.
    """
    by_logprob_R = tl.load(by_logprob_ptr + row_R, mask=row_ok, other=0.0)
    by_entropy_R = tl.zeros_like(by_logprob_R)
    by_kl_R = tl.zeros_like(by_logprob_R)
    if by_entropy_ptr is not None:
        by_entropy_R = tl.load(by_entropy_ptr + row_R, mask=row_ok, other=0.0)
    if by_kl_ptr is not None:
        by_kl_R = tl.load(by_kl_ptr + row_R, mask=row_ok, other=0.0)
    size_R = tl.maximum(tl.maximum(tl.abs(by_logprob_R), tl.abs(by_entropy_R)), tl.abs(by_kl_R))
    sum_R = by_logprob_R + by_entropy_R + by_kl_R
    size_R = tl.where(sum_R == sum_R, size_R, float("nan"))
    over_R = tl.where(size_R == 0, 1.0, size_R)
    return size_R, by_logprob_R / over_R, by_entropy_R / over_R, by_kl_R / over_R


@triton.jit
def _gradient_sums(
    e_ptr, m_ptr, weight_ptr, entropy_ptr, top_ptr, log_total_ptr, order_ptr, tiles_ptr, counts_ptr, by_logprob_ptr,
    by_entropy_ptr, by_kl_ptr, d_ptr, level_ptr, part_ptr, total_ptr,
    R, V, H, span, e_stride, weight_stride, slope_factor,
    SOFTCAP: tl.constexpr, LOSS: tl.constexpr, EVEN_H: tl.constexpr, BOOST: tl.constexpr,
    TILE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """K3, the GEMM: part[i, r, h], a row's sum over the i-th `span` columns; total[i, r], the sum of its coefficients.

    Hidden blocks are the fastest index: those of a row block share e while it is in the cache. With LOSS the rows come
    in `order`, those with zero coefficients last: their blocks skip the GEMM. With `tiles` a block of rows takes those
    alone, and its splits share them. BOOST is a power of two that lifts small probabilities above the subnormals of
    float16.
    """
    blocks, row_blocks = tl.cdiv(H, BLOCK_H), tl.cdiv(R, BLOCK_R)
    block = tl.program_id(0) // blocks
    row_R = (block % row_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    h_H = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    v_V = tl.arange(0, BLOCK_V)
    split = block // row_blocks
    end = V
    if tiles_ptr is not None:
        end = tl.load(counts_ptr + block % row_blocks) * TILE
        span = tl.cdiv(end, tl.num_programs(0) // (blocks * row_blocks) * TILE) * TILE
        tiles_ptr += (block % row_blocks) * tl.cdiv(V, TILE)
    first = split * span
    last = tl.minimum(first + span, end)
    row_ok, h_ok = row_R < R, h_H < H
    if order_ptr is not None:
        row_R = tl.load(order_ptr + row_R, mask=row_ok, other=0).to(tl.int32)
    top_R = tl.load(top_ptr + row_R, mask=row_ok, other=0.0)
    log_total_R = tl.load(log_total_ptr + row_R, mask=row_ok, other=0.0)
    if LOSS:
        size_R, by_logprob_R, by_entropy_R, by_kl_R = _coefficients(
            by_logprob_ptr, by_entropy_ptr, by_kl_ptr, row_R, row_ok
        )
        if by_entropy_ptr is not None:
            entropy_R = tl.load(entropy_ptr + row_R, mask=row_ok, other=0.0)
        if by_kl_ptr is not None:
            level_R = tl.load(level_ptr + row_R, mask=row_ok, other=0.0)
        last = tl.where(tl.sum((size_R != 0).to(tl.int32), 0) == 0, first, last)

    at_RV = row_R[:, None] * e_stride + v_V[None, :]
    weight_VH = weight_ptr + v_V[:, None] * weight_stride + h_H[None, :]
    sum_RH = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    # Row sums as a product with ones, the least that tl.dot takes: tl.sum would need p in a second layout, and spill.
    total_RO = tl.zeros((BLOCK_R, ONES), tl.float32)
    ones_VO = tl.full((BLOCK_V, ONES), 1.0, weight_ptr.dtype.element_ty)
    if tiles_ptr is not None:
        # One turn ahead, and added to `at`: else the compiler neither pipelines the loads below nor widens them.
        tile = tl.load(tiles_ptr + first // TILE, mask=first < last, other=0)
    for at in range(first, last, BLOCK_V):
        v = at
        if tiles_ptr is not None:
            v = (tile - at // TILE) * TILE + at
            tile = tl.load(tiles_ptr + (at + BLOCK_V) // TILE, mask=at + BLOCK_V < last, other=0)
        m_R = tl.load(m_ptr + (v // TILE) * R + row_R, mask=row_ok, other=0.0)
        p_RV = tl.load(e_ptr + at_RV + v, mask=row_ok[:, None], other=0.0).to(tl.float32)
        shift_R = m_R - top_R - log_total_R
        by_R = tl.exp(shift_R) * BOOST
        if SOFTCAP or by_entropy_ptr is not None:
            log_e_RV = tl.log(tl.where(p_RV > 0, p_RV, 1.0))
        if by_entropy_ptr is None and by_kl_ptr is None:
            if LOSS:  # phi is the same for the whole row
                by_R = by_R * by_logprob_R
            p_RV = p_RV * by_R[:, None]
        else:
            phi_RV = by_logprob_R[:, None]
            if by_entropy_ptr is not None:
                phi_RV += by_entropy_R[:, None] * (log_e_RV + (shift_R + entropy_R)[:, None])
            if by_kl_ptr is not None:
                d_RV = tl.load(d_ptr + at_RV + v, mask=row_ok[:, None], other=0.0).to(tl.float32)
                phi_RV -= by_kl_R[:, None] * (d_RV - level_R[:, None])
            p_RV = p_RV * by_R[:, None] * phi_RV
        if SOFTCAP:
            # A tile of nothing but the target has m = BARRED, and the square would be infinite: 0 times that is NaN.
            m_R = tl.where(m_R * slope_factor < -2, 0.0, m_R)
            tanh_RV = (log_e_RV + m_R[:, None]) * slope_factor
            p_RV = p_RV * (1 - tanh_RV * tanh_RV)
        w_ok = (v + v_V < V)[:, None]
        if not EVEN_H:
            w_ok = w_ok & h_ok[None, :]
        w_VH = tl.load(weight_VH + v.to(tl.int64) * weight_stride, mask=w_ok, other=0.0)
        rounded_RV = p_RV.to(w_VH.dtype)
        if not SOFTCAP:
            total_RO = tl.dot(rounded_RV, ones_VO, total_RO, input_precision="ieee")
        sum_RH = tl.dot(rounded_RV, w_VH, sum_RH, input_precision="ieee")
    to_R = split * R + row_R
    tl.store(part_ptr + to_R[:, None] * H + h_H[None, :], sum_RH, mask=row_ok[:, None] & h_ok[None, :])
    if not SOFTCAP:
        tl.store(total_ptr + to_R, tl.max(total_RO, 1), mask=row_ok & (tl.program_id(0) % blocks == 0))


@triton.jit
def _gradient_rows(
    part_ptr, total_ptr, weight_ptr, target_ptr, target_z_ptr, logprob_ptr, entropy_ptr, by_logprob_ptr,
    by_entropy_ptr, by_kl_ptr, target_d_ptr, level_ptr, out_ptr,
    R, V, H, splits, weight_stride, out_stride, factor, slope_factor,
    SOFTCAP: tl.constexpr, LOSS: tl.constexpr, BOOST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """K3, the end: the splits together, always in the same order, and the target's own row of the head."""
    blocks = tl.cdiv(H, BLOCK_H)
    row_R = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    h_H = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_ok, h_ok = row_R < R, h_H < H
    ok_RH = row_ok[:, None] & h_ok[None, :]
    sum_RH = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    own_R = tl.zeros((BLOCK_R,), tl.float32)
    for split in range(splits):
        from_R = split * R + row_R
        sum_RH += tl.load(part_ptr + from_R[:, None] * H + h_H[None, :], mask=ok_RH, other=0.0)
        if not SOFTCAP:
            own_R += tl.load(total_ptr + from_R, mask=row_ok, other=0.0)
    target_R = tl.load(target_ptr + row_R, mask=row_ok, other=0)
    if LOSS:
        size_R, by_logprob_R, by_entropy_R, by_kl_R = _coefficients(
            by_logprob_ptr, by_entropy_ptr, by_kl_ptr, row_R, row_ok
        )
    # The gradients by all logits of a row sum to 0. Taking the target's from the others AS THEY WERE ROUNDED keeps it
    # so: otherwise their rounding errors would multiply whatever all rows of the head have in common.
    own_R = own_R * (1 / BOOST)
    if SOFTCAP:
        logprob_R = tl.load(logprob_ptr + row_R, mask=row_ok, other=0.0)
        # 1 - p without cancellation
        own_R = tl.where(logprob_R < -0.5, 1 - tl.exp(logprob_R), -_expm1_small(logprob_R))
        if LOSS:
            own_R = by_logprob_R * own_R
            if by_entropy_ptr is not None:
                entropy_R = tl.load(entropy_ptr + row_R, mask=row_ok, other=0.0)
                own_R -= by_entropy_R * tl.exp(logprob_R) * (logprob_R + entropy_R)
            if by_kl_ptr is not None:
                target_d_R = tl.load(target_d_ptr + row_R, mask=row_ok, other=0.0)
                level_R = tl.load(level_ptr + row_R, mask=row_ok, other=0.0)
                own_R += by_kl_R * tl.exp(logprob_R) * (target_d_R - level_R)
        tanh_R = tl.load(target_z_ptr + row_R, mask=row_ok, other=0.0) * slope_factor
        own_R = own_R * (1 - tanh_R * tanh_R)
    target_ok = row_ok & (target_R >= 0) & (target_R < V)
    target_RH = tl.load(
        weight_ptr + target_R[:, None] * weight_stride + h_H[None, :], mask=target_ok[:, None] & h_ok[None, :],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    grad_RH = factor * (own_R[:, None] * target_RH - sum_RH * (1 / BOOST))
    if LOSS:
        grad_RH = grad_RH * size_R[:, None]
    to_RH = out_ptr + row_R.to(tl.int64)[:, None] * out_stride + h_H[None, :]
    tl.store(to_RH, grad_RH.to(out_ptr.dtype.element_ty), mask=ok_RH)


def _splits(V: int, H: int) -> tuple[int, int]:
    """(columns of a split of K3, number of splits): enough programs to fill a GPU, of 1,024 columns or more each.

    They follow from the head alone, so a row's sum has the same parts in any batch and under any launch.
    """
    tiles = triton.cdiv(V, STATISTICS_TILE)
    wanted = min(triton.cdiv(PROGRAMS, triton.cdiv(H, 128)), triton.cdiv(tiles, 8))
    span = triton.cdiv(tiles, wanted)
    return span * STATISTICS_TILE, triton.cdiv(tiles, span)


def _chunk_rows(V: int, element_size: int) -> int:
    """Rows whose e fits WORKSPACE_BYTES, between 512 (fewer, and reading the head would bind) and 1,024.

    So a chunk has 2^31 logits only at a vocabulary of two million, and the kernels count them in 32 bits.
    """
    return min(max(WORKSPACE_BYTES // (V * element_size) // 128 * 128, 512), 1024)


class Workspace(NamedTuple):
    """Scratch memory for one chunk of rows."""

    rows: int
    statistics_3TR: torch.Tensor
    """m, s and a of each tile and row."""
    e_RV: torch.Tensor
    """exp(z - m), columns padded to whole tiles; no rows when no gradient is needed."""
    divergence_3TR: torch.Tensor | None = None
    """With a reference: its m and s, and the sum of e d."""
    d_RV: torch.Tensor | None = None
    """With a reference: d, where e_RV has e."""


def _workspace(hidden_NH: torch.Tensor, V: int, gradient: bool, reference: bool) -> Workspace:
    tiles = triton.cdiv(V, STATISTICS_TILE)
    rows = min(_chunk_rows(V, hidden_NH.element_size()), hidden_NH.shape[0])
    statistics_3TR = hidden_NH.new_empty(3, tiles, rows, dtype=torch.float32)
    e_RV = hidden_NH.new_empty(rows if gradient else 0, tiles * STATISTICS_TILE)
    if not reference:
        return Workspace(rows, statistics_3TR, e_RV)
    return Workspace(rows, statistics_3TR, e_RV, torch.empty_like(statistics_3TR), torch.empty_like(e_RV))


class Rows(NamedTuple):
    """What K1 and K2 find out about rows, float32 [R] each."""

    logprob_R: torch.Tensor
    entropy_R: torch.Tensor
    top_R: torch.Tensor
    log_total_R: torch.Tensor
    target_z_R: torch.Tensor
    kl_R: torch.Tensor | None = None
    """With a reference: KL, the level of its gradient, and the target's d."""
    level_R: torch.Tensor | None = None
    target_d_R: torch.Tensor | None = None

    def part(self, rows: slice) -> Rows:
        return Rows(*(None if row is None else row[rows] for row in self))


def new_rows(hidden_NH: torch.Tensor, reference: bool = False) -> Rows:
    """A target outside the vocabulary is in no tile, so its z, and with it the logprob, stays NaN."""
    fields = len(Rows._fields) - (0 if reference else len(Rows._field_defaults))
    return Rows(*(hidden_NH.new_full(hidden_NH.shape[:1], torch.nan, dtype=torch.float32) for _ in range(fields)))


class Head(NamedTuple):
    """The frozen head and how its products become z."""

    weight_VH: torch.Tensor
    temperature: float
    softcap: float | None
    scale: float


def _planes(planes_3TR: torch.Tensor, rows: int) -> torch.Tensor:
    """[3, T, rows], where a chunk of `rows` rows puts them."""
    T = planes_3TR.shape[1]
    return planes_3TR.flatten(1)[:, : T * rows].unflatten(1, (T, rows))


def score_chunk(
    hidden_RH: torch.Tensor,
    targets_R: torch.Tensor,
    head: Head,
    space: Workspace,
    out: Rows,
    ref_hidden_RH: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> None:
    """K1 and K2; e is stored if the workspace has rows for it. K1's launch is as given, or head_launches.py's."""
    (R, H), V = hidden_RH.shape, head.weight_VH.shape[0]
    tiles, reference = triton.cdiv(V, STATISTICS_TILE), ref_hidden_RH is not None
    m_TR, s_TR, a_TR = _planes(space.statistics_3TR, R)
    ref_m_TR, ref_s_TR, drift_TR = _planes(space.divergence_3TR, R) if reference else (None,) * 3
    soft = head.softcap is not None
    launch = launch or head_launches(hidden_RH.element_size()).for_k1(softcap=soft, reference=reference)
    _tile_statistics[(triton.cdiv(R, launch.blocks["BLOCK_R"]) * tiles,)](
        hidden_RH, ref_hidden_RH, head.weight_VH, targets_R, m_TR, s_TR, a_TR, out.target_z_R, space.e_RV,
        ref_m_TR, ref_s_TR, drift_TR, out.target_d_R, space.d_RV,
        R, V, H, hidden_RH.stride(0), ref_hidden_RH.stride(0) if reference else 0, head.weight_VH.stride(0),
        space.e_RV.stride(0),
        head.scale / head.softcap if soft else 1.0,
        (head.softcap if soft else head.scale) / head.temperature,
        SOFTCAP=soft, STORE=len(space.e_RV) > 0, EVEN_H=H % launch.blocks["BLOCK_H"] == 0, BARRED=BARRED,
        BLOCK_V=STATISTICS_TILE, **launch.blocks, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    finish = dict(START=START, **FINISH.blocks, num_warps=FINISH.warps, num_stages=FINISH.stages)
    grid = (triton.cdiv(R, FINISH.blocks["BLOCK_R"]),)
    _merge_tiles[grid](
        m_TR, s_TR, a_TR, out.target_z_R, out.logprob_R, out.entropy_R, out.top_R, out.log_total_R, R, tiles, **finish
    )
    if reference:
        _merge_divergence[grid](
            m_TR, ref_m_TR, ref_s_TR, drift_TR, out.target_z_R, out.target_d_R, out.top_R, out.log_total_R, out.kl_R,
            out.level_R, R, tiles, **finish,
        )  # fmt: skip


def gradient_chunk(
    targets_R: torch.Tensor,
    head: Head,
    space: Workspace,
    rows: Rows,
    out_RH: torch.Tensor,
    by_logprob_R: torch.Tensor | None = None,
    by_entropy_R: torch.Tensor | None = None,
    by_kl_R: torch.Tensor | None = None,
    drop_mass: float = 0.0,
    launch: Launch | None = None,
) -> None:
    """K3: the Jacobian of the logprobs, or with coefficients the gradient of a loss; after `score_chunk`.

    A `drop_mass` leaves tiles out (active_tiles.py), not with slopes by the KL. The GEMM's launch is as given, or
    head_launches.py's.
    """
    (V, H), (R, _) = head.weight_VH.shape, out_RH.shape
    loss, half, soft = by_logprob_R is not None, out_RH.dtype is torch.float16, head.softcap is not None
    by_column = by_entropy_R is not None or by_kl_R is not None
    if launch is None:
        launch = head_launches(out_RH.element_size()).for_k3(softcap=soft, by_column=by_column, drop=drop_mass > 0)
    order_R = tiles_BT = counts_B = None
    if drop_mass:
        weight_TR = tile_weights(
            _planes(space.statistics_3TR, R), rows.top_R, rows.log_total_R, rows.entropy_R, by_logprob_R, by_entropy_R
        )
        order_R, tiles_BT, counts_B = active_tiles(weight_TR, drop_mass, launch.blocks["BLOCK_R"])
    elif loss:
        silent_R = by_logprob_R == 0
        for by_R in (by_entropy_R, by_kl_R):
            silent_R = silent_R if by_R is None else silent_R & (by_R == 0)
        order_R = silent_R.sort(stable=True).indices
    boost = (2.0**12 if loss else 2.0**15) if half else 1.0
    slope_factor = head.temperature / head.softcap if soft else 1.0
    blocks = triton.cdiv(R, launch.blocks["BLOCK_R"]) * triton.cdiv(H, launch.blocks["BLOCK_H"])
    span, splits = _splits(V, H)
    part_SRH, total_SR = (out_RH.new_empty(shape, dtype=torch.float32) for shape in ((splits, R, H), (splits, R)))
    _gradient_sums[(blocks * splits,)](
        space.e_RV, space.statistics_3TR, head.weight_VH, rows.entropy_R, rows.top_R, rows.log_total_R, order_R,
        tiles_BT, counts_B, by_logprob_R, by_entropy_R, by_kl_R, space.d_RV, rows.level_R, part_SRH, total_SR,
        R, V, H, span, space.e_RV.stride(0), head.weight_VH.stride(0), slope_factor,
        SOFTCAP=soft, LOSS=loss, EVEN_H=H % launch.blocks["BLOCK_H"] == 0, BOOST=boost,
        TILE=STATISTICS_TILE, **launch.blocks, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    _gradient_rows[(triton.cdiv(R, ROWS.blocks["BLOCK_R"]) * triton.cdiv(H, ROWS.blocks["BLOCK_H"]),)](
        part_SRH, total_SR, head.weight_VH, targets_R, rows.target_z_R, rows.logprob_R, rows.entropy_R, by_logprob_R,
        by_entropy_R, by_kl_R, rows.target_d_R, rows.level_R, out_RH,
        R, V, H, splits, head.weight_VH.stride(0), out_RH.stride(0), head.scale / head.temperature, slope_factor,
        SOFTCAP=soft, LOSS=loss, BOOST=boost, **ROWS.blocks, num_warps=ROWS.warps, num_stages=ROWS.stages,
    )  # fmt: skip


def rows_last_contiguous(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def chunks(
    hidden_NH: torch.Tensor, head: Head, gradient: bool, reference: bool = False
) -> Iterator[tuple[slice, Workspace]]:
    """Slices of rows, and the workspace that they take turns in."""
    if hidden_NH.shape[0] == 0:
        return
    space = _workspace(hidden_NH, head.weight_VH.shape[0], gradient, reference)
    for first in range(0, hidden_NH.shape[0], space.rows):
        yield slice(first, first + space.rows), space


def _forward_triton(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    jacobian: bool,
    drop_mass: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_forward_torch`, but for the Jacobian's dtype, which is that of the hidden states."""
    head = Head(rows_last_contiguous(weight_VH), temperature, softcap, scale)
    hidden_NH, targets_N = rows_last_contiguous(hidden_NH), targets_N.contiguous()
    found = new_rows(hidden_NH)
    jacobian_NH = hidden_NH.new_empty(hidden_NH.shape if jacobian else (0, hidden_NH.shape[1]))
    for rows, space in chunks(hidden_NH, head, jacobian):
        part = found.part(rows)
        score_chunk(hidden_NH[rows], targets_N[rows], head, space, part)
        if jacobian:
            gradient_chunk(targets_N[rows], head, space, part, jacobian_NH[rows], drop_mass=drop_mass)
    return found.logprob_R, found.entropy_R, torch.stack([found.top_R, found.log_total_R]), jacobian_NH


def _loss_backward_triton(
    grad_logprob_N: torch.Tensor,
    grad_entropy_N: torch.Tensor,
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    drop_mass: float,
) -> torch.Tensor:
    """The gradient by hidden_NH of the sum of grad_logprob_N logprob_N + grad_entropy_N entropy_N, in its dtype."""
    head = Head(rows_last_contiguous(weight_VH), temperature, softcap, scale)
    hidden_NH, targets_N = rows_last_contiguous(hidden_NH), targets_N.contiguous()
    found, grad_NH = new_rows(hidden_NH), hidden_NH.new_empty(hidden_NH.shape)
    by_logprob_N, by_entropy_N = grad_logprob_N.contiguous(), grad_entropy_N.contiguous()
    for rows, space in chunks(hidden_NH, head, True):
        part = found.part(rows)
        score_chunk(hidden_NH[rows], targets_N[rows], head, space, part)
        gradient_chunk(
            targets_N[rows], head, space, part, grad_NH[rows], by_logprob_N[rows], by_entropy_N[rows],
            drop_mass=drop_mass,
        )  # fmt: skip
    return grad_NH


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
    drop_mass: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    check_ids("targets_N", targets_N, weight_VH, backend)
    if backend == "triton":
        with torch.cuda.device_of(hidden_NH):
            return _forward_triton(hidden_NH, weight_VH, targets_N, temperature, softcap, scale, jacobian, drop_mass)
    with float32_sums(hidden_NH):
        return _forward_torch(hidden_NH, weight_VH, targets_N, temperature, softcap, scale, jacobian)


@_linear_logprob.register_fake
def _(hidden_NH, weight_VH, targets_N, temperature, softcap, scale, jacobian, drop_mass, backend):
    N, H = hidden_NH.shape
    wide = wide_dtype(hidden_NH.dtype)
    row = hidden_NH.new_empty(N, dtype=wide)
    return (
        row,
        torch.empty_like(row),
        hidden_NH.new_empty(2, N, dtype=wide),
        hidden_NH.new_empty(N if jacobian else 0, H, dtype=hidden_NH.dtype if backend == "triton" else wide),
    )


@torch.library.custom_op("mentor_kernels::linear_logprob_entropy_backward", mutates_args=())
def _entropy_backward(
    grad_entropy_N: torch.Tensor,
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_N: torch.Tensor,
    entropy_N: torch.Tensor,
    shift_2N: torch.Tensor,
    jacobian_NH: torch.Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
    drop_mass: float,
    backend: str,
) -> torch.Tensor:
    if backend == "triton":
        with torch.cuda.device_of(hidden_NH):
            return _loss_backward_triton(
                torch.zeros_like(grad_entropy_N), grad_entropy_N, hidden_NH, weight_VH, targets_N, temperature,
                softcap, scale, drop_mass,
            )  # fmt: skip
    with float32_sums(hidden_NH):
        return _entropy_backward_torch(
            grad_entropy_N, hidden_NH, weight_VH, targets_N, entropy_N, shift_2N, jacobian_NH, temperature, softcap,
            scale,
        )  # fmt: skip


@_entropy_backward.register_fake
def _(grad_entropy_N, hidden_NH, *rest):
    backend = rest[-1]
    dtype = hidden_NH.dtype if backend == "triton" else wide_dtype(hidden_NH.dtype)
    return hidden_NH.new_empty(hidden_NH.shape, dtype=dtype)


def _setup_context(ctx, inputs, output):
    hidden_NH, weight_VH, targets_N, ctx.temperature, ctx.softcap, ctx.scale, _, ctx.drop_mass, ctx.backend = inputs
    _, entropy_N, shift_2N, jacobian_NH = output
    ctx.set_materialize_grads(False)  # None upstream of the entropy means that its gradient costs nothing
    ctx.mark_non_differentiable(shift_2N, jacobian_NH)
    ctx.save_for_backward(hidden_NH, weight_VH, targets_N, entropy_N, shift_2N, jacobian_NH)


def _backward(ctx, grad_logprob_N, grad_entropy_N, _shift, _jacobian):
    hidden_NH, weight_VH, targets_N, entropy_N, shift_2N, jacobian_NH = ctx.saved_tensors
    grad_NH = None
    if grad_logprob_N is not None:
        grad_NH = grad_logprob_N[:, None] * jacobian_NH
    if grad_entropy_N is not None:
        entropy_NH = _entropy_backward(
            grad_entropy_N, hidden_NH, weight_VH, targets_N, entropy_N, shift_2N, jacobian_NH, ctx.temperature,
            ctx.softcap, ctx.scale, ctx.drop_mass, ctx.backend,
        )  # fmt: skip
        grad_NH = entropy_NH if grad_NH is None else grad_NH + entropy_NH
    if grad_NH is not None:
        grad_NH = grad_NH.to(hidden_NH.dtype)
    return grad_NH, *[None] * 8


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
    drop_mass: float = 0.0,
    backend: str | None = None,
) -> LogprobOut:
    """Logprob of each target and entropy of its distribution, z = softcap(scale hidden @ weight.T) / temperature.

    hidden_NH and weight_VH are float32, bfloat16 or float16, both the same; targets_N is int64 in [0, V). Any N (0
    too), H and V. The outputs are float32, from logits that were summed and kept in float32 (float64 in, float64 out).

    Differentiable in hidden_NH through both outputs; the head is frozen and never gets a gradient. Under no_grad, or
    when hidden_NH needs no gradient, only the score is computed, with bitwise the same result for the same rows
    (tested on the CPU and in Triton's interpreter, not yet on a GPU).

    A drop_mass above 0 lets the Triton kernels leave tiles of the head out of the gradient (never out of the score), at
    most that much probability in each row: a unit of upstream gradient is then off by at most 2 drop_mass max |W_v|
    |scale| / temperature, and what is left out depends on the rows beside it (active_tiles.py). The torch backend
    leaves nothing out.

    Raises ValueError for a target outside [0, V) (from Triton on a GPU such a row gives NaN instead: to look would stop
    the CPU until the GPU has caught up), for shapes, dtypes or devices that do not agree, for a temperature or softcap
    that is not positive, for a drop_mass outside [0, 1), and for an unknown backend.
    """
    check_head(hidden_NH, weight_VH, targets_N, temperature, softcap)
    check_drop_mass(drop_mass)
    backend = resolve_head_backend(backend, hidden_NH.device)
    if backend == "triton":
        check_triton(hidden_NH)
    logprob_N, entropy_N, _, _ = _linear_logprob(
        hidden_NH,
        weight_VH,
        targets_N,
        float(temperature),
        None if softcap is None else float(softcap),
        float(scale),
        torch.is_grad_enabled() and hidden_NH.requires_grad,
        float(drop_mass),
        backend,
    )
    return LogprobOut(logprob_N, entropy_N)


def check_head(hidden_NH, weight_VH, targets_N, temperature, softcap) -> None:
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


def check_drop_mass(drop_mass: float) -> None:
    if not 0 <= drop_mass < 1:
        raise ValueError(f"drop_mass must lie in [0, 1), not {drop_mass}")


def check_ids(name: str, ids: torch.Tensor, weight_VH: torch.Tensor, backend: str) -> None:
    """Not for Triton on a GPU: to look would stop the CPU until the GPU is done. There a bad id gives NaN."""
    V = weight_VH.shape[0]
    look = backend == "torch" or interpreted()
    if look and ids.numel() and (ids.min() < 0 or ids.max() >= V):
        raise ValueError(f"{name} must lie in [0, {V}), but reach from {ids.min()} to {ids.max()}")


def check_triton(hidden_NH: torch.Tensor) -> None:
    if hidden_NH.dtype is torch.float64:
        raise ValueError("the Triton backend takes float32, bfloat16 or float16; float64 needs backend='torch'")
    if interpreted() and hidden_NH.dtype is torch.bfloat16:
        raise ValueError("Triton's interpreter computes garbage from bfloat16; use float32, or backend='torch'")
