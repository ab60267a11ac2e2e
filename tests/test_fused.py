"""Layers of one input as one product: found in a run, equal to the layers one by one, and nothing of it stale."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from lite_mentor.attention import PackedPlan
from lite_mentor.fused import FusedLinear, SharedProduct, same_input
from lite_mentor.load import load_student
from lite_mentor.student import RolloutWeights, adapted_layers
from lite_mentor.tiny import tiny_student
from tests.test_attention import MODELS

IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(20)[None]
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]


@pytest.fixture(scope="module", params=MODELS)
def family(request, tmp_path_factory):
    """A random student of each family, with adapters that do something."""
    folder = tmp_path_factory.mktemp(request.param)
    options = dict(architecture=request.param) | MODELS[request.param]
    tiny_student(folder, hidden_size=64, num_hidden_layers=3, **options)
    torch.manual_seed(0)
    student = load_student(str(folder), quant="none", dtype="fp32", lora_rank=4)
    change(student)
    return student


def change(student) -> None:
    for parameter in student.trainable():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    student.refresh_rollout_weights()


def groups_of(student) -> list[list[str]]:
    found: dict[object, list[str]] = {}
    for name, layer in student.rollout_model.named_modules():
        if isinstance(layer, FusedLinear):
            found.setdefault(id(layer._product), []).append(name.rpartition(".")[2])
    return list(found.values())


def one_by_one(student) -> RolloutWeights:
    """The same twin without fused layers."""
    alone = RolloutWeights(student.base, [[name] for name, _ in adapted_layers(student.base)])
    alone.refresh()
    return alone


def rollout(student) -> torch.Tensor:
    with torch.inference_mode():
        return student.rollout_hidden(IDS, POSITIONS, PackedPlan([0], [-1], 20))


def test_the_products_of_every_family_are_those_of_its_layers(family, monkeypatch):
    assert groups_of(family) == [ATTENTION, MLP] * 3
    alone = one_by_one(family)
    fused = rollout(family)
    monkeypatch.setattr(family, "_rollout", alone)
    torch.testing.assert_close(fused, rollout(family), atol=1e-5, rtol=1e-5)


def test_new_adapters_reach_the_fused_layers_where_they_are(family):
    before, places = rollout(family), [weight.data_ptr() for _, weight in family._rollout.layers]
    change(family)
    after = rollout(family)
    assert not torch.allclose(before, after, atol=1e-3)
    assert [weight.data_ptr() for _, weight in family._rollout.layers] == places
    assert torch.equal(rollout(family), after)
    q, *_ = (m for m in family.rollout_model.modules() if isinstance(m, FusedLinear))
    assert q.weight.data_ptr() == q._product.weight_OH.data_ptr()


def product(bias: bool = True) -> tuple[SharedProduct, list[FusedLinear], list[nn.Linear]]:
    torch.manual_seed(0)
    layers = [nn.Linear(8, n, bias=bias) for n in (6, 2, 4)]
    weight = torch.cat([layer.weight.detach() for layer in layers])
    shared = SharedProduct(weight, torch.cat([layer.bias.detach() for layer in layers]) if bias else None, [6, 2, 4])
    return shared, [FusedLinear(shared, i) for i in range(3)], layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1], [1, 2, 0], [0, 0, 1, 1, 2], [2], [0, 1]], ids=str)
def test_in_whatever_order_layers_are_called_they_give_what_they_should(bias, order):
    _, fused, layers = product(bias)
    for x in torch.randn(3, 1, 5, 8):
        for i in order:
            torch.testing.assert_close(fused[i](x), layers[i](x))
    for i in (0, 1, 2):  # whatever was left from before
        other = torch.randn(1, 5, 8)
        torch.testing.assert_close(fused[i](other), layers[i](other))


def test_nothing_is_kept_once_all_have_taken_theirs():
    shared, fused, _ = product()
    x = torch.randn(1, 5, 8)
    for layer in fused:
        assert layer(x).shape[-1] == layer.out_features
    kept = weakref.ref(x)
    del x
    gc.collect()
    assert kept() is None
    assert not shared._left


class Parent(nn.Module):
    """Layers a and b of one tensor, c of an equal one, d of the same changed in between, e twice, f under a child."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.never = (nn.Linear(4, 4) for _ in range(6))
        self.child = nn.ModuleDict({"f": nn.Linear(4, 4)})

    def forward(self, x):
        out = self.a(x) + self.b(x) + self.c(x.clone()) + self.e(x) + self.e(x) + self.child["f"](x)
        return out + self.d(x.add_(1))


def test_only_layers_that_were_seen_to_read_one_tensor_are_together():
    parent = Parent()
    layers = {name: layer for name, layer in parent.named_modules() if isinstance(layer, nn.Linear)}
    found = same_input(layers, lambda: parent(torch.randn(2, 4)))
    assert sorted(found) == [["a", "b"], ["c"], ["child.f"], ["d"], ["e"], ["never"]]
    assert not any(layer._forward_pre_hooks for layer in layers.values())
