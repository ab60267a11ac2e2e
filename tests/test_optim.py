"""The schedule by hand, and a guard that lets nothing non-finite through."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from lite_mentor.config import PRESETS
from lite_mentor.optim import Diverged, Guard, apply_gradients, blame, learning_rate, make_optimizer, unsound
from lite_mentor.types import Scored
from tests.test_batch import rollout


def test_learning_rate_by_hand():
    constant = [learning_rate(s, 10, peak=1.0, warmup=3, schedule="constant") for s in range(5)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = [learning_rate(s, 12, peak=1.0, warmup=2, schedule="cosine") for s in (2, 7, 12)]
    assert cosine == pytest.approx([1.0, 0.55, 0.1])


@pytest.mark.parametrize("on_cuda", [False, True])
def test_adamw_is_torchs_own_and_fused_on_a_gpu(monkeypatch, on_cuda):
    asked = {}
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **how: asked.update(how, parameters=parameters))
    parameter = SimpleNamespace(is_cuda=on_cuda)
    make_optimizer(iter([parameter]), dataclasses.replace(PRESETS["tiny"], lr=0.5, weight_decay=0.25))
    assert asked == dict(parameters=[parameter], lr=0.5, betas=(0.9, 0.99), weight_decay=0.25, fused=on_cuda)


def test_a_fused_update_is_that_of_the_loop():
    moved = []
    for fused in (False, True):
        parameter, optimizer = one_parameter(3.0)
        optimizer.param_groups[0]["fused"] = fused
        for _ in range(3):
            apply_gradients(optimizer, lr=0.1, max_norm=1.0)
            parameter.grad = torch.tensor([-2.0, 5.0])
        moved.append(parameter.detach())
    torch.testing.assert_close(*moved, rtol=1e-6, atol=0)


def one_parameter(gradient: float):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make_optimizer([parameter], PRESETS["tiny"])
    parameter.grad = torch.tensor([gradient, 0.0])
    return parameter, optimizer


def test_a_finite_gradient_is_clipped_and_applied():
    parameter, optimizer = one_parameter(30.0)
    update = apply_gradients(optimizer, lr=0.1, max_norm=1.0)
    assert (update.grad_norm, update.applied) == (30.0, True)
    assert parameter[0].item() == pytest.approx(0.9, abs=1e-6)  # Adam's first step has the size of the rate
    assert optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.1, 0.0])  # a tenth of a norm of 1
    assert parameter.grad is None


@pytest.mark.parametrize(("gradient", "allowed"), [(float("nan"), True), (float("inf"), True), (1.0, False)])
def test_a_refused_update_leaves_everything_as_it_was(gradient, allowed):
    parameter, optimizer = one_parameter(gradient)
    update = apply_gradients(optimizer, lr=0.1, max_norm=1.0, allowed=allowed)
    assert not update.applied
    assert parameter.tolist() == [1.0, 2.0]
    assert not optimizer.state[parameter]
    assert parameter.grad is None


def one(index: int, reward: float = 1.0, advantage: float = 0.5, logp: float = -1.0) -> Scored:
    r = rollout([1, 2], [(3, 1)], group=4, index=index)
    logp_T = torch.tensor([float("nan"), float("nan"), logp])  # before the first sampled token there is none
    return Scored(dataclasses.replace(r, behaviour_logp=logp_T), {}, reward, advantage)


def test_the_guard_keeps_the_rollouts_and_ends_the_run_at_the_third_in_a_row(tmp_path):
    said = []
    guard = Guard(tmp_path, said.append)
    guard.refused("step 4", [one(0)], "a test")
    guard.refused("step 5", [one(0)], "a test")
    guard.passed()
    guard.refused("step 6", [one(0)], "a test")
    guard.refused("step 7", [one(0)], "a test")
    with pytest.raises(Diverged, match="Three updates in a row were refused, the last at step 8: a test; the weights"):
        guard.refused("step 8", [one(0), one(7, reward=math.inf)], "a test")
    path = tmp_path / "refused-step-8.safetensors"
    assert said[-1] == f"the update of step 8 was not applied: a test; its rollouts are in {path}"
    with safe_open(path, "pt") as kept:
        assert kept.get_tensor("1.ids").tolist() == [1, 2, 3]
        assert kept.get_tensor("1.sampled").tolist() == [False, False, True]
        assert kept.get_tensor("1.behaviour_logp")[2] == -1
        assert kept.metadata()["why"] == "a test"
        assert json.loads(kept.metadata()["rollouts"])[1] == {
            "example_key": "4", "group": 4, "index": 7, "prompt_length": 2, "reward": math.inf, "advantage": 0.5
        }  # fmt: skip


def test_a_full_disk_does_not_hide_what_was_refused(tmp_path):
    said = []
    Guard(tmp_path / "gone", said.append).refused("step 4", [one(0)], "a test")
    assert said[0].startswith("the update of step 4 was not applied: a test; its rollouts could not be kept in ")
    assert "No such file" in said[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, ""),
        (dict(reward=math.nan), "the reward is not finite (nan) of example 4 (group 4, rollout 1)"),
        (dict(reward=math.inf, advantage=math.nan), "the reward is not finite (inf) of example 4 (group 4, rollout 1)"),
        (dict(logp=-math.inf), "the logprob under the sampler is not finite (-inf) of example 4 (group 4, rollout 1)"),
        (dict(advantage=math.nan), "the advantage is not finite (nan) of example 4 (group 4, rollout 1)"),
    ],
)
def test_what_an_update_starts_from_must_be_finite(changes, sentence):
    assert unsound([one(0), one(1, **changes), one(2)]) == sentence


def test_at_most_three_are_named():
    names = "example 4 (group 4, rollout 0), example 4 (group 4, rollout 1), example 4 (group 4, rollout 2) and 2 more"
    assert unsound([one(i, reward=math.inf) for i in range(5)]) == f"the reward is not finite (inf) of {names}"


def test_the_rollout_whose_loss_or_gradient_is_not_finite_is_found():
    weight = torch.nn.Parameter(torch.zeros(2))
    losses = {0: lambda: weight.sum(), 1: lambda: weight.sum() * math.nan, 2: lambda: weight.sqrt().sum()}
    whose = blame([one(0), one(1), one(2)], lambda s: losses[s.rollout.index](), [weight], PRESETS["tiny"])
    assert whose == "on its own it is that of example 4 (group 4, rollout 1), example 4 (group 4, rollout 2)"
    assert weight.grad is None
    whose = blame([one(0)], lambda s: weight.sum(), [weight], PRESETS["tiny"])
    assert whose == "no rollout alone does that, only all together"
