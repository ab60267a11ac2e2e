"""Policy-gradient losses on the logprobs of sampled tokens.

Mathematics. N sampled tokens, token n of sequence q(n), which has len(q) of them; A advantage; every ratio is detached
where sg[] says so.

    rho  = exp(logp - old_logp)                              old_logp None means on-policy: rho = 1
    grpo, dapo, dr_grpo   pg = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A); with dual_clip, for A < 0,
                          pg is at most -dual_clip A         (arXiv 2402.03300, 2503.14476, 2503.20783; 1912.09729)
    gspo                  the same with the sequence's ratio s = exp(mean over the sequence of log rho), whose gradient
                          reaches each token through sg[s] pi / sg[pi]; no dual clip               (arXiv 2507.18071)
    cispo                 pg = -sg[min(rho, cispo_max)] A logp                                     (arXiv 2506.13585)
    tis                   pg is multiplied by sg[min(b, tis_cap)], b = exp(old_logp - behaviour_logp), the part of the
                          ratio that is due to the sampler and not to the update; masked: b where b <= tis_cap, else 0.
                          Level sequence: b is the product over the sequence's tokens.
    KL                    d = ref_logp - logp, r = rho times the tis weight:  r k, with k1 = -d, k2 = d^2 / 2 or
                          k3 = exp(d) - d - 1, and the slope -r d for all three; exact: given (linear_kl.py)

    loss = sum over n of w_n (pg + beta KL - entropy_coef entropy)
    w_n  = 1 / tokens                          dapo, cispo
           1 / (len(q(n)) sequences)           grpo, gspo: mean of each sequence, then of the sequences
           1 / (sequences max_new_tokens)      dr_grpo

`tokens` and `sequences` count the whole optimizer step, so the losses of its micro-batches ADD to that of the whole.
len(q) is counted here, so a micro-batch must hold all sampled tokens of each of its sequences, one after another.

Why one slope. The KL of the next token, and its gradient, are means over the policy's own tokens,

    KL(pi || ref) = E_pi[-d] = E_pi[k3]        grad KL = E_pi[-d grad logp]        for E_pi[grad logp] = 0

and r makes a mean over pi of one over the sampler (as far as no tis cap is met). The estimators differ in what is
logged and added to the loss: k1 and k3 are right on average, k2 only close to the reference; k2 and k3 are never
negative. Differentiated as they stand, only k2 would teach the KL: the mean of k1's slope, 1, teaches nothing, and that
of k3's, 1 - exp(d), is the gradient of the KL in the other direction, KL(ref || pi). (Their gradients are compared in
arXiv 2510.01555 and 2512.21852.) With r in front, k3's is right again: -r d is the derivative of r k3 through rho.
That earlier tokens decide where the later KLs are taken is left out, as in any loss that is a sum over tokens.

Exponents stop at EXPONENT_MAX in the ratios and in k3, so that no overflow turns a zero advantage into NaN.

Bytes: up to seven vectors of N in, two out (the gradient and w), some 40 bytes and 100 FLOPs a token; the segment pass
reads up to four of them twice. All of it, d loss / d logp and the metrics included, is one pass: the backward only
scales. The Triton backend takes two launches, whatever the loss: each program of _policy_tokens writes all of its
tokens and one row of partial sums; _policy_sums, a single program, adds the rows in a fixed order. One launch needs
atomics, which add in another order each run, or a single program, too slow for 100,000 tokens.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import Literal, NamedTuple, get_args

import torch
import triton
import triton.language as tl

from mentor_kernels.backend import resolve_backend

EXPONENT_MAX = 20.0
Loss = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"]
KL = Literal["k1", "k2", "k3", "exact"]
TISMode = Literal["tis", "masked"]
TISLevel = Literal["token", "sequence"]


@dataclass(frozen=True)
class PolicyLossConfig:
    """Which loss; the formulas are at the top of this file. Raises ValueError for a value that has no meaning."""

    loss: Loss = "dapo"
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped (gspo: about 3e-4)."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high are clipped (gspo: about 4e-4)."""
    dual_clip: float | None = 3.0
    """With a negative advantage, ratios above this are clipped too; None never."""
    cispo_max: float = 5.0
    """Cap on cispo's ratio."""
    kl: KL = "k3"
    """Estimator of KL(policy || reference): of its value, for the gradient is one and the same. `exact` takes the KL
    itself."""
    beta: float = 0.0
    """Weight of the KL in the loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    tis_cap: float | None = 2.0
    """Cap on the importance weight that corrects for the sampler; None: no correction."""
    tis_mode: TISMode = "tis"
    """Above the cap: `tis` uses the cap, `masked` drops the token (or the sequence)."""
    tis_level: TISLevel = "token"
    """One weight for each token, or one for each sequence."""
    max_new_tokens: int | None = None
    """Longest response; dr_grpo divides by it."""

    def __post_init__(self):
        choices = {"loss": Loss, "kl": KL, "tis_mode": TISMode, "tis_level": TISLevel}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}, not {getattr(self, name)!r}")
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(
                f"clip_low must lie in [0, 1] and clip_high be >= 0, not {self.clip_low}, {self.clip_high}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must exceed 1 or be None, not {self.dual_clip}")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ValueError(f"tis_cap must be positive or None, not {self.tis_cap}")
        if not self.cispo_max > 0:
            raise ValueError(f"cispo_max must be positive, not {self.cispo_max}")
        if self.loss == "dr_grpo" and not (self.max_new_tokens or 0) > 0:
            raise ValueError("dr_grpo needs max_new_tokens, the longest response")


@dataclass(frozen=True)
class Normaliser:
    """Counts over the WHOLE optimizer step, however many micro-batches it has."""

    tokens: int
    """Sampled tokens."""
    sequences: int
    """Sequences with at least one sampled token."""

    def __post_init__(self):
        if self.tokens < 0 or self.sequences < 0:
            raise ValueError(f"counts cannot be negative: {self}")


class PolicyLossOut(NamedTuple):
    """`loss`, a float32 scalar, and `metrics`, detached float32 scalars.

    Metrics whose name ends in `_max` combine over micro-batches by their maximum. All others ADD to what they are over
    the whole step: `pg` to the policy term of the loss, the rest to a mean over the step's tokens.

        pg                               policy term of the loss
        kl                               KL estimate                               (only with ref_logp_N or kl_N)
        entropy                          entropy                                   (only with entropy_N)
        clip_low, clip_high, clip_dual   share of tokens without a gradient, by the bound they hit (cispo: capped ratio)
        ratio_mean, ratio_max            the ratio that the loss used
        tis_mean, tis_capped             importance weight, share of tokens above the cap   (only with behaviour_logp_N
                                                                                             and a tis_cap)
        logp_gap_mean, logp_gap_max      |old_logp - behaviour_logp|               (only with behaviour_logp_N)
        teacher_kl                       KL to a teacher's likeliest tokens        (only linear_policy_loss, with them)
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


METRICS = (
    "pg", "kl", "entropy", "clip_low", "clip_high", "clip_dual", "ratio_mean", "ratio_max",
    "tis_mean", "tis_capped", "logp_gap_mean", "logp_gap_max",
)  # fmt: skip


# --- the torch backend: the readable reference ---------------------------------------------------------------------


def _forward_torch(
    logp_N: torch.Tensor,
    old_logp_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    sequence_N: torch.Tensor,
    reference_N: torch.Tensor | None,
    behaviour_logp_N: torch.Tensor | None,
    entropy_N: torch.Tensor | None,
    config: PolicyLossConfig,
    normaliser: Normaliser,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, d loss / d logp [N], w [N], metrics in the order of METRICS). reference_N: see `_kl`."""
    old_logp_N = logp_N if old_logp_N is None else old_logp_N
    _, local_N, length_S = torch.unique(sequence_N, return_inverse=True, return_counts=True)
    token_N = torch.full_like(logp_N, 1 / max(normaliser.tokens, 1))
    w_N = _reduction_weights(config, normaliser, token_N, length_S[local_N])

    ratio_N = _ratio(logp_N - old_logp_N, config, local_N, length_S)
    pg_N, slope_N, low_N, high_N, dual_N = _policy_term(ratio_N, logp_N, advantage_N, config)
    tis_N, capped_N = _sampler_correction(old_logp_N, behaviour_logp_N, config, local_N, length_S)
    pg_N, slope_N = pg_N * tis_N, slope_N * tis_N
    own_ratio_N = (logp_N - old_logp_N).clamp(max=EXPONENT_MAX).exp()
    kl_N, kl_slope_N = _kl(logp_N, reference_N, own_ratio_N * tis_N, config.kl)
    entropy_N = torch.zeros_like(logp_N) if entropy_N is None else entropy_N
    gap_N = torch.zeros_like(logp_N) if behaviour_logp_N is None else (old_logp_N - behaviour_logp_N).abs()

    pg = (w_N * pg_N).sum()
    loss = pg + (w_N * (config.beta * kl_N - config.entropy_coef * entropy_N)).sum()
    shares = (kl_N, entropy_N, low_N, high_N, dual_N, ratio_N, tis_N, capped_N, gap_N)
    kl, entropy, low, high, dual, ratio, tis, capped, gap = (torch.stack(shares) * token_N).sum(1).unbind()
    metrics = torch.stack([pg, kl, entropy, low, high, dual, ratio, _max(ratio_N), tis, capped, gap, _max(gap_N)])
    return loss, w_N * (slope_N + config.beta * kl_slope_N), w_N, metrics


def _reduction_weights(
    config: PolicyLossConfig, normaliser: Normaliser, token_N: torch.Tensor, length_N: torch.Tensor
) -> torch.Tensor:
    if config.loss in ("dapo", "cispo"):
        return token_N
    sequences = max(normaliser.sequences, 1)
    if config.loss == "dr_grpo":
        return torch.full_like(token_N, 1 / (sequences * config.max_new_tokens))
    return 1 / (length_N.to(token_N.dtype) * sequences)


def _sequence_sums(values_N: torch.Tensor, local_N: torch.Tensor, length_S: torch.Tensor) -> torch.Tensor:
    return values_N.new_zeros(length_S.shape[0]).index_add_(0, local_N, values_N)


def _ratio(
    log_ratio_N: torch.Tensor, config: PolicyLossConfig, local_N: torch.Tensor, length_S: torch.Tensor
) -> torch.Tensor:
    if config.loss == "gspo":
        log_ratio_N = (_sequence_sums(log_ratio_N, local_N, length_S) / length_S)[local_N]
    return log_ratio_N.clamp(max=EXPONENT_MAX).exp()


def _policy_term(
    ratio_N: torch.Tensor, logp_N: torch.Tensor, advantage_N: torch.Tensor, config: PolicyLossConfig
) -> tuple[torch.Tensor, ...]:
    """pg, d pg / d logp, and as 0 or 1: below the lower bound, above the upper, above the dual one."""
    if config.loss == "cispo":
        high_N = (ratio_N > config.cispo_max).to(logp_N.dtype)
        slope_N = -ratio_N.clamp(max=config.cispo_max) * advantage_N
        return slope_N * logp_N, slope_N, torch.zeros_like(high_N), high_N, torch.zeros_like(high_N)
    up_N, down_N = advantage_N > 0, advantage_N < 0
    low_N = down_N & (ratio_N < 1 - config.clip_low)
    high_N = up_N & (ratio_N > 1 + config.clip_high)
    dual = config.dual_clip if config.loss != "gspo" else None
    dual_N = down_N & (ratio_N > dual) if dual is not None else torch.zeros_like(low_N)
    effective_N = ratio_N.masked_fill(low_N, 1 - config.clip_low).masked_fill(high_N, 1 + config.clip_high)
    if dual is not None:
        effective_N = effective_N.masked_fill(dual_N, dual)
    slope_N = (-ratio_N * advantage_N).masked_fill(low_N | high_N | dual_N, 0.0)
    return -effective_N * advantage_N, slope_N, *(mask_N.to(logp_N.dtype) for mask_N in (low_N, high_N, dual_N))


def _sampler_correction(
    old_logp_N: torch.Tensor,
    behaviour_logp_N: torch.Tensor | None,
    config: PolicyLossConfig,
    local_N: torch.Tensor,
    length_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The importance weight of each token, and where the cap was exceeded (0 or 1)."""
    if behaviour_logp_N is None or config.tis_cap is None:
        return torch.ones_like(old_logp_N), torch.zeros_like(old_logp_N)
    log_N = old_logp_N - behaviour_logp_N
    if config.tis_level == "sequence":
        log_N = _sequence_sums(log_N, local_N, length_S)[local_N]
    weight_N = log_N.clamp(max=EXPONENT_MAX).exp()
    above_N = weight_N > config.tis_cap
    return weight_N.masked_fill(above_N, config.tis_cap if config.tis_mode == "tis" else 0.0), above_N.to(log_N.dtype)


def _kl(
    logp_N: torch.Tensor, reference_N: torch.Tensor | None, weight_N: torch.Tensor, estimator: KL
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimate and its slope by logp; `reference_N` is the reference's logprob, or for `exact` the KL."""
    if reference_N is None:
        return torch.zeros_like(logp_N), torch.zeros_like(logp_N)
    if estimator == "exact":
        return reference_N, torch.zeros_like(logp_N)
    d_N = reference_N - logp_N
    value_N = {"k1": -d_N, "k2": d_N.square() / 2, "k3": d_N.clamp(max=EXPONENT_MAX).expm1() - d_N}[estimator]
    return weight_N * value_N, -weight_N * d_N


def _max(values_N: torch.Tensor) -> torch.Tensor:
    """Maximum of values that are never negative; 0 of none."""
    return values_N.max() if values_N.numel() else values_N.sum()


# --- the Triton backend: float32, two launches ---------------------------------------------------------------------

# Tokens that one program has in registers; 2 of each vector a thread.
BLOCK = 512
# Where sequences matter, a program takes those that START among SPAN tokens, one after another, each to its end.
SPAN = 64
# Rows of partial sums that are added at a time; each is the loss and METRICS, padded to COLUMNS.
SUM_ROWS, COLUMNS = 128, 16
WARPS = 8
# A limit that leaves room: left alone, the assembler aims at 48 registers a thread and spills a few bytes to get there.
REGISTERS = 80


@triton.jit
def _exponential(x):
    """exp(x) and exp(x) - 1 to the last digits, x at most EXPONENT_MAX; the hardware's exp is approximate.

    exp(x) = 2^n exp(r), |r| <= log(2) / 2, and exp(r) - 1 = p by its series, so nothing cancels near 0.
    """
    x = tl.where(x < -87.0, -87.0, x)
    n = tl.where(x == x, tl.floor(x * 1.4426950408889634 + 0.5), 0.0)  # NaN has no integer; r keeps it
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # log(2) in two parts, the first with 9 bits: its product is exact
    p = 1 + r * (1 / 5) * (1 + r * (1 / 6) * (1 + r * (1 / 7) * (1 + r * (1 / 8))))
    p = r * (1 + r * (1 / 2) * (1 + r * (1 / 3) * (1 + r * (1 / 4) * p)))
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return power * p + power, power * p + (power - 1)


@triton.jit
def _log_ratios(logp_ptr, old_ptr, behaviour_ptr, i, ok):
    """logp, log(pi / old) and log(old / sampler); 0 where there is no such policy, and outside."""
    logp = tl.load(logp_ptr + i, mask=ok, other=0.0)
    old = logp
    if old_ptr is not None:
        old = tl.load(old_ptr + i, mask=ok, other=0.0)
    gap = tl.zeros_like(logp)
    if behaviour_ptr is not None:
        gap = old - tl.load(behaviour_ptr + i, mask=ok, other=0.0)
    return logp, logp - old, gap


@triton.jit
def _sequence_totals(sequence_ptr, logp_ptr, old_ptr, behaviour_ptr, start, N, BLOCK: tl.constexpr):
    """Of the sequence that starts at `start`: its end, and its sums of log(pi / old) and log(old / sampler)."""
    own = tl.load(sequence_ptr + start)
    ratio_B = tl.zeros([BLOCK], tl.float32)
    gap_B = tl.zeros([BLOCK], tl.float32)
    end = start
    more = start < N
    while more:
        i = end + tl.arange(0, BLOCK)
        same = tl.load(sequence_ptr + i, mask=i < N, other=0) == own
        stop = tl.min(tl.where(same & (i < N), end + BLOCK, i))
        _, ratio, gap = _log_ratios(logp_ptr, old_ptr, behaviour_ptr, i, i < stop)
        ratio_B += ratio
        gap_B += gap
        more = stop == end + BLOCK
        end = stop
    return end, tl.sum(ratio_B), tl.sum(gap_B)


@triton.jit
def _policy_slope(ratio, logp, advantage, lower, upper, dual, CISPO: tl.constexpr):
    """_policy_term. Without a dual clip `dual` is infinite; cispo's cap is `upper`."""
    if CISPO:
        high = ratio > upper
        low = high & (upper < 0)
        clipped = low
        slope = -tl.where(high, upper, ratio) * advantage
        pg = slope * logp
    else:
        low = (advantage < 0) & (ratio < lower)
        high = (advantage > 0) & (ratio > upper)
        clipped = (advantage < 0) & (ratio > dual)
        effective = tl.where(low, lower, tl.where(high, upper, tl.where(clipped, dual, ratio)))
        slope = tl.where(low | high | clipped, 0.0, -ratio * advantage)
        pg = -effective * advantage
    return pg, slope, low.to(tl.float32), high.to(tl.float32), clipped.to(tl.float32)


@triton.jit
def _kl_slope(logp, weight, ref_ptr, i, ok, KL: tl.constexpr, TOP: tl.constexpr):
    """_kl."""
    kl, slope = tl.zeros_like(logp), tl.zeros_like(logp)
    if ref_ptr is not None:
        reference = tl.load(ref_ptr + i, mask=ok, other=0.0)
        d = reference - logp
        if KL == "exact":
            kl = reference
        else:
            slope = -weight * d
            if KL == "k1":
                kl = slope
            elif KL == "k2":
                kl = weight * (d * d * 0.5)
            else:
                _, less_one = _exponential(tl.where(d > TOP, TOP, d))
                kl = weight * (less_one - d)
    return kl, slope


@triton.jit(do_not_specialize=["N"])
def _policy_tokens(
    logp_ptr, old_ptr, advantage_ptr, sequence_ptr, ref_ptr, behaviour_ptr, entropy_ptr, slope_ptr, w_ptr, partial_ptr,
    N, weight, lower, upper, dual, cap, above, beta, entropy_coef,
    LOSS: tl.constexpr, KL: tl.constexpr, TIS: tl.constexpr, TOP: tl.constexpr,
    SEQUENCES: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """w and d loss / d logp of each token, and one row of sums over this program's tokens.

    SEQUENCES: the program has the sequences that start in its span. A token's program follows from the sequence alone,
    so that all its tokens get one and the same ratio and weight. Otherwise it has its span.
    """
    first = tl.program_id(0) * SPAN
    start, limit = first, tl.minimum(first + SPAN, N)
    if SEQUENCES:
        s = first + tl.arange(0, SPAN)
        own = tl.load(sequence_ptr + s, mask=s < N, other=0)
        starts = (own != tl.load(sequence_ptr + s - 1, mask=(s > 0) & (s < N), other=0)) | (s == 0)
        start = tl.min(tl.where(starts & (s < N), s, N))
    none = tl.zeros([BLOCK], tl.float32)
    loss_B, pg_B, kl_B, entropy_B, low_B, high_B, dual_B = none, none, none, none, none, none, none
    ratio_B, top_ratio_B, tis_B, capped_B, gap_B, top_gap_B = none, none, none, none, none, none
    while start < limit:
        end = limit
        w = weight
        if SEQUENCES:
            end, log_ratio_sum, gap_sum = _sequence_totals(
                sequence_ptr, logp_ptr, old_ptr, behaviour_ptr, start, N, BLOCK
            )  # fmt: skip
            length = (end - start).to(tl.float32)
            if LOSS == "grpo" or LOSS == "gspo":
                w = weight / length
        for at in range(start, end, BLOCK):
            i = at + tl.arange(0, BLOCK)
            ok = i < end
            logp, log_ratio, gap = _log_ratios(logp_ptr, old_ptr, behaviour_ptr, i, ok)
            advantage = tl.load(advantage_ptr + i, mask=ok, other=0.0)
            kl_weight, _ = _exponential(tl.where(log_ratio > TOP, TOP, log_ratio))
            ratio = kl_weight
            if LOSS == "gspo":
                log_ratio = tl.zeros_like(logp) + log_ratio_sum / length
                ratio, _ = _exponential(tl.where(log_ratio > TOP, TOP, log_ratio))
            pg, slope, low, high, clipped = _policy_slope(ratio, logp, advantage, lower, upper, dual, LOSS == "cispo")
            if TIS != "":
                log_tis = gap
                if TIS == "sequence":
                    log_tis = tl.zeros_like(gap) + gap_sum
                tis, _ = _exponential(tl.where(log_tis > TOP, TOP, log_tis))
                capped = tis > cap
                tis = tl.where(capped, above, tis)
                pg, slope, kl_weight = pg * tis, slope * tis, kl_weight * tis
                tis_B += tl.where(ok, tis, 0.0)
                capped_B += tl.where(ok, capped.to(tl.float32), 0.0)
            else:
                tis_B += tl.where(ok, 1.0, 0.0)
            kl, kl_slope = _kl_slope(logp, kl_weight, ref_ptr, i, ok, KL, TOP)
            entropy = none
            if entropy_ptr is not None:
                entropy = tl.load(entropy_ptr + i, mask=ok, other=0.0)
            tl.store(slope_ptr + i, w * (slope + beta * kl_slope), mask=ok)
            tl.store(w_ptr + i, w + none, mask=ok)
            loss_B += tl.where(ok, w * (pg + (beta * kl - entropy_coef * entropy)), 0.0)
            pg_B += tl.where(ok, w * pg, 0.0)
            kl_B += tl.where(ok, kl, 0.0)
            entropy_B += entropy
            low_B += tl.where(ok, low, 0.0)
            high_B += tl.where(ok, high, 0.0)
            dual_B += tl.where(ok, clipped, 0.0)
            ratio_B += tl.where(ok, ratio, 0.0)
            top_ratio_B = tl.maximum(top_ratio_B, tl.where(ok, ratio, 0.0))
            gap_B += tl.where(ok, tl.abs(gap), 0.0)
            top_gap_B = tl.maximum(top_gap_B, tl.where(ok, tl.abs(gap), 0.0))
        start = end
    row_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * COLUMNS
    tl.store(row_ptr, tl.sum(loss_B))
    tl.store(row_ptr + 1, tl.sum(pg_B))
    tl.store(row_ptr + 2, tl.sum(kl_B))
    tl.store(row_ptr + 3, tl.sum(entropy_B))
    tl.store(row_ptr + 4, tl.sum(low_B))
    tl.store(row_ptr + 5, tl.sum(high_B))
    tl.store(row_ptr + 6, tl.sum(dual_B))
    tl.store(row_ptr + 7, tl.sum(ratio_B))
    tl.store(row_ptr + 8, tl.max(top_ratio_B))
    tl.store(row_ptr + 9, tl.sum(tis_B))
    tl.store(row_ptr + 10, tl.sum(capped_B))
    tl.store(row_ptr + 11, tl.sum(gap_B))
    tl.store(row_ptr + 12, tl.max(top_gap_B))


@triton.jit(do_not_specialize=["rows"])
def _policy_sums(
    partial_ptr, loss_ptr, metrics_ptr, rows, token, ROWS: tl.constexpr, COLUMNS: tl.constexpr, METRICS: tl.constexpr
):
    """The rows of partial sums together. A maximum over NaN is NaN: its mean, one column to the left, knows."""
    r_R, k_K = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    total_RK = tl.zeros([ROWS, COLUMNS], tl.float32)
    top_RK = tl.zeros([ROWS, COLUMNS], tl.float32)
    mean_RK = tl.zeros([ROWS, COLUMNS], tl.float32)
    is_max_K = (k_K == 8) | (k_K == 12)
    for row in range(0, rows, ROWS):
        ok_RK = (row + r_R < rows)[:, None] & (k_K <= METRICS)[None, :]
        at_RK = partial_ptr + (row + r_R)[:, None] * COLUMNS + k_K[None, :]
        x_RK = tl.load(at_RK, mask=ok_RK, other=0.0)
        total_RK += x_RK
        top_RK = tl.maximum(top_RK, x_RK)
        mean_RK += tl.load(at_RK - 1, mask=ok_RK & is_max_K[None, :], other=0.0)
    total_K, mean_K = tl.sum(total_RK, 0), tl.sum(mean_RK, 0)
    found_K = tl.where(k_K < 2, total_K, total_K * token)
    found_K = tl.where(is_max_K, tl.where(mean_K == mean_K, tl.max(top_RK, 0), mean_K), found_K)
    tl.store(loss_ptr + k_K, found_K, mask=k_K == 0)
    tl.store(metrics_ptr + k_K - 1, found_K, mask=(k_K > 0) & (k_K <= METRICS))


def forward_triton(
    logp_N: torch.Tensor,
    old_logp_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    sequence_N: torch.Tensor,
    reference_N: torch.Tensor | None,
    behaviour_logp_N: torch.Tensor | None,
    entropy_N: torch.Tensor | None,
    config: PolicyLossConfig,
    normaliser: Normaliser,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _forward_torch, without a host sync."""
    N = logp_N.shape[0]
    slope_N, w_N = (torch.empty(N, dtype=logp_N.dtype, device=logp_N.device) for _ in range(2))
    if not N:
        return logp_N.new_zeros(()), slope_N, w_N, logp_N.new_zeros(len(METRICS))
    loss, metrics = logp_N.new_empty(()), logp_N.new_empty(len(METRICS))
    token, sequence = 1 / max(normaliser.tokens, 1), 1 / max(normaliser.sequences, 1)
    weight = {"dapo": token, "cispo": token, "dr_grpo": sequence / (config.max_new_tokens or 1)}
    lower, upper = 1 - config.clip_low, 1 + config.clip_high
    tis = config.tis_level if behaviour_logp_N is not None and config.tis_cap is not None else ""
    cap = config.tis_cap if tis else math.inf
    by_sequence = config.loss in ("grpo", "gspo") or tis == "sequence"
    span = SPAN if by_sequence else BLOCK
    rows = triton.cdiv(N, span)
    partial = logp_N.new_empty(rows, COLUMNS)
    vectors = (logp_N, old_logp_N, advantage_N, sequence_N, reference_N, behaviour_logp_N, entropy_N)
    with torch.cuda.device_of(logp_N):
        _policy_tokens[(rows,)](
            *(None if v is None else v.contiguous() for v in vectors), slope_N, w_N, partial,
            N, weight.get(config.loss, sequence), lower, config.cispo_max if config.loss == "cispo" else upper,
            math.inf if config.dual_clip is None or config.loss == "gspo" else config.dual_clip,
            cap, cap if config.tis_mode == "tis" else 0.0, config.beta, config.entropy_coef,
            LOSS=config.loss, KL=config.kl, TIS=tis, TOP=EXPONENT_MAX,
            SEQUENCES=by_sequence, SPAN=span, BLOCK=BLOCK, COLUMNS=COLUMNS, num_warps=WARPS,
            maxnreg=REGISTERS,
        )  # fmt: skip
        _policy_sums[(1,)](
            partial, loss, metrics, rows, token, ROWS=SUM_ROWS, COLUMNS=COLUMNS, METRICS=len(METRICS), num_warps=WARPS,
        )  # fmt: skip
    return loss, slope_N, w_N, metrics


# --- the operator that autograd and torch.compile see --------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::policy_loss", mutates_args=())
def _policy_loss(
    logp_N: torch.Tensor,
    old_logp_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    sequence_N: torch.Tensor,
    reference_N: torch.Tensor | None,
    behaviour_logp_N: torch.Tensor | None,
    entropy_N: torch.Tensor | None,
    loss: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    cispo_max: float,
    kl: str,
    beta: float,
    entropy_coef: float,
    tis_cap: float | None,
    tis_mode: str,
    tis_level: str,
    max_new_tokens: int | None,
    tokens: int,
    sequences: int,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    config = PolicyLossConfig(
        loss, clip_low, clip_high, dual_clip, cispo_max, kl, beta, entropy_coef, tis_cap, tis_mode, tis_level,
        max_new_tokens,
    )  # fmt: skip
    forward = forward_triton if backend == "triton" else _forward_torch
    return forward(
        logp_N, old_logp_N, advantage_N, sequence_N, reference_N, behaviour_logp_N, entropy_N, config,
        Normaliser(tokens, sequences),
    )  # fmt: skip


@_policy_loss.register_fake
def _(logp_N, *_):
    return logp_N.new_empty(()), torch.empty_like(logp_N), torch.empty_like(logp_N), logp_N.new_empty(len(METRICS))


def _setup_context(ctx, inputs, output):
    _, slope_N, w_N, metrics = output
    ctx.beta, ctx.entropy_coef = inputs[13], inputs[14]
    ctx.mark_non_differentiable(slope_N, w_N, metrics)
    ctx.save_for_backward(slope_N, w_N)


def _backward(ctx, grad_loss, *_):
    slope_N, w_N = ctx.saved_tensors
    entropy = -ctx.entropy_coef * grad_loss * w_N if ctx.needs_input_grad[6] else None
    # Only the public function's kl_N can need a gradient here: a reference's logprobs are detached there.
    kl = ctx.beta * grad_loss * w_N if ctx.needs_input_grad[4] else None
    return grad_loss * slope_N, None, None, None, kl, None, entropy, *[None] * 15


_policy_loss.register_autograd(_backward, setup_context=_setup_context)


# --- the public function -------------------------------------------------------------------------------------------


def policy_loss(
    logp_N: torch.Tensor,
    old_logp_N: torch.Tensor | None,
    advantage_N: torch.Tensor,
    *,
    sequence_N: torch.Tensor,
    ref_logp_N: torch.Tensor | None = None,
    kl_N: torch.Tensor | None = None,
    behaviour_logp_N: torch.Tensor | None = None,
    entropy_N: torch.Tensor | None = None,
    config: PolicyLossConfig,
    normaliser: Normaliser,
    backend: str | None = None,
) -> PolicyLossOut:
    """This micro-batch's share of the step's loss, and its metrics. Formulas: at the top of this file.

    All [N]: logprobs, advantages and entropies in logp_N's dtype (float32, on the torch backend also float64);
    sequence_N int64, the tokens of one sequence next to each other and all of them here. Without `old_logp_N` the
    update is on-policy. Without `behaviour_logp_N` there is no importance correction. gspo expects one advantage for
    all tokens of a sequence.

    The reference comes as ref_logp_N, or with config.kl = "exact" as kl_N, what `linear_kl` returns.
    Differentiable in logp_N, entropy_N and kl_N; all else is a constant. N = 0 gives a loss of 0 that has a graph.
    Raises ValueError for shapes, dtypes or devices that do not agree, for beta without a reference, for entropy_coef
    without entropy_N, for an unknown backend, and for float64 on the Triton backend.
    """
    vectors = {
        "old_logp_N": old_logp_N,
        "advantage_N": advantage_N,
        "ref_logp_N": ref_logp_N,
        "kl_N": kl_N,
        "behaviour_logp_N": behaviour_logp_N,
        "entropy_N": entropy_N,
    }
    check_inputs(logp_N, sequence_N, vectors, config)
    backend = resolve_backend(backend, logp_N.device)
    if backend == "triton" and logp_N.dtype is torch.float64:
        raise ValueError("the Triton backend takes float32; float64 needs backend='torch'")
    if config.entropy_coef and entropy_N is None:
        raise ValueError("entropy_coef is not 0, so entropy_N is needed")
    reference_N = kl_N if config.kl == "exact" else None if ref_logp_N is None else ref_logp_N.detach()
    loss, _, _, metrics = _policy_loss(
        logp_N, old_logp_N, advantage_N, sequence_N, reference_N, behaviour_logp_N, entropy_N, *astuple(config),
        normaliser.tokens, normaliser.sequences, backend,
    )  # fmt: skip
    return named_metrics(
        loss,
        metrics,
        config,
        kl=reference_N is not None,
        entropy=entropy_N is not None,
        gap=behaviour_logp_N is not None,
    )


def token_weights(
    sequence_N: torch.Tensor, dtype: torch.dtype, config: PolicyLossConfig, normaliser: Normaliser, backend: str | None
) -> torch.Tensor:
    """w [N] of the formulas: what each token counts in the loss."""
    nothing_N = torch.zeros(sequence_N.shape, dtype=dtype, device=sequence_N.device)
    return _policy_loss(
        nothing_N, None, nothing_N, sequence_N, None, None, None, *astuple(config), normaliser.tokens,
        normaliser.sequences, resolve_backend(backend, sequence_N.device),
    )[2]  # fmt: skip


def named_metrics(
    loss: torch.Tensor, metrics: torch.Tensor, config: PolicyLossConfig, *, kl: bool, entropy: bool, gap: bool
) -> PolicyLossOut:
    """`metrics` by their names, without those that the inputs say nothing about."""
    unmeasured = set()
    if not kl:
        unmeasured |= {"kl"}
    if not entropy:
        unmeasured |= {"entropy"}
    if not gap:
        unmeasured |= {"logp_gap_mean", "logp_gap_max"}
    if not gap or config.tis_cap is None:
        unmeasured |= {"tis_mean", "tis_capped"}
    named = zip(METRICS, metrics.detach().unbind(), strict=True)
    return PolicyLossOut(loss, {name: value for name, value in named if name not in unmeasured})


def check_inputs(
    logp_N: torch.Tensor, sequence_N: torch.Tensor, vectors: dict[str, torch.Tensor | None], config: PolicyLossConfig
) -> None:
    """Raises ValueError for vectors that do not agree with logp_N, and for beta without a reference."""
    if logp_N.dim() != 1 or logp_N.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logp_N must be float32 [N], not {logp_N.dtype} {tuple(logp_N.shape)}")
    if sequence_N.dtype != torch.int64 or sequence_N.shape != logp_N.shape or sequence_N.device != logp_N.device:
        raise ValueError(
            f"sequence_N must be int64 {tuple(logp_N.shape)} on {logp_N.device}, "
            f"not {sequence_N.dtype} {tuple(sequence_N.shape)} on {sequence_N.device}"
        )
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != logp_N.shape or vector.dtype != logp_N.dtype or vector.device != logp_N.device:
            raise ValueError(
                f"{name} must be {logp_N.dtype} {tuple(logp_N.shape)} on {logp_N.device} like logp_N, "
                f"not {vector.dtype} {tuple(vector.shape)} on {vector.device}"
            )
    reference, other = ("kl_N", "ref_logp_N") if config.kl == "exact" else ("ref_logp_N", "kl_N")
    if config.beta and vectors[reference] is None:
        raise ValueError(f"beta is not 0, so {reference} is needed")
    if vectors[other] is not None:
        raise ValueError(f"kl is {config.kl!r}, which has no use for {other}; give {reference}")
