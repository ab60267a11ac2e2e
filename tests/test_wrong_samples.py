"""Plausible wrong ways to sample, which the shared checker must reject."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sample_checks import check_sample, cut_cases, exponentials, kept, sample_cases


def right(logits_BV, uniform_B, *, temperature, score_BV=None, noise_BV=None):
    """float64 throughout; `score_BV` in place of the logprobs that race, `noise_BV` of the exponentials."""
    logp_BV = (logits_BV.double() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token_B1 = logp_BV.argmax(-1, keepdim=True)
    else:
        score_BV = logp_BV if score_BV is None else score_BV
        noise_BV = exponentials(uniform_B, score_BV.shape[1]) if noise_BV is None else noise_BV
        token_B1 = (score_BV - noise_BV.log()).argmax(-1, keepdim=True).clamp(max=logits_BV.shape[1] - 1)
    return token_B1[:, 0], logp_BV.gather(1, token_B1)[:, 0].float()


def logprobs(logits_BV, temperature):
    return (logits_BV.double() / (temperature or 1.0)).log_softmax(-1)


def missing_last_block(logits_BV, uniform_B, *, temperature):
    score_BV = logprobs(logits_BV, temperature)
    whole = score_BV.shape[1] // 128 * 128 or score_BV.shape[1]
    return right(logits_BV, uniform_B, temperature=temperature, score_BV=score_BV[:, :whole])


def phantom_columns(logits_BV, uniform_B, *, temperature):
    padded_BV = torch.nn.functional.pad(logits_BV, (0, -logits_BV.shape[1] % 128))
    return right(logits_BV, uniform_B, temperature=temperature, score_BV=logprobs(padded_BV, temperature))


def low_precision_race(logits_BV, uniform_B, *, temperature):
    score_BV = logprobs(logits_BV, temperature).bfloat16().double()
    return right(logits_BV, uniform_B, temperature=temperature, score_BV=score_BV)


def inverse_cdf(logits_BV, uniform_B, *, temperature):
    """Another way to draw from the same distribution, with other tokens."""
    p_BV = logprobs(logits_BV, temperature).exp()
    token_B1 = torch.searchsorted(p_BV.cumsum(-1), uniform_B[:, None]).clamp(max=p_BV.shape[1] - 1)
    token_B, logp_B = right(logits_BV, uniform_B, temperature=temperature)
    return (token_B, logp_B) if temperature == 0 else (token_B1[:, 0], p_BV.log().gather(1, token_B1)[:, 0].float())


def off_by_one(logits_BV, uniform_B, *, temperature):
    noise_BV = exponentials(uniform_B, logits_BV.shape[1]).roll(1, 1)
    return right(logits_BV, uniform_B, temperature=temperature, noise_BV=noise_BV)


def one_noise_for_all_rows(logits_BV, uniform_B, *, temperature):
    noise_BV = exponentials(uniform_B[:1].expand_as(uniform_B), logits_BV.shape[1])
    return right(logits_BV, uniform_B, temperature=temperature, noise_BV=noise_BV)


def gumbel_with_the_wrong_sign(logits_BV, uniform_B, *, temperature):
    noise_BV = 1 / exponentials(uniform_B, logits_BV.shape[1])
    return right(logits_BV, uniform_B, temperature=temperature, noise_BV=noise_BV)


def noise_from_the_other_end(logits_BV, uniform_B, *, temperature):
    """-log(u) for -log(1 - u): small ones, which win, lose their digits."""
    noise_BV = -torch.log(-torch.expm1(-exponentials(uniform_B, logits_BV.shape[1])))
    return right(logits_BV, uniform_B, temperature=temperature, noise_BV=noise_BV)


def logprob_without_temperature(logits_BV, uniform_B, *, temperature):
    token_B, _ = right(logits_BV, uniform_B, temperature=temperature)
    return token_B, logprobs(logits_BV, 1.0).gather(1, token_B[:, None])[:, 0].float()


def draw_without_temperature(logits_BV, uniform_B, *, temperature):
    return right(logits_BV, uniform_B, temperature=temperature, score_BV=logprobs(logits_BV, 1.0))


def logprob_in_half(logits_BV, uniform_B, *, temperature):
    token_B, logprob_B = right(logits_BV, uniform_B, temperature=temperature)
    return token_B, logprob_B.half().float()


def maximum_from_zero(logits_BV, uniform_B, *, temperature):
    z_BV = logits_BV.float() / (temperature or 1.0)
    e_BV = (z_BV - z_BV.amax(1, keepdim=True).clamp(min=0)).exp()
    token_B, _ = right(logits_BV, uniform_B, temperature=temperature)
    return token_B, (e_BV / e_BV.sum(1, keepdim=True)).log().gather(1, token_B[:, None])[:, 0]


def the_last_of_equal_maxima(logits_BV, uniform_B, *, temperature):
    token_B, logprob_B = right(logits_BV, uniform_B, temperature=temperature)
    if temperature == 0:
        token_B = logits_BV.shape[1] - 1 - logits_BV.flip(1).argmax(-1)
    return token_B, logprob_B


BLOCK = 400
"""Columns of a program of those that split a row wrongly; the checker's cases have rows of one block and several."""


def merged_blocks(logits_BV, uniform_B, *, temperature, join):
    """A row split among programs; `join` says how the blocks' greatest scores and their places become the row's."""
    logp_BV = logprobs(logits_BV, temperature)
    score_BV = logp_BV - exponentials(uniform_B, logp_BV.shape[1]).log() if temperature else logp_BV
    parts = [part.max(1) for part in score_BV.split(BLOCK, 1)]
    best_BK, winner_BK = (torch.stack([part[i] for part in parts], 1) for i in range(2))
    token_B1 = join(best_BK, winner_BK, torch.arange(len(parts)) * BLOCK)
    return token_B1[:, 0], logp_BV.gather(1, token_B1)[:, 0].float()


def blocks_merged_rightly(best_BK, winner_BK, start_K):
    return (winner_BK + start_K).gather(1, best_BK.argmax(1, keepdim=True))


def place_within_the_block(logits_BV, uniform_B, *, temperature):
    def join(best_BK, winner_BK, start_K):
        return winner_BK.gather(1, best_BK.argmax(1, keepdim=True))

    return merged_blocks(logits_BV, uniform_B, temperature=temperature, join=join)


def the_last_of_equal_blocks(logits_BV, uniform_B, *, temperature):
    def join(best_BK, winner_BK, start_K):
        last_B1 = best_BK.shape[1] - 1 - best_BK.flip(1).argmax(1, keepdim=True)
        return (winner_BK + start_K).gather(1, last_B1)

    return merged_blocks(logits_BV, uniform_B, temperature=temperature, join=join)


def last_block_left_out_of_the_merge(logits_BV, uniform_B, *, temperature):
    def join(best_BK, winner_BK, start_K):
        whole = max(1, best_BK.shape[1] - 1)
        return blocks_merged_rightly(best_BK[:, :whole], winner_BK[:, :whole], start_K[:whole])

    return merged_blocks(logits_BV, uniform_B, temperature=temperature, join=join)


def weights_from_each_blocks_own_maximum(logits_BV, uniform_B, *, temperature):
    """Summed as if all blocks had the same largest logit."""
    z_BV = logits_BV.double() / (temperature or 1.0)
    parts = z_BV.split(BLOCK, 1)
    total_B = sum((part - part.amax(1, keepdim=True)).exp().nan_to_num(0.0).sum(1) for part in parts)
    token_B, _ = right(logits_BV, uniform_B, temperature=temperature)
    return token_B, (z_BV.gather(1, token_B[:, None])[:, 0] - z_BV.amax(1) - total_B.log()).float()


WRONG = [
    missing_last_block, phantom_columns, low_precision_race, inverse_cdf, off_by_one, one_noise_for_all_rows,
    gumbel_with_the_wrong_sign, noise_from_the_other_end, logprob_without_temperature, draw_without_temperature,
    logprob_in_half, maximum_from_zero, the_last_of_equal_maxima, place_within_the_block, the_last_of_equal_blocks,
    last_block_left_out_of_the_merge, weights_from_each_blocks_own_maximum,
]  # fmt: skip


def _passes(operator, cases=sample_cases) -> bool:
    try:
        for case in cases(torch.float32, BLOCK):
            check_sample(operator, case)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_ones_are_rejected(wrong):
    assert not _passes(wrong)


def test_the_right_one_passes():
    assert _passes(right)


def test_blocks_that_are_merged_rightly_pass():
    for case in sample_cases(torch.float32, BLOCK):
        check_sample(partial(merged_blocks, join=blocks_merged_rightly), case)


# --- with top_k and top_p -------------------------------------------------------------------------------------------


def right_cut(logits_BV, uniform_B, *, temperature, kept_BV=None, **cut):
    if temperature == 0:
        return right(logits_BV, uniform_B, temperature=0)
    kept_BV = kept(logits_BV, temperature, **cut) if kept_BV is None else kept_BV
    score_BV = logprobs(logits_BV, temperature).masked_fill(~kept_BV, -torch.inf)
    return right(logits_BV, uniform_B, temperature=temperature, score_BV=score_BV)


def logprob_of_what_is_left(logits_BV, uniform_B, *, temperature, **cut):
    if temperature:
        logits_BV = logits_BV.masked_fill(~kept(logits_BV, temperature, **cut), -torch.inf)
    return right(logits_BV, uniform_B, temperature=temperature)


def all_tokens_race(logits_BV, uniform_B, *, temperature, **cut):
    return right(logits_BV, uniform_B, temperature=temperature)


def cut_without_temperature(logits_BV, uniform_B, *, temperature, **cut):
    return right_cut(logits_BV, uniform_B, temperature=temperature, kept_BV=kept(logits_BV, 1.0, **cut))


def last_one_cut_as_well(logits_BV, uniform_B, *, temperature, top_k=0, **cut):
    return right_cut(logits_BV, uniform_B, temperature=temperature, top_k=max(top_k - 1, min(top_k, 1)), **cut)


def greedy_among_the_kept(logits_BV, uniform_B, *, temperature, **cut):
    return right(logits_BV, uniform_B, temperature=0)


@pytest.mark.parametrize(
    "wrong",
    [logprob_of_what_is_left, all_tokens_race, cut_without_temperature, last_one_cut_as_well, greedy_among_the_kept],
    ids=lambda f: f.__name__,
)
def test_wrong_cuts_are_rejected(wrong):
    assert not _passes(wrong, cut_cases)


def test_the_right_cut_passes():
    assert _passes(right_cut, cut_cases)
