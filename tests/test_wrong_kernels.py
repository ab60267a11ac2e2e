"""A checker is trusted after it has failed: plausible wrong implementations, which the shared checkers must reject."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from advantage_checks import check_advantage, random_episodes
from kernel_checks import (
    check_active_tiles,
    check_head,
    check_policy,
    exact_head,
    head_cases,
    plain_kl,
    plain_policy,
    policy_cases,
    weight_cases,
)
from mentor_kernels import Normaliser, RewardConfig, group_advantage
from mentor_kernels.active_tiles import ActiveTiles, active_tiles

# --- linear_logprob: each has the defect of its name and is right otherwise ----------------------------------------


def _logits(hidden, weight, temperature, softcap, scale):
    logits = scale * (hidden @ weight.T)
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def _finish(z, targets):
    """Right in float64: log_softmax, and the entropy."""
    log_p = torch.log_softmax(z, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def low_precision_logits(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    z = _logits(hidden.bfloat16(), weight.bfloat16(), temperature, softcap, scale)
    return _finish(z.double(), targets)


def low_precision_output(hidden, weight, targets, **options):
    logprob, entropy = exact_head(hidden, weight, targets, **options)
    return logprob.bfloat16().float(), entropy.bfloat16().float()


def missing_last_block(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    z = _logits(hidden.double(), weight.double(), temperature, softcap, scale)
    columns = torch.arange(z.shape[1])
    outside = (columns >= z.shape[1] // 128 * 128) & (columns != targets[:, None])
    return _finish(z.masked_fill(outside, -1e30), targets)


def phantom_columns(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    z = _logits(hidden.double(), weight.double(), temperature, softcap, scale)
    return _finish(torch.nn.functional.pad(z, (0, -z.shape[1] % 128)), targets)


def maximum_from_zero(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    z = _logits(hidden.float(), weight.float(), temperature, softcap, scale)
    m = z.amax(1, keepdim=True).clamp(min=0)
    p = (z - m).exp() / (z - m).exp().sum(1, keepdim=True)
    log_p = p.log()
    return log_p.gather(1, targets[:, None])[:, 0], -(p * log_p).sum(1)


def logsumexp_before_subtracting(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    z = _logits(hidden.float(), weight.float(), temperature, softcap, scale)
    log_p = z - z.logsumexp(1, keepdim=True)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def entropy_that_cancels(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    z = _logits(hidden.float(), weight.float(), temperature, softcap, scale)
    logprob, _ = exact_head(hidden, weight, targets, temperature, softcap, scale)
    return logprob, z.logsumexp(1) - (torch.softmax(z, -1) * z).sum(1)


def target_collapse(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    z = _logits(hidden.float(), weight.float(), temperature, softcap, scale)
    return _finish(z, targets)


def off_by_one_target(hidden, weight, targets, **options):
    return exact_head(hidden, weight, targets.roll(1), **options)


def detached_entropy(hidden, weight, targets, **options):
    logprob, entropy = exact_head(hidden, weight, targets, **options)
    return logprob, entropy.detach() + 0 * entropy


class _Scaled(torch.autograd.Function):
    """The identity, with a gradient that `change` has been through."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def one_upstream_gradient_for_all(hidden, weight, targets, **options):
    logprob, entropy = exact_head(hidden, weight, targets, **options)
    return _Scaled.apply(logprob, lambda grad: grad[:1].expand_as(grad)), entropy


def temperature_missing_in_the_gradient(hidden, weight, targets, **options):
    temperature = options.get("temperature", 1.0)
    return exact_head(_Scaled.apply(hidden, lambda grad: grad * temperature), weight, targets, **options)


def softcap_missing_in_the_gradient(hidden, weight, targets, temperature=1.0, softcap=None, scale=1.0):
    capped = exact_head(hidden, weight, targets, temperature, softcap, scale)
    straight = exact_head(hidden, weight, targets, temperature, None, scale)
    return tuple(c.detach() + s - s.detach() for c, s in zip(capped, straight, strict=True))


def low_precision_gradient_accumulation(hidden, weight, targets, **options):
    """bf16 partial sums over tiles, nine times as large as what remains of them."""
    return exact_head(_Scaled.apply(hidden, lambda grad: (9 * grad).bfloat16() - 8 * grad), weight, targets, **options)


WRONG_HEADS = [
    low_precision_logits,
    low_precision_output,
    missing_last_block,
    phantom_columns,
    maximum_from_zero,
    logsumexp_before_subtracting,
    entropy_that_cancels,
    target_collapse,
    off_by_one_target,
    detached_entropy,
    one_upstream_gradient_for_all,
    temperature_missing_in_the_gradient,
    softcap_missing_in_the_gradient,
    low_precision_gradient_accumulation,
]


def _head_passes(operator, dtype) -> bool:
    try:
        for case in head_cases(dtype):
            check_head(operator, case)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG_HEADS, ids=lambda f: f.__name__)
def test_wrong_heads_are_rejected(wrong, dtype):
    assert not _head_passes(wrong, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_head_passes(dtype):
    assert _head_passes(exact_head, dtype)


# --- active_tiles: the ways in which a filter drops more than it says, or less than it could ------------------------


def tiles_by_threshold(weight_TR, drop_mass, block_rows):
    """Every tile below the limit goes, however many there are."""
    return _tiles_of(weight_TR, block_rows, lambda block_TR: block_TR.amax(1) > drop_mass)


def tiles_by_the_mean_row(weight_TR, drop_mass, block_rows):
    def keep(block_TR):
        mean_T, rank_T = block_TR.mean(1).sort()
        return torch.empty(len(mean_T), dtype=torch.bool).scatter(0, rank_T, mean_T.cumsum(0) > drop_mass)

    return _tiles_of(weight_TR, block_rows, keep)


def every_tile(weight_TR, drop_mass, block_rows):
    return _tiles_of(weight_TR, block_rows, lambda block_TR: torch.ones(len(block_TR), dtype=torch.bool))


def tiles_for_rows_in_another_order(weight_TR, drop_mass, block_rows):
    found = active_tiles(weight_TR, drop_mass, block_rows)
    return found._replace(order_R=torch.arange(weight_TR.shape[1]))


def tiles_that_trust_a_nan(weight_TR, drop_mass, block_rows):
    return active_tiles(weight_TR.nan_to_num(nan=0.0), drop_mass, block_rows)


def one_tile_too_few(weight_TR, drop_mass, block_rows):
    found = active_tiles(weight_TR, drop_mass, block_rows)
    return found._replace(counts_B=(found.counts_B - 1).clamp(min=0))


def _tiles_of(weight_TR, block_rows, keep) -> ActiveTiles:
    """Right but for `keep`, which says of a block's weights which tiles it takes."""
    T = len(weight_TR)
    order_R = active_tiles(weight_TR, 0.0, block_rows).order_R
    keep_BT = torch.stack([keep(block_TR) for block_TR in weight_TR[:, order_R].split(block_rows, 1)])
    return ActiveTiles(order_R, torch.where(keep_BT, torch.arange(T), T).sort(1).values, keep_BT.sum(1))


def _tiles_pass(operator) -> bool:
    try:
        for weight_TR in weight_cases().values():
            for drop_mass in (0.2, 1e-2):
                check_active_tiles(operator, weight_TR, drop_mass, 16)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    "wrong",
    [
        tiles_by_threshold,
        tiles_by_the_mean_row,
        every_tile,
        tiles_for_rows_in_another_order,
        tiles_that_trust_a_nan,
        one_tile_too_few,
    ],
    ids=lambda f: f.__name__,
)
def test_wrong_filters_are_rejected(wrong):
    assert not _tiles_pass(wrong)


def test_the_right_filter_passes():
    assert _tiles_pass(active_tiles)


# --- policy_loss ---------------------------------------------------------------------------------------------------


def _with(**changes):
    """The plain loss with a change to its arguments: name -> function of all of them."""

    def wrong(**kwargs):
        return plain_policy(**{**kwargs, **{name: change(kwargs) for name, change in changes.items()}})

    return wrong


def _with_kl(kl_of):
    return partial(plain_policy, kl_of=kl_of)


def kl_differentiated_as_it_stands(logp, ref_logp, weight, estimator):
    d = ref_logp - logp
    return weight.detach() * {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[estimator]


def _config(**fields):
    return lambda kwargs: replace(kwargs["config"], **{k: f(kwargs["config"]) for k, f in fields.items()})


WRONG_POLICIES = {
    "normaliser of the micro-batch": _with(
        normaliser=lambda k: Normaliser(len(k["logp_N"]), len(k["sequence_N"].unique()))
    ),
    "mask shifted by one": _with(advantage_N=lambda k: k["advantage_N"].roll(1)),
    "detached KL": _with(ref_logp_N=lambda k: k["ref_logp_N"] - k["logp_N"].detach() + k["logp_N"]),
    "KL differentiated as it stands": _with_kl(kl_differentiated_as_it_stands),
    "KL without the ratio": _with_kl(lambda logp, ref, weight, kl: plain_kl(logp, ref, torch.ones_like(logp), kl)),
    "KL with the ratio in its value alone": _with_kl(
        lambda logp, ref, weight, kl: (
            plain_kl(logp, ref, torch.ones_like(logp), kl) + plain_kl(logp, ref, weight - 1, kl).detach()
        )
    ),
    "one estimator for all": _with_kl(lambda logp, ref, weight, kl: plain_kl(logp, ref, weight, "k3")),
    "KL of the wrong direction": _with(ref_logp_N=lambda k: 2 * k["logp_N"] - k["ref_logp_N"]),
    "detached entropy": _with(entropy_N=lambda k: k["entropy_N"].detach() + 0 * k["entropy_N"]),
    "entropy with the wrong sign": _with(entropy_N=lambda k: -k["entropy_N"]),
    "clipped at the wrong side": _with(
        config=_config(clip_low=lambda c: min(c.clip_high, 1.0), clip_high=lambda c: c.clip_low)
    ),
    "no clipping": _with(config=_config(clip_low=lambda c: 1.0, clip_high=lambda c: 1e9)),
    "no dual clip": _with(config=_config(dual_clip=lambda c: None)),
    "token mean where sequences count": _with(config=_config(loss=lambda c: "dapo" if c.loss == "grpo" else c.loss)),
    "sequences where tokens count": _with(config=_config(loss=lambda c: "grpo" if c.loss == "dapo" else c.loss)),
    "token ratios for gspo": _with(config=_config(loss=lambda c: "grpo" if c.loss == "gspo" else c.loss)),
    "sampler weights with a gradient": _with(
        behaviour_logp_N=lambda k: k["behaviour_logp_N"] + k["logp_N"].detach() - k["logp_N"]
    ),
    "capped where masked": _with(config=_config(tis_mode=lambda c: "tis")),
    "token weights for sequences": _with(config=_config(tis_level=lambda c: "token")),
    "no sampler correction": _with(config=_config(tis_cap=lambda c: None)),
    "gradient through the old logprobs": _with(
        old_logp_N=lambda k: None if k["old_logp_N"] is None else k["old_logp_N"] + k["logp_N"] - k["logp_N"].detach()
    ),
}


def _policy_passes(operator) -> bool:
    try:
        for case in policy_cases():
            check_policy(operator, case)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", WRONG_POLICIES)
def test_wrong_policy_losses_are_rejected(name):
    assert not _policy_passes(WRONG_POLICIES[name])


def test_the_right_policy_loss_passes():
    assert _policy_passes(plain_policy)


# --- group_advantage -----------------------------------------------------------------------------------------------


def _changed(**changes):
    """The operator with a change to its inputs."""

    def wrong(**inputs):
        return group_advantage(**{**inputs, **{name: change(inputs) for name, change in changes.items()}})

    return wrong


def biased_std(*, config, group_B, **inputs):
    out = group_advantage(group_B=group_B, config=config, **inputs)
    n_B = (group_B[:, None] == group_B).sum(1)
    return out._replace(advantage_B=out.advantage_B * (n_B / (n_B - 1).clamp(min=1)).sqrt())


def variance_by_threshold(*, config, group_B, **inputs):
    """A std below a threshold in place of a comparison: a small difference is lost."""
    out = group_advantage(group_B=group_B, config=config, **inputs)
    groups = [out.reward_B[group_B == g].nan_to_num() for g in range(len(out.zero_variance_G))]
    flat_G = torch.stack([rewards.std(correction=0) < 0.2 for rewards in groups])
    return out._replace(zero_variance_G=flat_G, advantage_B=out.advantage_B.masked_fill(flat_G[group_B], 0.0))


def nan_as_zero(**inputs):
    return group_advantage(**{**inputs, "correct_B": inputs["correct_B"].nan_to_num()})


def empty_sets_agree(**inputs):
    out = group_advantage(**inputs)
    equal_B = (inputs["teacher_tools_B"] == inputs["student_tools_B"]).all(1).float()
    return out._replace(terms={**out.terms, "align": equal_B})


WRONG_ADVANTAGES = {
    "biased std": biased_std,
    "variance by threshold": variance_by_threshold,
    "an unscored rollout counts as wrong": nan_as_zero,
    "two empty sets agree": empty_sets_agree,
    "no gate for unfinished episodes": _changed(finished_B=lambda i: torch.ones_like(i["finished_B"])),
    "no gate for missing answers": _changed(answered_B=lambda i: torch.ones_like(i["answered_B"])),
    "the gates in the wrong order": _changed(
        finished_B=lambda i: i["finished_B"] | ~i["answered_B"], answered_B=lambda i: i["answered_B"] & i["finished_B"]
    ),
    "the sign bit is lost": _changed(
        teacher_tools_B=lambda i: i["teacher_tools_B"] & (2**63 - 1),
        student_tools_B=lambda i: i["student_tools_B"] & (2**63 - 1),
    ),
    "a subset is enough": _changed(teacher_tools_B=lambda i: i["teacher_tools_B"] & i["student_tools_B"]),
    "one group": _changed(group_B=lambda i: torch.zeros_like(i["group_B"])),
    "unknown calls are valid": _changed(invalid_calls_B=lambda i: torch.zeros_like(i["invalid_calls_B"])),
}


def _advantage_passes(operator) -> bool:
    try:
        for reward in ("mentor", "mentor_f1"):
            for seed in range(4):
                check_advantage(operator, random_episodes(seed), RewardConfig(reward, "grpo"))
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", WRONG_ADVANTAGES)
def test_wrong_advantages_are_rejected(name):
    assert not _advantage_passes(WRONG_ADVANTAGES[name])


def test_the_right_advantage_passes():
    assert _advantage_passes(group_advantage)
