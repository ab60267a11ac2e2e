"""Plausible wrong ways to sample, which the shared checker must reject."""

from __future__ import annotations

import pytest
import torch
from sample_checks import check_sample, sample_cases


def right(logits_BV, uniform_B, *, temperature, p_BV=None, side="right"):
    """float64 throughout; `p_BV` in place of the probabilities that are drawn from."""
    logp_BV = (logits_BV.double() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token_B1 = logp_BV.argmax(-1, keepdim=True)
    else:
        cdf_BV = (logp_BV.exp() if p_BV is None else p_BV).cumsum(-1)
        draw_B1 = uniform_B[:, None].to(cdf_BV.dtype) * cdf_BV[:, -1:]
        token_B1 = torch.searchsorted(cdf_BV, draw_B1, right=side == "right").clamp(max=logits_BV.shape[1] - 1)
    return token_B1[:, 0], logp_BV.gather(1, token_B1)[:, 0].float()


def softmax(logits_BV, temperature):
    return (logits_BV.double() / (temperature or 1.0)).softmax(-1)


def missing_last_block(logits_BV, uniform_B, *, temperature):
    p_BV = softmax(logits_BV, temperature)
    whole = p_BV.shape[1] // 128 * 128 or p_BV.shape[1]
    return right(logits_BV, uniform_B, temperature=temperature, p_BV=p_BV[:, :whole])


def phantom_columns(logits_BV, uniform_B, *, temperature):
    padded_BV = torch.nn.functional.pad(logits_BV, (0, -logits_BV.shape[1] % 128))
    return right(logits_BV, uniform_B, temperature=temperature, p_BV=softmax(padded_BV, temperature))


def low_precision_cdf(logits_BV, uniform_B, *, temperature):
    return right(logits_BV, uniform_B, temperature=temperature, p_BV=softmax(logits_BV, temperature).half().float())


def draws_in_float32(logits_BV, uniform_B, *, temperature):
    """A uniform just under 1 is rounded to 1, and the last token drawn, whether it can be or not."""
    return right(logits_BV, uniform_B, temperature=temperature, p_BV=softmax(logits_BV, temperature).float())


def the_wrong_side_of_a_boundary(logits_BV, uniform_B, *, temperature):
    return right(logits_BV, uniform_B, temperature=temperature, side="left")


def off_by_one(logits_BV, uniform_B, *, temperature):
    return right(logits_BV, uniform_B, temperature=temperature, p_BV=softmax(logits_BV, temperature).roll(1, 1))


def from_the_other_end(logits_BV, uniform_B, *, temperature):
    return right(logits_BV, 1 - uniform_B, temperature=temperature)


def logprob_without_temperature(logits_BV, uniform_B, *, temperature):
    token_B, _ = right(logits_BV, uniform_B, temperature=temperature)
    return token_B, softmax(logits_BV, 1.0).log().gather(1, token_B[:, None])[:, 0].float()


def draw_without_temperature(logits_BV, uniform_B, *, temperature):
    return right(logits_BV, uniform_B, temperature=temperature, p_BV=softmax(logits_BV, 1.0))


def logprob_in_half(logits_BV, uniform_B, *, temperature):
    token_B, logprob_B = right(logits_BV, uniform_B, temperature=temperature)
    return token_B, logprob_B.half().float()


def maximum_from_zero(logits_BV, uniform_B, *, temperature):
    z_BV = logits_BV.float() / (temperature or 1.0)
    e_BV = (z_BV - z_BV.amax(1, keepdim=True).clamp(min=0)).exp()
    token_B, _ = right(logits_BV, uniform_B, temperature=temperature, p_BV=e_BV.double())
    return token_B, (e_BV / e_BV.sum(1, keepdim=True)).log().gather(1, token_B[:, None])[:, 0]


def the_last_of_equal_maxima(logits_BV, uniform_B, *, temperature):
    token_B, logprob_B = right(logits_BV, uniform_B, temperature=temperature)
    if temperature == 0:
        token_B = logits_BV.shape[1] - 1 - logits_BV.flip(1).argmax(-1)
    return token_B, logprob_B


WRONG = [
    missing_last_block, phantom_columns, low_precision_cdf, draws_in_float32, the_wrong_side_of_a_boundary, off_by_one,
    from_the_other_end, logprob_without_temperature, draw_without_temperature, logprob_in_half, maximum_from_zero,
    the_last_of_equal_maxima,
]  # fmt: skip


def _passes(operator) -> bool:
    try:
        for case in sample_cases(torch.float32, 400):
            check_sample(operator, case)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_ones_are_rejected(wrong):
    assert not _passes(wrong)


def test_the_right_one_passes():
    assert _passes(right)
