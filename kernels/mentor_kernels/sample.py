"""Drawing a token from each row of logits, and its logprob.

Mathematics. Row b has logits z_v and one uniform u in [0, 1), which names the row's noise: an exponential variable for
each token v, from a hash of u and v. The Gumbel-max trick (or exponential race):

    token   = argmax_v z_v / T - log E_v(u)      P(token = v) = exp(z_v / T) / sum over w of exp(z_w / T)
    logprob = log p_token                        at T = 0: the first of the largest z, with the logprob of T = 1

top_k and top_p cut logits off before (they become -inf), and logprob is that of what is left. A row without a
distribution (a NaN, an inf, nothing but -inf) gives token 0 and logprob NaN.

Why not the inverse CDF, which needs no noise but u? Logits that differ in their last bits, because other rows were
decoded beside them, move every boundary of a CDF, and a draw may fall on the other side of any. Here the token changes
only where two tokens race head to head: at most twice as often as it must, which is in half the sum of |p_v - p'_v|.
Measured: in 1.6 % of the tokens instead of 12.8 %, in bf16 (bench/LOG.md).

    x   = (floor(u 2^32) + 0x9E3779B9 v) mod 2^32        then three rounds of x ^= x >> r and multiplications (murmur3)
    E   = -log(1 - (x + 1/2) 2^-32)                      small E, which win, have all their digits

Logprob: w_v = floor(exp((z_v - max z) / T) 2^40), the largest is 2^40. Sums of integers are exact in any order, so no
block size can change a bit, and sum w - 2^40 is what the logprob of a confident token is made of.

Bytes and FLOPs: a row is read twice, the second time from the L2 cache where the batch fits there; 16 bytes a row are
written. Some 60 operations a logit, so memory is the floor. log_softmax, noise and argmax as operators of their own
move [B, V] eight times or more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mentor_kernels.backend import interpreted, resolve_backend
from mentor_kernels.linear_logprob import _log1p

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_COLUMNS = 1 << 22
"""Of weights up to 2^40, this many cannot overflow an int64."""


class SampleOut(NamedTuple):
    """What `sample` returns: int64 [B] and float32 [B], in nats."""

    token_B: torch.Tensor
    logprob_B: torch.Tensor


# --- the noise: int32 arithmetic that wraps, the same on every backend ----------------------------------------------

STRIDE, MIX_1, MIX_2 = (c - (1 << 32) for c in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))
"""The golden ratio's fraction, and the multipliers of murmur3's finaliser (Appleby, public domain), as int32."""
ALMOST_ONE = 1 - 2.0**-24
"""The largest float32 below 1: no E is infinite."""


def _seeds(uniform_B: torch.Tensor) -> torch.Tensor:
    """The row's seed, int32."""
    return (uniform_B * 2**32).long().to(torch.int32)


def noise(seed_B: torch.Tensor, columns: int) -> torch.Tensor:
    """E [B, columns], float32: exponential variables of rate 1."""
    x = seed_B[:, None] + torch.arange(columns, dtype=torch.int32, device=seed_B.device) * STRIDE
    y = torch.empty_like(x)
    for shift, factor in ((16, MIX_1), (13, MIX_2), (16, None)):
        torch.bitwise_right_shift(x, shift, out=y)
        x ^= y.bitwise_and_((1 << (32 - shift)) - 1)  # >> of an int32 brings copies of the sign
        if factor is not None:
            x *= factor
    # x as an unsigned number, plus 1/2, over 2^32. The float's rounding is relative: a small one keeps its digits.
    u = torch.where(x < 0, x.float() + 2.0**32, x.float()).add_(0.5).mul_(2.0**-32)
    return u.clamp_(max=ALMOST_ONE).neg_().log1p_().neg_()


# --- the torch backend: the readable reference, and the path that CPUs run -----------------------------------------


def _sample_torch(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_BV = logits_BV.float()
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    logp_BV = logits_BV.log_softmax(-1)
    if temperature:
        token_B1 = (logp_BV - noise(_seeds(uniform_B), logp_BV.shape[1]).log_()).argmax(-1, keepdim=True)
    else:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
    # A NaN anywhere makes the whole row's logprobs NaN.
    logp_B1 = logp_BV.gather(-1, token_B1)
    return token_B1.masked_fill(logp_B1.isnan(), 0)[:, 0], logp_B1[:, 0]


def _truncate(logits_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Keep the top_k tokens, then the smallest set with probability top_p; the rest become -inf.

    With both, only the top_k are sorted, not the vocabulary. Tokens as likely as the last one kept are kept too.
    """
    V = logits_BV.shape[-1]
    best_BK = logits_BV.topk(min(top_k or V, V)).values
    last_B1 = best_BK[:, -1:]
    if top_p < 1:
        p_BK = best_BK.float().softmax(-1)
        within_BK = p_BK.cumsum(-1) - p_BK < top_p
        last_B1 = best_BK.gather(1, within_BK.sum(1, keepdim=True).clamp(min=1) - 1)  # none is within if one is NaN
    return logits_BV.masked_fill(logits_BV < last_B1, float("-inf"))


# --- the Triton backend: one program a row -------------------------------------------------------------------------

BLOCK = 2048
WARPS = 8
ONE = 1 << 40
"""The largest weight of a row; an integer, so that what is subtracted from a sum stays one."""


@triton.jit
def _log_noise(seed, v_B, STRIDE: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr, ALMOST_ONE: tl.constexpr):
    """log E_v, as `noise` has it."""
    x_B = seed + v_B * STRIDE
    x_B = (x_B ^ ((x_B >> 16) & 0xFFFF)) * MIX_1
    x_B = (x_B ^ ((x_B >> 13) & 0x7FFFF)) * MIX_2
    x_B = x_B ^ ((x_B >> 16) & 0xFFFF)
    u_B = (tl.where(x_B < 0, x_B.to(tl.float32) + 4294967296.0, x_B.to(tl.float32)) + 0.5) * 2.3283064365386963e-10
    u_B = tl.minimum(u_B, ALMOST_ONE)
    small_B = tl.where(u_B < 0.5, u_B, 0.0)
    return tl.log(tl.where(u_B < 0.5, _log1p(small_B / (1 - small_B)), -tl.log(1 - u_B)))


@triton.jit
def _sample_rows(
    logits_ptr, seed_ptr, token_ptr, logprob_ptr, V, stride, inverse_temperature,
    GREEDY: tl.constexpr, ONE: tl.constexpr, STRIDE: tl.constexpr, MIX_1: tl.constexpr, MIX_2: tl.constexpr,
    ALMOST_ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Two sweeps over a row: the largest logit; then the weights, and the race."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    top_B = tl.full([BLOCK], float("-inf"), tl.float32)
    first_B = tl.zeros([BLOCK], tl.int32)
    unsound_B = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        z_B = tl.load(row_ptr + v_B, mask=v_B < V, other=float("-inf")).to(tl.float32)
        unsound_B |= ((z_B != z_B) | (z_B == float("inf"))).to(tl.int32)
        higher_B = z_B > top_B
        first_B = tl.where(higher_B, v_B, first_B)
        top_B = tl.where(higher_B, z_B, top_B)
    top = tl.max(top_B)
    sound = (tl.max(unsound_B) == 0) & (top > float("-inf"))
    # Only a row without a distribution holds a NaN, which has no integer; its results are not used.
    top = tl.where(sound, top, 0.0)

    seed = tl.load(seed_ptr + row)
    w_B = tl.zeros([BLOCK], tl.int64)
    best_B = tl.full([BLOCK], float("-inf"), tl.float32)
    winner_B = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        v_B = start + tl.arange(0, BLOCK)
        z_B = tl.load(row_ptr + v_B, mask=v_B < V, other=float("-inf")).to(tl.float32)
        z_B = (tl.where(z_B == z_B, z_B, 0.0) - top) * inverse_temperature
        w_B += (tl.minimum(tl.exp(z_B), 1.0) * ONE).to(tl.int64)
        if not GREEDY:
            score_B = z_B - _log_noise(seed, v_B, STRIDE, MIX_1, MIX_2, ALMOST_ONE)
            winner_B = tl.where(score_B > best_B, v_B, winner_B)
            best_B = tl.maximum(score_B, best_B)
    if GREEDY:
        token = tl.min(tl.where(top_B == top, first_B, V))
    else:
        token = tl.min(tl.where(best_B == tl.max(best_B), winner_B, V))
    token = tl.where(sound, token, 0)
    rest = (tl.sum(w_B) - ONE).to(tl.float32) / ONE
    log_total = tl.where(rest < 1, _log1p(rest), tl.log(rest + 1))
    logprob = (tl.load(row_ptr + token).to(tl.float32) - top) * inverse_temperature - log_total
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(sound, logprob, float("nan")))


def _sample_triton(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _sample_torch, without a host sync."""
    B, V = logits_BV.shape
    token_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    logprob_B = torch.empty(B, dtype=torch.float32, device=logits_BV.device)
    if not B:
        return token_B, logprob_B
    rows_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    with torch.cuda.device_of(logits_BV):
        _sample_rows[(B,)](
            rows_BV, _seeds(uniform_B), token_B, logprob_B, V, rows_BV.stride(0), 1 / (temperature or 1.0),
            GREEDY=not temperature, ONE=ONE, STRIDE=STRIDE, MIX_1=MIX_1, MIX_2=MIX_2, ALMOST_ONE=ALMOST_ONE,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return token_B, logprob_B


# --- the operator that torch.compile sees --------------------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::sample", mutates_args=())
def _sample(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = _sample_triton if backend == "triton" else _sample_torch
    return draw(logits_BV, uniform_B, temperature)


@_sample.register_fake
def _(logits_BV, uniform_B, temperature, backend):
    B = logits_BV.shape[0]
    return logits_BV.new_empty(B, dtype=torch.int64), logits_BV.new_empty(B, dtype=torch.float32)


# --- the public function -------------------------------------------------------------------------------------------


def sample(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str | None = None,
) -> SampleOut:
    """One token of each row, and its logprob under the distribution that it was drawn from.

    logits_BV is float32, bfloat16 or float16, any B (0 too), V up to 2^22. uniform_B, float32 or float64 in [0, 1),
    names each row's noise by its first 32 bits; a value outside counts as the nearest inside. Temperature 0 is greedy,
    with the logprob of temperature 1. top_k 0 and top_p 1 cut nothing off. Not differentiable. A row with a NaN, an inf
    or nothing but -inf gives token 0 and logprob NaN: to raise would stop the CPU until the GPU has caught up.

    Raises ValueError for shapes, dtypes or devices that do not agree, for an empty vocabulary, for a temperature that
    is negative or not finite, for top_k below 0, top_p outside (0, 1], and for an unknown backend.
    """
    _check(logits_BV, uniform_B, temperature, top_k, top_p)
    backend = resolve_backend(backend, logits_BV.device)
    if backend == "triton" and interpreted() and logits_BV.dtype is torch.bfloat16:
        raise ValueError("Triton's interpreter computes garbage from bfloat16; use float32, or backend='torch'")
    if temperature and (top_k or top_p < 1):
        logits_BV = _truncate(logits_BV.float() / temperature, top_k, top_p)
        temperature = 1.0
    uniform_B = uniform_B.double().clamp(0, 1 - 2**-53)
    return SampleOut(*_sample(logits_BV.detach(), uniform_B, float(temperature), backend))


def _check(logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_k: int, top_p: float) -> None:
    if logits_BV.dim() != 2 or logits_BV.dtype not in LOGIT_DTYPES:
        raise ValueError(
            "logits_BV must be float32, bfloat16 or float16 [B, V], "
            f"not {logits_BV.dtype} {tuple(logits_BV.shape)}"
        )  # fmt: skip
    if not 0 < logits_BV.shape[1] <= MOST_COLUMNS:
        raise ValueError(f"a vocabulary has 1 to {MOST_COLUMNS} tokens, not {logits_BV.shape[1]}")
    if uniform_B.shape != logits_BV.shape[:1] or uniform_B.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"uniform_B must be float32 or float64 [{logits_BV.shape[0]}], "
            f"not {uniform_B.dtype} {tuple(uniform_B.shape)}"
        )  # fmt: skip
    if uniform_B.device != logits_BV.device:
        raise ValueError(f"uniform_B is on {uniform_B.device}, but logits_BV on {logits_BV.device}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, not {temperature}")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must not be negative and top_p lie in (0, 1], not {top_k} and {top_p}")
