"""The proof of a student: it computes in float32 without a second copy, and finds the faults that it is there for."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lite_mentor import proof
from lite_mentor.attention import PackedPlan
from lite_mentor.errors import UserError
from lite_mentor.load import load_student
from lite_mentor.norms import fuse_norms
from lite_mentor.paging import DecodePlan, PagePool, StepPlan
from lite_mentor.proof import attending_by, in_float32, prove

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

IDS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def student():
    return load_student("tiny", quant="none", dtype="bf16", lora_rank=4)


@torch.no_grad()
def own(student):
    with attending_by(student.base, "eager"):
        return student.base(input_ids=IDS, use_cache=False).logits


def tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("at_once", [0, 1 << 30])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_inside_a_bf16_model_computes_in_float32(monkeypatch, at_once, checkpointing, quant):
    monkeypatch.setattr(proof, "_AT_ONCE", at_once)
    how = dict(quant=quant, lora_rank=4, gradient_checkpointing=checkpointing)
    student = load_student("tiny", dtype="bf16", **how)
    before = [(t.data_ptr(), t.dtype, t.clone()) for t in tensors(student.base)]
    rounded = own(student)
    with student.reference(), in_float32(student.base):
        found = own(student)
    assert (rounded.dtype, found.dtype) == (torch.bfloat16, torch.float32)
    if quant == "none":  # quantised from bf16 and from float32, they are not the same weights
        wide = load_student("tiny", dtype="fp32", **how)
        for mine, its in zip(student.base.parameters(), wide.base.parameters(), strict=True):
            its.data.copy_(mine)
        torch.testing.assert_close(found, own(wide), atol=1e-4, rtol=0)
    with pytest.raises(IndexError), in_float32(student.base):
        student.base(input_ids=IDS + 1000, use_cache=False)
    for tensor, (address, dtype, content) in zip(tensors(student.base), before, strict=True):
        assert (tensor.data_ptr(), tensor.dtype) == (address, dtype)
        assert torch.equal(tensor, content)
    assert torch.equal(own(student), rounded)


def test_of_a_large_model_only_the_layer_that_runs_is_wide(monkeypatch, student):
    monkeypatch.setattr(proof, "_AT_ONCE", 0)
    wide = []

    def count(layer, *_):
        wide.append([other.mlp.up_proj.base_layer.weight.dtype is torch.float32 for other in layers])

    layers = student.base.model.layers
    with student.reference(), in_float32(student.base):
        for layer in layers:
            layer.mlp.register_forward_hook(count)
        own(student)
    assert wide == [[True, False, False], [False, True, False], [False, False, True]]


def test_norms_that_are_fused_keep_narrow_weights_and_are_proven_all_the_same(student):
    """As on CUDA; Gemma's take 1 + weight, a tensor of their own."""
    assert len(fuse_norms(student.base)) == 7
    norm = student.base.model.norm
    norm.forward = partial(norm.forward.func, **norm.forward.keywords | {"weight": norm.weight.detach().clone()})
    prove(student, 64)


def test_attention_is_ours_again_after_a_failure(student):
    inside = attending_by(student.base, "sdpa")
    inside.__enter__()
    assert student.config._attn_implementation == "sdpa"
    assert not inside.__exit__(KeyError, KeyError(), None)
    assert student.config._attn_implementation == "lite_mentor"
    student.rollout_hidden(IDS, torch.arange(20)[None], PackedPlan([0], [-1], 20))  # the plan is asked again


def test_a_proof_leaves_the_student_as_it_was(student):
    before = [(t.data_ptr(), t.clone()) for t in (*tensors(student.base), *tensors(student.rollout_model))]
    hidden = student.hidden(IDS, torch.arange(20)[None], PackedPlan([0], [-1], 20))
    prove(student, 64)
    after = [*tensors(student.base), *tensors(student.rollout_model)]
    assert all(a.data_ptr() == p and torch.equal(a, t) for a, (p, t) in zip(after, before, strict=True))
    assert torch.equal(student.hidden(IDS, torch.arange(20)[None], PackedPlan([0], [-1], 20)), hidden)
    hidden.float().sum().backward()
    assert all(p.grad is not None for p in student.trainable())


def one_layer_for_all(monkeypatch, student):
    write = PagePool.write
    monkeypatch.setattr(PagePool, "write", lambda self, layer, *rest: write(self, 0, *rest))


def no_prefix(monkeypatch, student):
    look = DecodePlan.look

    def without(self, *rest):
        self.rows.prefix = 0
        return look(self, *rest)

    monkeypatch.setattr(DecodePlan, "look", without)


def stale_positions(monkeypatch, student):
    """What is put between turns is read one position too late."""
    made = StepPlan.__init__

    def later(self, pool, prefix, spans, **rest):
        made(self, pool, prefix, spans, **rest)
        if spans[0].cached > 8:
            self.positions_T += 1

    monkeypatch.setattr(StepPlan, "__init__", later)


def no_ancestors(monkeypatch, student):
    made = PackedPlan.__init__

    def alone(self, starts, parents, *rest, **more):
        made(self, starts, [-1] * len(parents), *rest, **more)

    monkeypatch.setattr(PackedPlan, "__init__", alone)


def neighbours(monkeypatch, student):
    """The longest position of the forward scales every angle, as in dynamic NTK."""
    for model in {student.base, student.rollout_model}:
        rotary, forward = model.model.rotary_emb, model.model.rotary_emb.forward
        rotary.forward = lambda x, position_ids, forward=forward: forward(
            x, position_ids * (1.5 if position_ids.max() > 60 else 1.0)
        )


def head_scale(monkeypatch, student):
    student.logit_scale = 1.004


def head_bias(monkeypatch, student):
    bias = 0.05 * torch.randn(338, generator=torch.Generator().manual_seed(0))
    forward = student.base.lm_head.forward
    student.base.lm_head.forward = lambda x: forward(x) + bias


def coarse_twin(monkeypatch, student):
    for _, weight in student._rollout.layers:
        weight.copy_(weight.to(torch.float8_e4m3fn).to(weight.dtype))


def randomness(monkeypatch, student):
    mlp = student.base.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: torch.nn.functional.dropout(forward(x), 0.01)


@pytest.mark.parametrize(
    ("fault", "where"),
    [(one_layer_for_all, "decoding"), (no_prefix, "decoding"), (stale_positions, "decoding"),
     (no_ancestors, "training"), (neighbours, "training"), (head_scale, "training"), (head_bias, "decoding"),
     (randomness, "decoding"), (coarse_twin, "bfloat16")],
)  # fmt: skip
def test_a_fault_too_small_for_bf16_to_show_is_found(monkeypatch, student, fault, where):
    prove(student, 64)
    fault(monkeypatch, student)
    with pytest.raises(UserError, match=rf"does not reproduce \(in {where}, they differ by \d"):
        prove(student, 64)
