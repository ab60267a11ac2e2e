"""Our LoRA is as near to float64 as PEFT's own, outputs and gradients; what is wrong is found by the same check."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

from lite_mentor import lora
from lite_mentor.attention import PackedPlan
from lite_mentor.load import load_student
from lite_mentor.student import adapted_layers
from lite_mentor.tiny import tiny_student
from tests.test_attention import MODELS, PARENTS, STARTS, TOKENS, packed_row

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

FAMILIES = [*MODELS, "olmo2"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TINY = 1e-6
"""Of the norm: norms and positions of transformers are float32 in the float64 model, too."""


def student_of(tmp_path, kind="llama", quant="none", dtype="fp32", device="cpu", **options):
    """Its adapters no longer zero, with a scaling that is no power of two."""
    config = dict(architecture=kind) | MODELS.get(kind, {})
    folder = tiny_student(tmp_path / "student", num_hidden_layers=3, hidden_size=64, **config)
    how = dict(lora_rank=4, lora_alpha=6) | options
    student = load_student(str(folder), quant=quant, dtype=dtype, device=device, **how)
    move(student)
    return student


@torch.no_grad()
def move(student, seed=0):
    """The adapters somewhere else, by in-place writes that only a look at them can find."""
    make = torch.Generator().manual_seed(seed)
    for parameter in student.trainable():
        parameter.data.copy_(torch.randn(parameter.shape, generator=make) * 0.1)


class Exact(nn.Module):
    """The formula."""

    def __init__(self, layer):
        super().__init__()
        base = layer.get_base_layer()
        self.weight, self.bias = lora.dequantised(base).detach().double(), base.bias
        self.down, self.up = (getattr(layer, f"lora_{x}")["default"].weight for x in "AB")
        self.scaling = layer.scaling["default"]

    def forward(self, x):
        low = self.scaling * x @ self.down.to(x.dtype).T
        out = x @ self.weight.T + low @ self.up.to(x.dtype).T
        return out if self.bias is None else out + self.bias


def exact(student):
    """The student in float64."""
    model = copy.deepcopy(student.base)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    for name, layer in adapted_layers(model):
        model.set_submodule(name, Exact(layer))
    model = model.double()
    return model, [p for name, p in model.named_parameters() if name.endswith((".down", ".up"))]


@contextmanager
def by_peft(student):
    """PEFT's own forward, under the autocast that it needs for bf16."""
    layers = [layer for _, layer in adapted_layers(student.base)]
    ours = [layer.__dict__.pop("forward") for layer in layers]
    assert all(forward.func.__name__ == "forward" for forward in ours)
    with torch.autocast(student.device.type, torch.bfloat16, enabled=student.dtype is torch.bfloat16):
        yield
    for layer, forward in zip(layers, ours, strict=True):
        layer.forward = forward


def rows(device):
    """Two, to accumulate gradients: ids, positions, plan."""
    ids_T, positions_T, _ = packed_row()
    forest, sequence = PackedPlan(STARTS, PARENTS, TOKENS, device), PackedPlan([0], [-1], 9, device)
    found = [(ids_T, positions_T, forest), (ids_T.flip(0)[:9], torch.arange(9), sequence)]
    return [(ids_T[None].to(device), positions_T[None].to(device), plan) for ids_T, positions_T, plan in found]


def results(parameters, hidden) -> list[torch.Tensor]:
    """Hidden states of both rows, and the gradients of all parameters, in float64."""
    for parameter in parameters:
        parameter.grad = None
    outs = []
    for row in rows(parameters[0].device):
        hidden_TH = hidden(*row)
        weight_TH = torch.randn(hidden_TH.shape, generator=torch.Generator().manual_seed(4)).to(hidden_TH.device)
        (hidden_TH * weight_TH).sum().backward()
        outs.append(hidden_TH.detach())
    return [x.double() for x in [*outs, *(p.grad for p in parameters)]]


def of_exact(student):
    model, parameters = exact(student)

    def hidden(ids, positions, plan):
        return model.base_model(input_ids=ids, position_ids=positions, plan=plan, use_cache=False).last_hidden_state[0]

    return results(parameters, hidden)


def check(student) -> list[torch.Tensor]:
    """Ours, if it is as near to float64 as PEFT's."""
    wanted, found = of_exact(student), results(student.trainable(), student.hidden)
    with by_peft(student):
        theirs = results(student.trainable(), student.hidden)
    assert len(wanted) == len(found) == 2 + len(student.trainable())
    for i, (want, got, peft) in enumerate(zip(wanted, found, theirs, strict=True)):
        limit = 2 * (peft - want).norm() + TINY * want.norm()
        assert want.norm() > 0
        assert (got - want).norm() <= limit, f"result {i}: {(got - want).norm():.3g} over {limit:.3g}"
    return found


def groups(student):
    return list(dict.fromkeys(layer.forward.func.__self__ for _, layer in adapted_layers(student.base)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_as_exact_as_pefts_own(tmp_path, kind, dtype, device):
    student = student_of(tmp_path, kind, dtype=dtype, device=device)
    plain = check(student)
    student.base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for kept, recomputed in zip(plain, check(student), strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # qwen2 has biases
def test_over_four_bit_weights(tmp_path, kind, dtype, device):
    check(student_of(tmp_path, kind, "nf4", dtype, device, gradient_checkpointing=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_without_adapters_it_is_the_base_to_the_bit(tmp_path, kind):
    """The base never needed autocast."""
    student = student_of(tmp_path, kind, dtype="bf16")
    found = []
    for row in rows("cpu"):
        with student.reference():
            ours = student.hidden(*row)
            with by_peft(student):
                found.append(torch.equal(ours, student.hidden(*row)))
        assert not torch.equal(ours, student.hidden(*row))
    assert found == [True, True]


# When adapters change


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, partial(torch.optim.AdamW, fused=True), partial(AdamW8bit, min_8bit_size=0)],
    ids=["AdamW", "fused", "8 bits"],
)
def test_no_copy_is_older_than_the_adapters(tmp_path, dtype, optimizer):
    """Of these optimizers only the first one tells a tensor that it was written to."""
    student = student_of(tmp_path, dtype=dtype)
    step = optimizer(student.trainable(), lr=0.05).step
    for _ in range(2):
        before = results(student.trainable(), student.hidden)[0]
        step()
        assert not torch.allclose(check(student)[0], before, rtol=0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loaded_adapters_are_used_at_once(tmp_path, dtype):
    student = student_of(tmp_path, dtype=dtype, rollout_weights="unmerged")
    state = {name: tensor * 2 for name, tensor in student.adapter_state().items()}
    student.load_adapter_state(state)
    with torch.inference_mode():
        sampled = student.rollout_hidden(*rows("cpu")[0])
        student.refresh_rollout_weights()
    check(student)
    assert torch.equal(sampled, student.hidden(*rows("cpu")[0]))


def test_a_change_before_the_backward_is_refused(tmp_path):
    student = student_of(tmp_path)
    hidden_TH = student.hidden(*rows("cpu")[0])
    with torch.no_grad():
        student.trainable()[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden_TH.sum().backward()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_forwards_may_come_before_their_backward(tmp_path, dtype):
    student = student_of(tmp_path, dtype=dtype)
    kept = [student.hidden(*row).float().square().sum() for row in rows("cpu")]
    sum(kept).backward()
    found = [p.grad for p in student.trainable()]
    again = [torch.autograd.grad(student.hidden(*r).float().square().sum(), student.trainable()) for r in rows("cpu")]
    for both, one, other in zip(found, *again, strict=True):
        torch.testing.assert_close(both, one + other, rtol=1e-5, atol=1e-5)


# Who shares an input


@pytest.mark.parametrize("kind", ["llama", "cohere"])
def test_layers_with_one_input_are_found(tmp_path, kind):
    """Cohere's attention and MLP read the same tensor, but a group stays within one parent."""
    student = student_of(tmp_path, kind)
    assert sorted(len(group.layers) for group in groups(student)) == sorted([3, 1, 2, 1] * 3)


@pytest.mark.parametrize("calls", ["qkv", "vkq", "qqkv", "qKvk", "KqkVvQ"])
def test_any_order_of_any_inputs(tmp_path, calls):
    """Capitals are given another input."""
    student = student_of(tmp_path)
    student.refresh_rollout_weights()
    attention = student.base.model.layers[0].self_attn
    layers = {name: getattr(attention, f"{name}_proj") for name in "qkv"}
    formula = {name: Exact(layer) for name, layer in layers.items()}
    x, y = torch.randn(2, 1, 6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    outs, exact = [], []
    for name in calls:
        given = x if name.islower() else y
        outs.append(layers[name.lower()](given))
        exact.append(formula[name.lower()](given.double()))
    for out, want in zip(outs, exact, strict=True):
        torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)
    found, wanted = (
        torch.autograd.grad(sum((o * (i + 1)).sum() for i, o in enumerate(out)), [x, *parameters])
        for out in (outs, exact)
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_activation_outlives_its_use(tmp_path, checkpointing):
    student = student_of(tmp_path, gradient_checkpointing=checkpointing)
    loss = student.hidden(*rows("cpu")[0]).sum()
    assert not any(group._waiting for group in groups(student))
    loss.backward()
    del loss
    assert not any(group._waiting for group in groups(student))
    assert all(group._input() is None for group in groups(student))


# What is wrong is found


Lora = lora._Lora


class ScaledTwice(Lora):
    @staticmethod
    def backward(ctx, *douts):
        nothing, dx, *adapters = Lora.backward(ctx, *douts)
        return nothing, dx, *(d * ctx.group.scaling for d in adapters)


class AroundTheAdapters(Lora):
    @staticmethod
    def backward(ctx, *douts):
        nothing, dx, *adapters = Lora.backward(ctx, *douts)
        through = sum(d @ lora.dequantised(base) for d, base in zip(douts, ctx.group.bases, strict=True))
        return nothing, None if dx is None else through.view_as(dx), *adapters


def stale(student):
    student._lora.refresh = lambda: None
    move(student, seed=1)


def without_scaling(student):
    for group in groups(student):
        group.scaling = 1.0


def neighbours(kind):
    def spoil(student):
        copies, originals = student._lora._copies, student._lora._originals
        for group in groups(student):
            if len(group.layers) == 3:  # k and v have the same shapes
                k, v = (group.downs[i].data_ptr() if kind == "A" else group.masters[i].data_ptr() for i in (1, 2))
                places = {o.data_ptr(): i for i, o in enumerate(originals)}
                i, j = places[k], places[v]
                copies[i], copies[j] = copies[j], copies[i]

    return spoil


WRONG = {"stale copies": stale, "scaling forgotten": without_scaling, "the neighbour's A": neighbours("A")}
WRONG |= {"the neighbour's B": neighbours("B"), "gradients scaled twice": ScaledTwice,
          "x's gradient around the adapters": AroundTheAdapters}  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_check_finds(tmp_path, monkeypatch, wrong, dtype):
    student = student_of(tmp_path, dtype=dtype)
    check(student)
    if isinstance(WRONG[wrong], type):
        monkeypatch.setattr(lora, "_Lora", WRONG[wrong])
    elif dtype == "fp32" and wrong == "the neighbour's B":
        return  # a float32 student has no copies of B
    else:
        WRONG[wrong](student)
    with pytest.raises(AssertionError, match="over"):
        check(student)
