"""Drawing a token from each row of logits, and its logprob.

Mathematics. Row b has logits z_v and one uniform u in [0, 1):

    p_v     = exp(z_v / T) / sum over w of exp(z_w / T)
    token   = the first v with p_0 + ... + p_v > u              inverse CDF; at T = 0 the first of the largest z
    logprob = log p_token                                       at T = 0 that of T = 1

top_k and top_p cut logits off before (they become -inf), and logprob is that of what is left. A token of probability 0
is never drawn. A row without a distribution (a NaN, an inf, nothing but -inf) gives token 0 and logprob NaN.

A CDF of floats has two traps: added in another order it is another one, and a parallel scan of it need not even be
monotone. The torch backend adds in float64, in two levels. The Triton backend adds integers, whose sums are exact:

    w_v   = floor(exp((z_v - max z) / T) 2^40)                  the largest is 2^40, one under 2^-40 of it is 0
    token = the first v with w_0 + ... + w_v > floor(u sum w)   u is a multiple of 2^-53; the product has 128 bits

So a token depends on its row and its uniform alone, not on the batch, the block size or the order of a reduction; the
draw is below the sum of all, so no clamp is needed; and what it falls on has a weight. sum w - 2^40, exact too, is what
the logprob of a confident token is made of.

Bytes and FLOPs: a row is read for its maximum, for its sum, and up to the drawn token: 2.5 times on average, all but
the first from the L2 cache where the batch fits there; 16 bytes a row are written. Some 10 FLOPs a logit and pass, so
memory is the floor. log_softmax, exp and cumsum as operators of their own move [B, V] eight times or more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
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


# --- the torch backend: the readable reference, and the path that CPUs run -----------------------------------------

# Columns whose probabilities are added before the blocks are.
TORCH_BLOCK = 256


def _sample_torch(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_BV = logits_BV.float()
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    logp_BV = logits_BV.log_softmax(-1)
    token_B1 = _inverse_cdf(logp_BV.exp(), uniform_B) if temperature else logits_BV.argmax(-1, keepdim=True)
    logp_B1 = logp_BV.gather(-1, token_B1)
    return token_B1.masked_fill(logp_B1.isnan(), 0)[:, 0], logp_B1[:, 0]


def _inverse_cdf(p_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Tokens [B, 1]. Two levels, blocks and then tokens: one pass over p instead of a float64 scan of it."""
    V = p_BV.shape[-1]
    p_BKJ = F.pad(p_BV, (0, -V % TORCH_BLOCK)).unflatten(-1, (-1, TORCH_BLOCK))
    mass_BK = p_BKJ.sum(-1, dtype=torch.float64)
    cdf_BK = mass_BK.cumsum(-1)
    # A rounded cdf may end a little off 1: scale the draw to it. `right` skips what has probability zero.
    draw_B1 = uniform_B[:, None] * cdf_BK[:, -1:]
    block_B1 = torch.searchsorted(cdf_BK, draw_B1, right=True).clamp_(max=cdf_BK.shape[-1] - 1)
    inside_BJ = p_BKJ.gather(1, block_B1[..., None].expand(-1, -1, TORCH_BLOCK))[:, 0].double().cumsum(-1)
    rest_B1 = draw_B1 - (cdf_BK - mass_BK).gather(-1, block_B1)
    # Rounding must leave the block neither way.
    rest_B1 = torch.minimum(rest_B1.clamp_(min=0), inside_BJ[:, -1:] * (1 - 2**-50))
    return (block_B1 * TORCH_BLOCK + torch.searchsorted(inside_BJ, rest_B1, right=True)).clamp_(max=V - 1)


def _truncate(logits_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Keep the top_k tokens, then the smallest set with probability top_p; the rest become -inf."""
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    if top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(descending=True)
        before_BV = ordered_BV.softmax(-1).cumsum(-1) - ordered_BV.softmax(-1)
        drop_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, float("-inf"))
    return logits_BV


# --- the Triton backend: one program a row -------------------------------------------------------------------------

BLOCK = 4096
WARPS = 8
ONE = 1 << 40
"""The largest weight of a row; an integer, so that what is subtracted from a sum stays one."""


@triton.jit
def _weights(row_ptr, start, V, top, inverse_temperature, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """w of a block of columns, int64; 0 past the last one."""
    v_B = start + tl.arange(0, BLOCK)
    z_B = tl.load(row_ptr + v_B, mask=v_B < V, other=float("-inf")).to(tl.float32)
    e_B = tl.exp((z_B - top) * inverse_temperature)
    # Only a row without a distribution holds a NaN, which has no integer.
    return (tl.where(e_B == e_B, tl.minimum(e_B, 1.0), 0.0) * ONE).to(tl.int64)


@triton.jit
def _sample_rows(
    logits_ptr, draw_ptr, token_ptr, logprob_ptr, V, stride, inverse_temperature,
    GREEDY: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The three sweeps over a row. `draw_ptr` holds u 2^53."""
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
    token = tl.min(tl.where(top_B == top, first_B, V))
    sound = (tl.max(unsound_B) == 0) & (top > float("-inf"))
    top = tl.where(sound, top, 0.0)

    w_B = tl.zeros([BLOCK], tl.int64)
    for start in range(0, V, BLOCK):
        w_B += _weights(row_ptr, start, V, top, inverse_temperature, ONE, BLOCK)
    total = tl.sum(w_B)

    if not GREEDY:
        draw = tl.umulhi(tl.load(draw_ptr + row).to(tl.uint64) << 11, total.to(tl.uint64)).to(tl.int64)
        start = 0
        w_B = _weights(row_ptr, start, V, top, inverse_temperature, ONE, BLOCK)
        before = draw - draw
        mass = tl.sum(w_B)
        # The draw is below the total; a row without a distribution has none, and the second condition ends it.
        while (before + mass <= draw) & (start + BLOCK < V):
            start += BLOCK
            before += mass
            w_B = _weights(row_ptr, start, V, top, inverse_temperature, ONE, BLOCK)
            mass = tl.sum(w_B)
        token = start + tl.sum((before + tl.cumsum(w_B, 0) <= draw).to(tl.int32))
    token = tl.where(sound, token, 0)
    rest = (total - ONE).to(tl.float32) / ONE
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
            rows_BV, (uniform_B * 2**53).long(), token_B, logprob_B, V, rows_BV.stride(0), 1 / (temperature or 1.0),
            GREEDY=not temperature, ONE=ONE, BLOCK=BLOCK, num_warps=WARPS,
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
    """One token of each row by inverse CDF, and its logprob under the distribution that it was drawn from.

    logits_BV is float32, bfloat16 or float16, any B (0 too), V up to 2^22; uniform_B is float32 or float64 in [0, 1),
    and a value outside counts as the nearest inside. Temperature 0 is greedy, with the logprob of temperature 1.
    top_k 0 and top_p 1 cut nothing off. Not differentiable. A row with a NaN, an inf or nothing but -inf gives token 0
    and logprob NaN: to raise would stop the CPU until the GPU has caught up.

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
