"""F.rms_norm takes the place of the norms that compute the same, and of no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lite_mentor.load import load_student
from lite_mentor.norms import fuse_norms
from lite_mentor.tiny import tiny_student
from tests.test_attention import MODELS

NORMS = {"llama": 2, "qwen2": 2, "qwen3": 4, "gemma2": 4, "gemma3_text": 6, "mistral": 2, "granite": 2, "olmo2": 4}
"""In a layer; there is one more behind the last. Gemma's and OLMo 2's also stand behind attention and MLP."""


def model_of(tmp_path, kind, dtype):
    """Three layers; its norms' weights are no longer all alike."""
    folder = tiny_student(tmp_path, architecture=kind, hidden_size=64, **MODELS.get(kind, {}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    make = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn(parameter.shape, generator=make).to(dtype) * 0.2)
    return model


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_it_is_the_same_norm(tmp_path, kind, dtype, device):
    """As near to float64 as the module's own forward is, and its gradient, too."""
    model = model_of(tmp_path, kind, dtype).to(device)
    own = dict(model.named_modules())
    names = fuse_norms(model)
    assert len(names) == 3 * NORMS[kind] + 1
    for name in names:
        module, fused = own[name], own[name].__dict__.pop("forward")
        H = len(module.weight)
        make = torch.Generator().manual_seed(1)
        x, dout = (torch.randn(40, H, generator=make).to(device, dtype) * size for size in (3, 1))

        def with_gradient(forward, x, dout=dout):
            x = x.detach().requires_grad_()
            out = forward(x)
            return out.detach().double(), torch.autograd.grad(out, x, dout.to(out.dtype))[0].double()

        weight = module.weight.double() + (1 if "gemma" in kind else 0)
        wanted = with_gradient(
            lambda x, w=weight, n=fused: nn.functional.rms_norm(x, w.shape, w, n.keywords["eps"]), x.double()
        )
        for want, theirs, ours in zip(wanted, with_gradient(module, x), with_gradient(fused, x), strict=True):
            assert (ours - want).norm() <= 2 * (theirs - want).norm() + 3e-7 * want.norm(), name


def test_other_norms_are_left_alone(tmp_path):
    assert fuse_norms(model_of(tmp_path, "cohere", torch.float32)) == []


class Own(nn.Module):
    """Root mean square, in ways of its own."""

    def __init__(self, eps, forward):
        super().__init__()
        self.weight, self.eps, self.how = nn.Parameter(torch.rand(32) + 0.5), eps, forward

    def forward(self, x):
        return self.how(x) * self.weight


def scaled(x, eps=1e-6):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("how", "same"),
    [
        (scaled, True),
        (lambda x: scaled(x, 1e-5), False),
        (lambda x: scaled(x - x.mean(-1, keepdim=True)), False),
        (lambda x: x / (x.norm(dim=-1, keepdim=True) / 32**0.5 + 1e-6), False),
        (lambda x: scaled(x) * 1.05, False),
    ],
    ids=["the same", "another epsilon", "about the mean", "epsilon outside the root", "a factor"],
)
def test_proof_decides(tmp_path, how, same, dtype):
    model = model_of(tmp_path, "cohere", dtype)
    model.model.norm = Own(1e-6, lambda x: how(x.float()).to(x.dtype)).to(dtype).requires_grad_(False)
    assert fuse_norms(model) == (["model.norm"] if same else [])
    assert ("forward" in model.model.norm.__dict__) == same


def test_on_a_cpu_a_student_keeps_its_own(tmp_path):
    """There F.rms_norm is no kernel, and in bf16 half as fast."""
    student = load_student(str(tiny_student(tmp_path)), quant="none", dtype="fp32")
    assert "forward" not in student.base.model.norm.__dict__


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", NORMS)
def test_on_a_gpu_all_of_them_are_replaced(tmp_path, kind, dtype):
    folder = tiny_student(tmp_path, architecture=kind, hidden_size=64, **MODELS.get(kind, {}))
    student = load_student(str(folder), quant="none", dtype=dtype, device="cuda")
    for model in (student.base, student.rollout_model):
        assert sum("forward" in m.__dict__ for n, m in model.named_modules() if "norm" in n) == 3 * NORMS[kind] + 1
