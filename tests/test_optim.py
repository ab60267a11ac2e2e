"""The schedule by hand, and a guard that lets nothing non-finite through."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from lite_mentor.batch import pack
from lite_mentor.config import PRESETS
from lite_mentor.errors import UserError
from lite_mentor.optim import Guard, apply_gradients, learning_rate, make_optimizer
from tests.test_batch import rollout


def test_learning_rate_by_hand():
    constant = [learning_rate(s, 10, peak=1.0, warmup=3, schedule="constant") for s in range(5)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = [learning_rate(s, 12, peak=1.0, warmup=2, schedule="cosine") for s in (2, 7, 12)]
    assert cosine == pytest.approx([1.0, 0.55, 0.1])


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
    assert parameter.grad is None


@pytest.mark.parametrize(("gradient", "allowed"), [(float("nan"), True), (float("inf"), True), (1.0, False)])
def test_a_refused_update_leaves_everything_as_it_was(gradient, allowed):
    parameter, optimizer = one_parameter(gradient)
    update = apply_gradients(optimizer, lr=0.1, max_norm=1.0, allowed=allowed)
    assert not update.applied
    assert parameter.tolist() == [1.0, 2.0]
    assert not optimizer.state[parameter]
    assert parameter.grad is None


def test_the_guard_keeps_the_batch_and_ends_the_run_at_the_third_in_a_row(tmp_path):
    batches = pack([rollout([1, 2], [(3, 1)])], [1.0], 10)
    guard = Guard(tmp_path)
    guard.refused(4, batches, "a test")
    guard.refused(5, batches, "a test")
    guard.passed()
    guard.refused(6, batches, "a test")
    guard.refused(7, batches, "a test")
    with pytest.raises(UserError, match="Three updates in a row were refused, the last at step 8 because a test"):
        guard.refused(8, batches, "a test")
    kept = load_file(tmp_path / "refused-000008.safetensors")
    assert kept["0.ids_T"].tolist() == [1, 2]
    assert kept["0.targets_N"].tolist() == [3]
