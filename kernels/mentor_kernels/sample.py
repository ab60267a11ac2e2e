"""Drawing a token from each row of logits, and its logprob.

Mathematics. Row b has logits z_v and one uniform u in [0, 1), which names the row's noise: an exponential variable for
each token v, from a hash of u and v. The Gumbel-max trick (or exponential race):

    token   = argmax_v z_v / T - log E_v(u)      P(token = v) = exp(z_v / T) / sum over w of exp(z_w / T)
    logprob = log p_token                        at T = 0: the first of the largest z, with the logprob of T = 1

top_k and top_p let only the likeliest tokens race; logprob is that of the whole distribution all the same, for the
update computes that one: what differs between the two is then arithmetic, and not the probability that was left out. A
row without a distribution (a NaN, an inf, nothing but -inf) gives token 0 and logprob NaN.

Why not the inverse CDF, which needs no noise but u? Logits that differ in their last bits, because other rows were
decoded beside them, move every boundary of a CDF, and a draw may fall on the other side of any. Here the token changes
only where two tokens race head to head: at most twice as often as it must, which is in half the sum of |p_v - p'_v|.
Measured: in 1.6 % of the tokens instead of 12.8 %, in bf16 (bench/LOG.md).

    x   = (floor(u 2^32) + 0x9E3779B9 v) mod 2^32        then three rounds of x ^= x >> r and multiplications (murmur3)
    E   = -log(1 - (x + 1/2) 2^-32)                      small E, which win, have all their digits

Logprob: w_v = floor(exp((z_v - max z) / T) 2^40), the largest is 2^40. Sums of integers are exact in any order, so no
block size can change a bit, and sum w - 2^40 is what the logprob of a confident token is made of.

Bytes and FLOPs: a row is read twice, the second time from the L2 cache where the batch fits there; a block of 4,096
logits leaves 24 bytes, a row 12. Some 60 operations a logit, so memory is the floor. log_softmax, noise and argmax as
operators of their own move [B, V] eight times or more.

The Triton kernels, three launches, with a program for every block of a row, so that a few rows fill a GPU as well:

    _block_top      a block's largest logit, and where it stands first
    _block_race     with the row's largest logit, which each program finds among its blocks': a block's sum of weights,
                    and the winner of its race
    _merge_blocks   a row's blocks together: the sum, and the first of the best winners
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
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, least_B: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_BV = logits_BV.float()
    logp_BV = (logits_BV if temperature in (0.0, 1.0) else logits_BV / temperature).log_softmax(-1)
    if temperature:
        score_BV = logp_BV - noise(_seeds(uniform_B), logp_BV.shape[1]).log_()
        if least_B is not None:
            score_BV.masked_fill_(logits_BV < least_B[:, None], float("-inf"))
        token_B1 = score_BV.argmax(-1, keepdim=True)
    else:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
    # A NaN anywhere makes the whole row's logprobs NaN.
    logp_B1 = logp_BV.gather(-1, token_B1)
    return token_B1.masked_fill(logp_B1.isnan(), 0)[:, 0], logp_B1[:, 0]


def least_logits(logits_BV: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The smallest logit that races in each row, float32 [B]: of the top_k, those of the smallest set with top_p.

    With both, only the top_k are sorted, not the vocabulary. Tokens as likely as the last one kept are kept too.
    """
    V = logits_BV.shape[-1]
    best_BK = logits_BV.topk(min(top_k or V, V)).values.float()
    last_B1 = best_BK[:, -1:]
    if top_p < 1:
        p_BK = (best_BK / temperature).softmax(-1)
        within_BK = p_BK.cumsum(-1) - p_BK < top_p
        last_B1 = best_BK.gather(1, within_BK.sum(1, keepdim=True).clamp(min=1) - 1)  # none is within if one is NaN
    return last_B1[:, 0].contiguous()


# --- the Triton backend: one program a block of a row ---------------------------------------------------------------

BLOCK = 4096
"""Columns of one program. It does not depend on the batch, and no bit depends on it."""
WARPS = 8
MERGE_WARPS = 1
ONE = 1 << 40
"""The largest weight of a row; an integer, so that what is subtracted from a sum stays one."""
UNSOUND = -1
"""In place of a block's first largest logit: the block has a NaN or an inf."""


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
def _row_top(top_ptr, first_ptr, row, blocks, BLOCKS: tl.constexpr):
    """Of a row's blocks: the largest logit, where it stands first, and whether the row has a distribution."""
    i_K = tl.arange(0, BLOCKS)
    top_K = tl.load(top_ptr + row * blocks + i_K, mask=i_K < blocks, other=float("-inf"))
    first_K = tl.load(first_ptr + row * blocks + i_K, mask=i_K < blocks, other=0x7FFFFFFF)
    top = tl.max(top_K)
    sound = (tl.min(first_K) >= 0) & (top > float("-inf"))
    first = tl.min(tl.where(top_K == top, first_K, 0x7FFFFFFF))
    # Only a row without a distribution holds a NaN, which has no integer; its results are not used.
    return tl.where(sound, top, 0.0), first, sound


@triton.jit
def _block_top(logits_ptr, top_ptr, first_ptr, V, stride, UNSOUND: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a block's largest logit and its first place."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v_B = block * BLOCK + tl.arange(0, BLOCK)
    z_B = tl.load(logits_ptr + row * stride + v_B, mask=v_B < V, other=float("-inf")).to(tl.float32)
    unsound = tl.max(((z_B != z_B) | (z_B == float("inf"))).to(tl.int32))
    top = tl.max(tl.where(z_B == z_B, z_B, float("-inf")))
    first = tl.min(tl.where(z_B == top, v_B, V))
    to = row * tl.num_programs(1) + block
    tl.store(top_ptr + to, top)
    tl.store(first_ptr + to, tl.where(unsound != 0, UNSOUND, first))


@triton.jit
def _block_race(
    logits_ptr, seed_ptr, least_ptr, top_ptr, first_ptr, weight_ptr, best_ptr, winner_ptr, V, stride,
    inverse_temperature, GREEDY: tl.constexpr, ONE: tl.constexpr, STRIDE: tl.constexpr, MIX_1: tl.constexpr,
    MIX_2: tl.constexpr, ALMOST_ONE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: a block's sum of weights, and who wins its race."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    top, _, _ = _row_top(top_ptr, first_ptr, row, tl.num_programs(1), BLOCKS)
    v_B = block * BLOCK + tl.arange(0, BLOCK)
    x_B = tl.load(logits_ptr + row * stride + v_B, mask=v_B < V, other=float("-inf")).to(tl.float32)
    z_B = (tl.where(x_B == x_B, x_B, 0.0) - top) * inverse_temperature
    to = row * tl.num_programs(1) + block
    tl.store(weight_ptr + to, tl.sum((tl.minimum(tl.exp(z_B), 1.0) * ONE).to(tl.int64)))
    if not GREEDY:
        seed = tl.load(seed_ptr + row)
        score_B = z_B - _log_noise(seed, v_B, STRIDE, MIX_1, MIX_2, ALMOST_ONE)
        if least_ptr is not None:
            score_B = tl.where(x_B < tl.load(least_ptr + row), float("-inf"), score_B)
        best = tl.max(score_B)
        tl.store(best_ptr + to, best)
        tl.store(winner_ptr + to, tl.min(tl.where(score_B == best, v_B, V)))


@triton.jit
def _merge_blocks(
    logits_ptr, top_ptr, first_ptr, weight_ptr, best_ptr, winner_ptr, token_ptr, logprob_ptr, V, stride, blocks,
    inverse_temperature, GREEDY: tl.constexpr, ONE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: a row's token and its logprob."""
    row = tl.program_id(0).to(tl.int64)
    top, first, sound = _row_top(top_ptr, first_ptr, row, blocks, BLOCKS)
    i_K = tl.arange(0, BLOCKS)
    at_K, mask_K = row * blocks + i_K, i_K < blocks
    if GREEDY:
        token = first
    else:
        best_K = tl.load(best_ptr + at_K, mask=mask_K, other=float("-inf"))
        winner_K = tl.load(winner_ptr + at_K, mask=mask_K, other=V)
        token = tl.min(tl.where(best_K == tl.max(best_K), winner_K, V))
    token = tl.where(sound, token, 0)
    rest = (tl.sum(tl.load(weight_ptr + at_K, mask=mask_K, other=0)) - ONE).to(tl.float32) / ONE
    log_total = tl.where(rest < 1, _log1p(rest), tl.log(rest + 1))
    logit = tl.load(logits_ptr + row * stride + token).to(tl.float32)
    logprob = (logit - top) * inverse_temperature - log_total
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, tl.where(sound, logprob, float("nan")))


def _sample_triton(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, least_B: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As _sample_torch, without a host sync."""
    B, V = logits_BV.shape
    token_B = torch.empty(B, dtype=torch.int64, device=logits_BV.device)
    logprob_B = torch.empty(B, dtype=torch.float32, device=logits_BV.device)
    if not B:
        return token_B, logprob_B
    rows_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    blocks = triton.cdiv(V, BLOCK)
    top_BK, best_BK = torch.empty(2, B, blocks, device=logits_BV.device)
    first_BK, winner_BK = torch.empty(2, B, blocks, dtype=torch.int32, device=logits_BV.device)
    weight_BK = torch.empty(B, blocks, dtype=torch.int64, device=logits_BV.device)
    sizes, inverse = (V, rows_BV.stride(0)), 1 / (temperature or 1.0)
    fixed = dict(GREEDY=not temperature, ONE=ONE, BLOCKS=padded_blocks(blocks))
    noise_of = dict(STRIDE=STRIDE, MIX_1=MIX_1, MIX_2=MIX_2, ALMOST_ONE=ALMOST_ONE)
    with torch.cuda.device_of(logits_BV):
        _block_top[(B, blocks)](rows_BV, top_BK, first_BK, *sizes, UNSOUND=UNSOUND, BLOCK=BLOCK, num_warps=WARPS)
        _block_race[(B, blocks)](
            rows_BV, _seeds(uniform_B), least_B, top_BK, first_BK, weight_BK, best_BK, winner_BK, *sizes, inverse,
            **fixed, **noise_of, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        _merge_blocks[(B,)](
            rows_BV, top_BK, first_BK, weight_BK, best_BK, winner_BK, token_B, logprob_B, *sizes, blocks, inverse,
            **fixed, num_warps=MERGE_WARPS,
        )  # fmt: skip
    return token_B, logprob_B


def padded_blocks(blocks: int) -> int:
    """The row's blocks as a power of two that few vocabularies differ in."""
    return max(16, triton.next_power_of_2(blocks))


# --- the operator that torch.compile sees --------------------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::sample", mutates_args=())
def _sample(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, least_B: torch.Tensor | None, temperature: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = _sample_triton if backend == "triton" else _sample_torch
    return draw(logits_BV, uniform_B, least_B, temperature)


@_sample.register_fake
def _(logits_BV, uniform_B, least_B, temperature, backend):
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
    """One token of each row, and its logprob at this temperature, before top_k and top_p.

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
    logits_BV, uniform_B = logits_BV.detach(), uniform_B.double().clamp(0, 1 - 2**-53)
    cut = temperature and (top_k or top_p < 1)
    least_B = least_logits(logits_BV, temperature, top_k, top_p) if cut else None
    return SampleOut(*_sample(logits_BV, uniform_B, least_B, float(temperature), backend))


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
