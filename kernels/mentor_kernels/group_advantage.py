"""Composite reward against a teacher's tools, and the advantage of each rollout within its group.

Mathematics. For one rollout: T the teacher's set of tools, S the student's, c = 1 if the answer is right, I the calls
to tools that do not exist. Three terms, each in [0, 1], with weights (correct, align, valid):

    preset            weights          align                        valid          a wrong answer keeps of align
    mentor            0.7  0.3  0.1    [S == T, S not empty]        [I empty]      0.2
    mentor_f1         0.7  0.3  0.1    F1(S, T)                     [I empty]      0.2
    mentor_overlap    0.7  0.3  0      [S and T share a tool]                      0.2
    no_align          0.7  0    0.1                                 [I empty]
    sparse            0.9  0    0.1                                 1
    flex              0.7  0.2  0.1    F1(S, T) (1 - d / 2)         ok share       0.2
    strict            the trajectory score that the host computed, as it is

    F1 = 2 |S & T| / (|S| + |T|), 0 without a tool; flex: 1 where the teacher made no call and S is empty
    d = |calls - teacher_calls| / max(calls, teacher_calls), 0 without a call
    ok share = ok_calls / calls; without a call 1, but 0 when the teacher did call

    reward = 0.0 when the episode did not finish; else 0.1 when it has no answer; else the weighted sum of the terms.

Both gates hold for every preset, `strict` with its range of -3 .. 4 included.

Advantages, over the n rollouts of a group that have a reward, std unbiased:

    grpo      (r - mean) / (std + eps)
    dr_grpo   r - mean
    batch     r - mean of the group, divided by std + eps of all rewards
    gdpo      each term normalised like grpo within its group, summed with the weights, then normalised over all
              rollouts; the gates act on the terms (0.1 without an answer is the full `valid` term). `strict` has one.

A group teaches nothing when its rewards (gdpo: all its terms) are equal, compared exactly, or n < 2: its advantages are
exactly 0 and it is flagged. A rollout whose correctness is NaN could not be scored: its reward is NaN, its advantage 0,
and it takes no part in any mean, std or comparison.

The least value is compared with the greatest, since the float32 mean of equal values can differ from them. Every
backend must find the same groups equal, so each operation on a term or a reward is rounded once, in the order of the
formulas: the Triton backend divides by `div_rn` (its `/` may miss n / n = 1 by 2 ulp) and fuses no multiply-adds.

Bytes: B rollouts of about 60 bytes. The point is one launch instead of some fifty, and one place for the formulas. The
Triton backend has a program for each group, which finds its rollouts among all of them: three sweeps over B integers,
for sums, squares and results, instead of a sort or atomics. `batch` and `gdpo` normalise over the whole step, in a
second launch of one program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import triton
import triton.language as tl

from mentor_kernels.backend import interpreted, resolve_backend

Reward = Literal["mentor", "mentor_f1", "mentor_overlap", "no_align", "sparse", "strict", "flex"]
Advantage = Literal["grpo", "dr_grpo", "batch", "gdpo"]
STANDARD_TERMS = ("correct", "align", "valid")
WEIGHTS: dict[str, tuple[float, float, float]] = {
    "mentor": (0.7, 0.3, 0.1),
    "mentor_f1": (0.7, 0.3, 0.1),
    "mentor_overlap": (0.7, 0.3, 0.0),
    "no_align": (0.7, 0.0, 0.1),
    "sparse": (0.9, 0.0, 0.1),
    "flex": (0.7, 0.2, 0.1),
}
WRONG_KEEPS = 0.2
NO_ANSWER = 0.1


@dataclass(frozen=True)
class RewardConfig:
    """Which reward and which advantage; the formulas are at the top of this file. Raises ValueError for other names."""

    reward: Reward = "mentor"
    advantage: Advantage = "grpo"
    eps: float = 1e-6
    """Added to every std."""

    def __post_init__(self):
        for name, literal in {"reward": Reward, "advantage": Advantage}.items():
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name} must be one of {', '.join(get_args(literal))}, not {getattr(self, name)!r}")
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative: {self.eps}")


class AdvantageOut(NamedTuple):
    """`reward_B` and `advantage_B` float32; `terms` by name, float32 [B]; `zero_variance_G` bool [G].

    The terms are what was measured, before weights and gates: STANDARD_TERMS in [0, 1], and `process` if it was given.
    """

    reward_B: torch.Tensor
    advantage_B: torch.Tensor
    terms: dict[str, torch.Tensor]
    zero_variance_G: torch.Tensor


# --- the torch backend: the readable reference ---------------------------------------------------------------------


def _popcount(words: torch.Tensor) -> torch.Tensor:
    """Number of set bits of each int64, the sign bit included."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    for shift in (8, 16, 32):
        words = words + (words >> shift)
    return words & 0x7F


def _align(teacher_BW: torch.Tensor, student_BW: torch.Tensor, reward: str, calls_3B: torch.Tensor) -> torch.Tensor:
    teacher_B, student_B, shared_B = (
        _popcount(words).sum(1).float() for words in (teacher_BW, student_BW, teacher_BW & student_BW)
    )
    if reward == "mentor_overlap":
        return (shared_B > 0).float()
    if reward in ("mentor_f1", "flex"):
        f1_B = 2 * shared_B / (teacher_B + student_B).clamp(min=1)
        if reward == "mentor_f1":
            return f1_B
        calls_B, teacher_calls_B, _ = calls_3B
        f1_B = torch.where((teacher_calls_B == 0) & (student_B == 0), 1.0, f1_B)
        most_B = torch.maximum(calls_B, teacher_calls_B).clamp(min=1)
        return f1_B * (1 - (calls_B - teacher_calls_B).abs() / most_B / 2)
    return ((student_B > 0) & (teacher_BW == student_BW).all(1)).float()


def _valid(invalid_calls_B: torch.Tensor, reward: str, calls_3B: torch.Tensor) -> torch.Tensor:
    if reward != "flex":
        return (invalid_calls_B == 0).float()
    calls_B, teacher_calls_B, ok_calls_B = calls_3B
    return torch.where(calls_B > 0, ok_calls_B / calls_B.clamp(min=1), (teacher_calls_B == 0).float())


def _gated(
    terms_KB: torch.Tensor,
    process_B: torch.Tensor | None,
    finished_B: torch.Tensor,
    answered_B: torch.Tensor,
    reward: str,
) -> tuple[torch.Tensor, tuple[float, ...]]:
    """The terms as the gates leave them, and the weights whose sum over them is the reward."""
    if reward == "strict":
        score_B = process_B.float().masked_fill(~answered_B, NO_ANSWER)
        return score_B.masked_fill(~finished_B, 0.0)[None], (1.0,)
    weights = WEIGHTS[reward]
    correct_B, align_B, valid_B = terms_KB
    if not weights[1]:  # no part of this preset: its variance must not count either
        align_B = torch.zeros_like(align_B)
    align_B = torch.where(correct_B == 1, align_B, WRONG_KEEPS * align_B)
    if reward == "sparse":
        valid_B = torch.ones_like(valid_B)
    if reward == "mentor_overlap":  # no validity term, but an episode without an answer still gets its 0.1
        valid_B, weights = torch.zeros_like(valid_B), (*weights[:2], NO_ANSWER)
    no_answer_3B = torch.stack([torch.zeros_like(valid_B), torch.zeros_like(valid_B), torch.ones_like(valid_B)])
    gated_3B = torch.where(answered_B, torch.stack([correct_B, align_B, valid_B]), no_answer_3B)
    return gated_3B.masked_fill(~finished_B, 0.0), weights


def _weighted(weights: tuple[float, ...], gated_KB: torch.Tensor) -> torch.Tensor:
    """The reward: products and sums in order, as the kernel has them."""
    return sum(w * term_B for w, term_B in zip(weights, gated_KB, strict=True))


class _Groups:
    """Statistics of values [B] over the rollouts of a group that count, handed back to each rollout."""

    def __init__(self, group_B: torch.Tensor, counts_B: torch.Tensor, size: int):
        self.group_B, self.counts_B, self.size = group_B, counts_B, size
        self.n_G = self._sum(counts_B.float())

    def _sum(self, values_B: torch.Tensor) -> torch.Tensor:
        return values_B.new_zeros(self.size).index_add_(0, self.group_B, values_B.masked_fill(~self.counts_B, 0.0))

    def constant(self, values_B: torch.Tensor) -> torch.Tensor:
        """bool [G]: are all values of the group equal?"""
        edges = []
        for sign in (1, -1):
            filled_B = (sign * values_B).masked_fill(~self.counts_B, -torch.inf)
            start_G = values_B.new_full((self.size,), -torch.inf)
            edges.append(sign * start_G.scatter_reduce_(0, self.group_B, filled_B, "amax"))
        return (edges[0] == edges[1]) | (self.n_G < 2)

    def centred(self, values_B: torch.Tensor) -> torch.Tensor:
        return values_B - (self._sum(values_B) / self.n_G.clamp(min=1))[self.group_B]

    def normalised(self, values_B: torch.Tensor, eps: float) -> torch.Tensor:
        """(value - mean) / (std + eps), exactly 0 where all are equal."""
        centred_B = self.centred(values_B)
        std_G = (self._sum(centred_B.square()) / (self.n_G - 1).clamp(min=1)).sqrt()
        return (centred_B / (std_G[self.group_B] + eps)).masked_fill(self.constant(values_B)[self.group_B], 0.0)


def _advantage(
    reward_B: torch.Tensor, gated_KB: torch.Tensor, weights: tuple[float, ...], group_B: torch.Tensor, size: int,
    config: RewardConfig,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    scored_B = ~reward_B.isnan()
    groups = _Groups(group_B, scored_B, size)
    whole = _Groups(torch.zeros_like(group_B), scored_B, 1)
    zero_variance_G = groups.constant(reward_B)
    if config.advantage == "gdpo":
        zero_variance_G = torch.stack([groups.constant(term_B) for term_B in gated_KB]).all(0)
        parts = [w * groups.normalised(term_B, config.eps) for w, term_B in zip(weights, gated_KB, strict=True)]
        advantage_B = whole.normalised(sum(parts), config.eps)
    elif config.advantage == "grpo":
        advantage_B = groups.normalised(reward_B, config.eps)
    else:
        advantage_B = groups.centred(reward_B)
        if config.advantage == "batch":
            spread_B = whole.centred(reward_B).square()
            std = (whole._sum(spread_B) / (whole.n_G - 1).clamp(min=1)).sqrt()
            advantage_B = advantage_B / (std + config.eps)
    return advantage_B.masked_fill(zero_variance_G[group_B] | ~scored_B, 0.0), zero_variance_G


def _forward_torch(
    teacher_BW: torch.Tensor,
    student_BW: torch.Tensor,
    correct_B: torch.Tensor,
    finished_B: torch.Tensor,
    answered_B: torch.Tensor,
    invalid_calls_B: torch.Tensor,
    group_B: torch.Tensor,
    process_B: torch.Tensor | None,
    calls_3B: torch.Tensor,
    groups: int,
    config: RewardConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(reward_B, advantage_B, terms_3B, zero_variance_G)."""
    correct_B = correct_B.float()
    terms_3B = torch.stack(
        [
            correct_B,
            _align(teacher_BW, student_BW, config.reward, calls_3B),
            _valid(invalid_calls_B, config.reward, calls_3B),
        ]
    )
    gated_KB, weights = _gated(terms_3B, process_B, finished_B.bool(), answered_B.bool(), config.reward)
    unscored_B = correct_B.isnan()
    if config.reward == "strict":
        unscored_B = unscored_B | process_B.isnan()
    reward_B = _weighted(weights, gated_KB)
    reward_B = reward_B.masked_fill(unscored_B, torch.nan)
    advantage_B, zero_variance_G = _advantage(reward_B, gated_KB, weights, group_B, groups, config)
    return reward_B, advantage_B, terms_3B, zero_variance_G


# --- the Triton backend --------------------------------------------------------------------------------------------

# Rollouts that a program looks at together.
BLOCK = 256
# A thread for each: with two of them, exact divisions make the compiler spill.
WARPS = 8


@triton.jit
def _bits(words):
    """_popcount, as float32."""
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    words = words + (words >> 8)
    words = words + (words >> 16)
    words = words + (words >> 32)
    return (words & 0x7F).to(tl.float32)


@triton.jit
def _measured(
    teacher_ptr, student_ptr, correct_ptr, invalid_ptr, calls_ptr, i, ok, B, WORDS: tl.constexpr, REWARD: tl.constexpr
):
    """correct, align and valid of rollouts i, before the gates."""
    correct = tl.load(correct_ptr + i, mask=ok, other=0).to(tl.float32)
    teacher_n = tl.zeros_like(correct)
    student_n = tl.zeros_like(correct)
    shared_n = tl.zeros_like(correct)
    differ_n = tl.zeros_like(correct)
    for w in tl.static_range(WORDS):
        teacher = tl.load(teacher_ptr + i * WORDS + w, mask=ok, other=0)
        student = tl.load(student_ptr + i * WORDS + w, mask=ok, other=0)
        teacher_n += _bits(teacher)
        student_n += _bits(student)
        shared_n += _bits(teacher & student)
        differ_n += _bits(teacher ^ student)
    valid = (tl.load(invalid_ptr + i, mask=ok, other=0) == 0).to(tl.float32)
    f1 = tl.div_rn(2 * shared_n, tl.maximum(teacher_n + student_n, 1.0))
    if REWARD == "mentor_overlap":
        align = (shared_n > 0).to(tl.float32)
    elif REWARD == "mentor_f1":
        align = f1
    elif REWARD == "flex":
        calls = tl.load(calls_ptr + i, mask=ok, other=0.0)
        teacher_calls = tl.load(calls_ptr + B + i, mask=ok, other=0.0)
        ok_calls = tl.load(calls_ptr + 2 * B + i, mask=ok, other=0.0)
        f1 = tl.where((teacher_calls == 0) & (student_n == 0), 1.0, f1)
        most = tl.maximum(tl.maximum(calls, teacher_calls), 1.0)
        align = f1 * (1 - tl.div_rn(tl.abs(calls - teacher_calls), most) * 0.5)
        ok_share = tl.div_rn(ok_calls, tl.maximum(calls, 1.0))
        valid = tl.where(calls > 0, ok_share, (teacher_calls == 0).to(tl.float32))
    else:
        align = ((student_n > 0) & (differ_n == 0)).to(tl.float32)
    return correct, align, valid


@triton.jit
def _gated_terms(
    correct, align, valid, finished_ptr, answered_ptr, process_ptr, i, ok, w_correct, w_align, w_valid,
    ALIGNS: tl.constexpr, REWARD: tl.constexpr, NO_ANSWER: tl.constexpr, WRONG_KEEPS: tl.constexpr,
):  # fmt: skip
    """_gated: the three terms (`strict`: its score and nothing), and the reward."""
    finished = tl.load(finished_ptr + i, mask=ok, other=0) != 0
    answered = tl.load(answered_ptr + i, mask=ok, other=0) != 0
    unscored = correct != correct
    if REWARD == "strict":
        score = tl.load(process_ptr + i, mask=ok, other=0.0).to(tl.float32)
        unscored = unscored | (score != score)
        first = tl.where(finished, tl.where(answered, score, NO_ANSWER), 0.0)
        second = tl.zeros_like(first)
        third = tl.zeros_like(first)
        reward = first
    else:
        if not ALIGNS:
            align = tl.zeros_like(align)
        if REWARD == "sparse":
            valid = tl.full(valid.shape, 1.0, tl.float32)
        if REWARD == "mentor_overlap":
            valid = tl.zeros_like(valid)
        speaks = finished & answered
        first = tl.where(speaks, correct, 0.0)
        second = tl.where(speaks, tl.where(correct == 1, align, WRONG_KEEPS * align), 0.0)
        third = tl.where(finished, tl.where(answered, valid, 1.0), 0.0)
        reward = w_correct * first + w_align * second + w_valid * third
    return first, second, third, tl.where(unscored, float("nan"), reward)


@triton.jit
def _deviation(squares, n, eps):
    """std + eps, of the sum of squared distances from the mean."""
    return tl.sqrt_rn(tl.div_rn(squares, tl.maximum(n - 1, 1.0))) + eps


@triton.jit(do_not_specialize=["B"])
def _group_rewards(
    teacher_ptr, student_ptr, correct_ptr, finished_ptr, answered_ptr, invalid_ptr, group_ptr, process_ptr, calls_ptr,
    reward_ptr, advantage_ptr, terms_ptr, silent_ptr, B, w_correct, w_align, w_valid, eps,
    WORDS: tl.constexpr, REWARD: tl.constexpr, ADVANTAGE: tl.constexpr, ALIGNS: tl.constexpr, NO_ANSWER: tl.constexpr,
    WRONG_KEEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One group: terms, rewards, and advantages within it. Its values are the reward; for gdpo, up to three terms."""
    g = tl.program_id(0)
    TERMS: tl.constexpr = ADVANTAGE == "gdpo" and REWARD != "strict"
    count_B = tl.zeros([BLOCK], tl.float32)
    sum1_B, sum2_B, sum3_B = count_B, count_B, count_B
    low1_B = tl.full([BLOCK], float("inf"), tl.float32)
    low2_B, low3_B, high1_B, high2_B, high3_B = low1_B, low1_B, -low1_B, -low1_B, -low1_B
    for at in range(0, B, BLOCK):
        i = at + tl.arange(0, BLOCK)
        ok = (i < B) & (tl.load(group_ptr + i, mask=i < B, other=-1) == g)
        correct, align, valid = _measured(
            teacher_ptr, student_ptr, correct_ptr, invalid_ptr, calls_ptr, i, ok, B, WORDS, REWARD
        )  # fmt: skip
        x1, x2, x3, reward = _gated_terms(
            correct, align, valid, finished_ptr, answered_ptr, process_ptr, i, ok, w_correct, w_align, w_valid,
            ALIGNS, REWARD, NO_ANSWER, WRONG_KEEPS,
        )  # fmt: skip
        tl.store(terms_ptr + i, correct, mask=ok)
        tl.store(terms_ptr + B + i, align, mask=ok)
        tl.store(terms_ptr + 2 * B + i, valid, mask=ok)
        tl.store(reward_ptr + i, reward, mask=ok)
        counts = ok & (reward == reward)
        count_B += counts.to(tl.float32)
        if not TERMS:
            x1 = reward
        sum1_B += tl.where(counts, x1, 0.0)
        low1_B = tl.minimum(low1_B, tl.where(counts, x1, float("inf")))
        high1_B = tl.maximum(high1_B, tl.where(counts, x1, -float("inf")))
        if TERMS:
            sum2_B += tl.where(counts, x2, 0.0)
            sum3_B += tl.where(counts, x3, 0.0)
            low2_B = tl.minimum(low2_B, tl.where(counts, x2, float("inf")))
            low3_B = tl.minimum(low3_B, tl.where(counts, x3, float("inf")))
            high2_B = tl.maximum(high2_B, tl.where(counts, x2, -float("inf")))
            high3_B = tl.maximum(high3_B, tl.where(counts, x3, -float("inf")))
    n = tl.sum(count_B)
    some = tl.maximum(n, 1.0)
    mean1, mean2, mean3 = (
        tl.div_rn(tl.sum(sum1_B), some), tl.div_rn(tl.sum(sum2_B), some), tl.div_rn(tl.sum(sum3_B), some)
    )  # fmt: skip
    flat1 = (tl.min(low1_B) == tl.max(high1_B)) | (n < 2)
    flat2, flat3 = flat1, flat1
    if TERMS:
        flat2 = (tl.min(low2_B) == tl.max(high2_B)) | (n < 2)
        flat3 = (tl.min(low3_B) == tl.max(high3_B)) | (n < 2)
    silent = flat1 & flat2 & flat3
    tl.store(silent_ptr + g, silent)

    std1, std2, std3 = 1.0, 1.0, 1.0
    if ADVANTAGE == "grpo" or ADVANTAGE == "gdpo":
        square1_B = tl.zeros([BLOCK], tl.float32)
        square2_B, square3_B = square1_B, square1_B
        for at in range(0, B, BLOCK):
            i = at + tl.arange(0, BLOCK)
            ok = (i < B) & (tl.load(group_ptr + i, mask=i < B, other=-1) == g)
            correct, align, valid = _measured(
                teacher_ptr, student_ptr, correct_ptr, invalid_ptr, calls_ptr, i, ok, B, WORDS, REWARD
            )  # fmt: skip
            x1, x2, x3, reward = _gated_terms(
                correct, align, valid, finished_ptr, answered_ptr, process_ptr, i, ok, w_correct, w_align, w_valid,
                ALIGNS, REWARD, NO_ANSWER, WRONG_KEEPS,
            )  # fmt: skip
            counts = ok & (reward == reward)
            if not TERMS:
                x1 = reward
            square1_B += tl.where(counts, (x1 - mean1) * (x1 - mean1), 0.0)
            square2_B += tl.where(counts, (x2 - mean2) * (x2 - mean2), 0.0)
            square3_B += tl.where(counts, (x3 - mean3) * (x3 - mean3), 0.0)
        std1 = _deviation(tl.sum(square1_B), n, eps)
        std2 = _deviation(tl.sum(square2_B), n, eps)
        std3 = _deviation(tl.sum(square3_B), n, eps)
    for at in range(0, B, BLOCK):
        i = at + tl.arange(0, BLOCK)
        ok = (i < B) & (tl.load(group_ptr + i, mask=i < B, other=-1) == g)
        correct, align, valid = _measured(
            teacher_ptr, student_ptr, correct_ptr, invalid_ptr, calls_ptr, i, ok, B, WORDS, REWARD
        )  # fmt: skip
        x1, x2, x3, reward = _gated_terms(
            correct, align, valid, finished_ptr, answered_ptr, process_ptr, i, ok, w_correct, w_align, w_valid,
            ALIGNS, REWARD, NO_ANSWER, WRONG_KEEPS,
        )  # fmt: skip
        if TERMS:
            value = w_correct * tl.where(flat1, 0.0, tl.div_rn(x1 - mean1, std1))
            value += w_align * tl.where(flat2, 0.0, tl.div_rn(x2 - mean2, std2))
            value += w_valid * tl.where(flat3, 0.0, tl.div_rn(x3 - mean3, std3))
        else:
            value = tl.div_rn(reward - mean1, std1)
        tl.store(advantage_ptr + i, tl.where(reward == reward, tl.where(silent, 0.0, value), 0.0), mask=ok)


@triton.jit(do_not_specialize=["B", "groups"])
def _whole_step(
    reward_ptr, advantage_ptr, silent_ptr, group_ptr, B, groups, eps, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    """Advantages normalised over the step: by their own mean and std (OWN, gdpo), or by the std of the rewards."""
    count_B = tl.zeros([BLOCK], tl.float32)
    sum_B = count_B
    low_B = tl.full([BLOCK], float("inf"), tl.float32)
    high_B = -low_B
    for at in range(0, B, BLOCK):
        i = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + i, mask=i < B, other=float("nan"))
        x = reward
        if OWN:
            x = tl.load(advantage_ptr + i, mask=i < B, other=0.0)
        counts = reward == reward
        count_B += counts.to(tl.float32)
        sum_B += tl.where(counts, x, 0.0)
        low_B = tl.minimum(low_B, tl.where(counts, x, float("inf")))
        high_B = tl.maximum(high_B, tl.where(counts, x, -float("inf")))
    n = tl.sum(count_B)
    mean = tl.div_rn(tl.sum(sum_B), tl.maximum(n, 1.0))
    square_B = tl.zeros([BLOCK], tl.float32)
    for at in range(0, B, BLOCK):
        i = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + i, mask=i < B, other=float("nan"))
        x = reward
        if OWN:
            x = tl.load(advantage_ptr + i, mask=i < B, other=0.0)
        square_B += tl.where(reward == reward, (x - mean) * (x - mean), 0.0)
    std = _deviation(tl.sum(square_B), n, eps)
    flat = (tl.min(low_B) == tl.max(high_B)) | (n < 2)
    for at in range(0, B, BLOCK):
        i = at + tl.arange(0, BLOCK)
        reward = tl.load(reward_ptr + i, mask=i < B, other=float("nan"))
        x = tl.load(advantage_ptr + i, mask=i < B, other=0.0)
        group = tl.load(group_ptr + i, mask=i < B, other=-1)
        ok = (group >= 0) & (group < groups)
        silent = tl.load(silent_ptr + group, mask=ok, other=1) != 0
        x = tl.where(flat, 0.0, tl.div_rn(x - mean, std)) if OWN else tl.div_rn(x, std)
        tl.store(advantage_ptr + i, tl.where(silent | (reward != reward), 0.0, x), mask=ok)


def _forward_triton(
    teacher_BW: torch.Tensor,
    student_BW: torch.Tensor,
    correct_B: torch.Tensor,
    finished_B: torch.Tensor,
    answered_B: torch.Tensor,
    invalid_calls_B: torch.Tensor,
    group_B: torch.Tensor,
    process_B: torch.Tensor | None,
    calls_3B: torch.Tensor,
    groups: int,
    config: RewardConfig,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As _forward_torch, without a host sync. A rollout whose group is not in [0, groups) is NaN in every output."""
    B = group_B.shape[0]
    reward_B, advantage_B = (torch.full((B,), torch.nan, device=group_B.device) for _ in range(2))
    terms_3B = torch.full((len(STANDARD_TERMS), B), torch.nan, device=group_B.device)
    silent_G = torch.empty(groups, dtype=torch.bool, device=group_B.device)
    if not groups:
        return reward_B, advantage_B, terms_3B, silent_G
    weights = WEIGHTS.get(config.reward, (1.0, 0.0, 0.0))
    overlap = config.reward == "mentor_overlap"  # its third term is 0 but for an episode without an answer
    columns = (teacher_BW, student_BW, correct_B, finished_B, answered_B, invalid_calls_B, group_B, process_B, calls_3B)
    columns = [None if c is None else c.contiguous() for c in columns]
    with torch.cuda.device_of(group_B):
        _group_rewards[(groups,)](
            *columns, reward_B, advantage_B, terms_3B, silent_G, B, weights[0], weights[1],
            NO_ANSWER if overlap else weights[2], config.eps,
            WORDS=teacher_BW.shape[1], REWARD=config.reward, ADVANTAGE=config.advantage, ALIGNS=weights[1] > 0,
            NO_ANSWER=NO_ANSWER, WRONG_KEEPS=WRONG_KEEPS, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
        if config.advantage in ("batch", "gdpo"):
            _whole_step[(1,)](
                reward_B, advantage_B, silent_G, columns[6], B, groups, config.eps, OWN=config.advantage == "gdpo",
                BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return reward_B, advantage_B, terms_3B, silent_G


# --- the operator that torch.compile sees --------------------------------------------------------------------------


@torch.library.custom_op("mentor_kernels::group_advantage", mutates_args=())
def _group_advantage(
    teacher_BW: torch.Tensor,
    student_BW: torch.Tensor,
    correct_B: torch.Tensor,
    finished_B: torch.Tensor,
    answered_B: torch.Tensor,
    invalid_calls_B: torch.Tensor,
    group_B: torch.Tensor,
    process_B: torch.Tensor | None,
    calls_3B: torch.Tensor,
    groups: int | None,
    reward: str,
    advantage: str,
    eps: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if groups is None or backend == "torch" or interpreted():
        _check_groups(group_B, groups)
    if groups is None:
        groups = int(group_B.max()) + 1 if group_B.numel() else 0
    forward = _forward_triton if backend == "triton" else _forward_torch
    return forward(
        teacher_BW, student_BW, correct_B, finished_B, answered_B, invalid_calls_B, group_B, process_B, calls_3B,
        groups, RewardConfig(reward, advantage, eps),
    )  # fmt: skip


def _check_groups(group_B: torch.Tensor, groups: int | None) -> None:
    """Not for Triton on a GPU that was told how many there are: to look would stop the CPU until the GPU is done."""
    if group_B.numel() and int(group_B.min()) < 0:
        raise ValueError(f"group_B holds a negative group: {int(group_B.min())}")
    if groups is not None and group_B.numel() and int(group_B.max()) >= groups:
        raise ValueError(f"group_B holds group {int(group_B.max())}, but there are {groups}")


@_group_advantage.register_fake
def _(teacher_BW, student_BW, correct_B, *rest):
    B, groups = correct_B.shape[0], rest[6]
    row = correct_B.new_empty(B, dtype=torch.float32)
    if groups is None:
        groups = torch.library.get_ctx().new_dynamic_size()
    return (
        row,
        torch.empty_like(row),
        correct_B.new_empty(len(STANDARD_TERMS), B, dtype=torch.float32),
        correct_B.new_empty(groups, dtype=torch.bool),
    )


# --- the public function -------------------------------------------------------------------------------------------


def group_advantage(
    teacher_tools_B: torch.Tensor,
    student_tools_B: torch.Tensor,
    correct_B: torch.Tensor,
    finished_B: torch.Tensor,
    answered_B: torch.Tensor,
    invalid_calls_B: torch.Tensor,
    group_B: torch.Tensor,
    *,
    config: RewardConfig,
    process_B: torch.Tensor | None = None,
    calls_B: torch.Tensor | None = None,
    teacher_calls_B: torch.Tensor | None = None,
    ok_calls_B: torch.Tensor | None = None,
    groups: int | None = None,
    backend: str | None = None,
) -> AdvantageOut:
    """Rewards, terms and advantages of all rollouts of a step. Formulas: at the top of this file.

    teacher_tools_B, student_tools_B   int64 [B] or [B, W]: sets of tools as bit masks, any 64 tools a word
    correct_B                          1 right, 0 wrong, NaN could not be scored (bool or any number type)
    finished_B, answered_B             not 0: the episode ended by itself; it has a non-empty answer
    invalid_calls_B                    calls to tools that do not exist
    group_B                            int64, 0 .. G - 1 in any order
    process_B                          for `strict`: the trajectory score; reported as the term `process` when given
    calls_B, teacher_calls_B, ok_calls_B   for `flex`: all calls of the student, of the teacher, the student's good ones

    groups                             G; None looks it up, for which a GPU has to be waited for

    B = 0 is fine. Nothing here has a gradient. Raises ValueError for shapes or devices that do not agree, for masks or
    groups that are not int64, for a group outside [0, G) (not on a GPU that was told G: NaN there), when `strict` or
    `flex` lack their inputs, and for an unknown backend.
    """
    columns = {
        "correct_B": correct_B,
        "finished_B": finished_B,
        "answered_B": answered_B,
        "invalid_calls_B": invalid_calls_B,
        "process_B": process_B,
        "calls_B": calls_B,
        "teacher_calls_B": teacher_calls_B,
        "ok_calls_B": ok_calls_B,
    }
    _check(teacher_tools_B, student_tools_B, group_B, columns, config)
    B = group_B.shape[0]
    counts = (calls_B, teacher_calls_B, ok_calls_B)
    zeros_B = torch.zeros_like(correct_B, dtype=torch.float32)
    reward_B, advantage_B, terms_3B, zero_variance_G = _group_advantage(
        teacher_tools_B.reshape(B, -1) if B else teacher_tools_B.reshape(0, 1),
        student_tools_B.reshape(B, -1) if B else student_tools_B.reshape(0, 1),
        correct_B, finished_B, answered_B, invalid_calls_B, group_B, process_B,
        torch.stack([zeros_B if count is None else count.float() for count in counts]),
        groups, config.reward, config.advantage, config.eps, resolve_backend(backend, group_B.device),
    )  # fmt: skip
    terms = dict(zip(STANDARD_TERMS, terms_3B.unbind(), strict=True))
    if process_B is not None:
        terms["process"] = process_B.float()
    return AdvantageOut(reward_B, advantage_B, terms, zero_variance_G)


def _check(
    teacher_tools_B: torch.Tensor,
    student_tools_B: torch.Tensor,
    group_B: torch.Tensor,
    columns: dict[str, torch.Tensor | None],
    config: RewardConfig,
) -> None:
    if group_B.dim() != 1 or group_B.dtype != torch.int64:
        raise ValueError(f"group_B must be int64 [B], not {group_B.dtype} {tuple(group_B.shape)}")
    for name, masks in {"teacher_tools_B": teacher_tools_B, "student_tools_B": student_tools_B}.items():
        if masks.dtype != torch.int64 or masks.dim() not in (1, 2) or masks.shape[:1] != group_B.shape:
            raise ValueError(
                f"{name} must be int64 [B] or [B, W] with B = {group_B.shape[0]}, "
                f"not {masks.dtype} {tuple(masks.shape)}"
            )
    if teacher_tools_B.shape != student_tools_B.shape:
        raise ValueError(
            "teacher_tools_B and student_tools_B must have one shape, "
            f"not {tuple(teacher_tools_B.shape)} and {tuple(student_tools_B.shape)}"
        )
    columns = {"teacher_tools_B": teacher_tools_B, "student_tools_B": student_tools_B, **columns}
    for name, column in columns.items():
        if column is None:
            continue
        if column.shape[:1] != group_B.shape or column.device != group_B.device:
            raise ValueError(
                f"{name} must be [B] with B = {group_B.shape[0]} on {group_B.device}, "
                f"not {tuple(column.shape)} on {column.device}"
            )
    needed = {"strict": ("process_B",), "flex": ("calls_B", "teacher_calls_B", "ok_calls_B")}
    missing = [name for name in needed.get(config.reward, ()) if columns[name] is None]
    if missing:
        raise ValueError(f"the reward {config.reward!r} needs {', '.join(missing)}")
