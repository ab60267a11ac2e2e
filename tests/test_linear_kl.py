"""The exact KL: float64 on both backends, its traps, and its place in the losses."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from kernel_checks import head_case, poisoned_memory, relative_rms
from mentor_kernels import Normaliser, PolicyLossConfig, linear_kl, linear_logprob, linear_policy_loss, policy_loss
from mentor_kernels.linear_kl import _linear_kl

OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.6),
    "softcap": dict(softcap=4.0, scale=1.5, temperature=1.3),
}


def plain_kl(hidden, ref_hidden, weight, temperature=1.0, softcap=None, scale=1.0):
    def log_p(x):
        z = scale * (x @ weight.T)
        return torch.log_softmax((z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature, -1)

    p, q = log_p(hidden), log_p(ref_hidden)
    return (p.exp() * (p - q)).sum(1)


def inputs(dtype, *, N=37, V=4133, H=24, away=0.3, size=2.0, seed=0):
    case = head_case("", dtype, N=N, V=V, H=H, size=size, seed=seed)
    noise = torch.randn(N, H, generator=torch.Generator().manual_seed(seed + 1))
    return case.hidden_NH, (case.hidden_NH.float() + away * noise).to(dtype), case.weight_VH, case.grad_logprob_N


def found_and_wanted(dtype, device, backend, options, **sizes):
    """KL and the gradient of a non-uniform mix of it: of the operator, and of the textbook in float64."""
    hidden, ref_hidden, weight, grad = inputs(dtype, **sizes)
    results = []
    for operator, place, kind in ((linear_kl, device, dtype), (plain_kl, "cpu", torch.float64)):
        leaf = hidden.to(place, kind).requires_grad_()
        how = dict(options, backend=backend) if operator is linear_kl else options
        with poisoned_memory():
            kl = operator(leaf, ref_hidden.to(place, kind), weight.to(place, kind), **how)
            (by_hidden,) = torch.autograd.grad((kl * grad.to(place, kl.dtype)).sum(), leaf)
        results.append((kl.detach().cpu().double(), by_hidden.cpu().double()))
    return results


def check(results, gradient_bound):
    (kl, by_hidden), (want_kl, want_by_hidden) = results
    assert float((kl - want_kl).abs().max()) <= 3e-6 * (1 + float(want_kl.max()))
    assert relative_rms(by_hidden, want_by_hidden) <= gradient_bound


@pytest.mark.parametrize("away", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_against_float64(dtype, options, away):
    bound = {torch.float64: 1e-9, torch.float32: 2e-4 if away == 0.01 else 1e-5}.get(dtype, 5e-3)
    check(found_and_wanted(dtype, "cpu", "torch", options, away=away), bound)


@pytest.mark.parametrize("away", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_against_float64(kernel_device, dtype, options, away):
    bound = (2e-4 if away == 0.01 else 1e-5) if dtype is torch.float32 else 5e-3
    check(found_and_wanted(dtype, kernel_device, "triton", options, away=away, V=515), bound)


@pytest.mark.gpu
@pytest.mark.parametrize("away", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kernels_in_bf16(options, away):
    check(found_and_wanted(torch.bfloat16, "cuda", "triton", options, away=away, V=4133), 5e-3)


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 300])
def test_kernels_with_any_vocabulary(kernel_device, V):
    hidden, ref_hidden, weight, _ = inputs(torch.float32, N=5, V=max(V, 3), H=70)
    kl = linear_kl(
        hidden.to(kernel_device), ref_hidden.to(kernel_device), weight[:V].to(kernel_device), backend="triton"
    )
    want = plain_kl(hidden.double(), ref_hidden.double(), weight[:V].double())
    torch.testing.assert_close(kl.cpu().double(), want, rtol=1e-5, atol=2e-6)


def test_by_hand():
    # p = (1/4, 3/4), q = (1/2, 1/2)
    weight = torch.tensor([[0.0], [1.0]])
    kl = linear_kl(torch.tensor([[math.log(3)]]), torch.tensor([[0.0]]), weight)
    assert kl.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_common_offset_changes_nothing(kernel_device, backend):
    """Whole logits offset by 2^20, which float32 holds exactly; each logsumexp alone would lose everything."""
    make = torch.Generator().manual_seed(0)
    hidden, ref_hidden = (torch.randint(-1, 2, (9, 24), generator=make).float() for _ in range(2))
    weight = torch.randint(-1, 2, (300, 24), generator=make).float()
    hidden[:, -1] = ref_hidden[:, -1] = weight[:, -1] = 0
    want = plain_kl(hidden.double(), ref_hidden.double(), weight.double())
    hidden[:, -1] = ref_hidden[:, -1] = weight[:, -1] = 1024
    kl = linear_kl(*(x.to(kernel_device) for x in (hidden, ref_hidden, weight)), backend=backend)
    torch.testing.assert_close(kl.cpu().double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_of_a_policy_with_itself(kernel_device, backend):
    hidden, _, weight, _ = (x.to(kernel_device) for x in inputs(torch.float32, V=300))
    leaf = hidden.clone().requires_grad_()
    kl = linear_kl(leaf, hidden, weight, backend=backend)
    kl.sum().backward()
    assert float(kl.abs().max()) <= 1e-6
    assert float(leaf.grad.abs().max()) <= 1e-6


def test_gradcheck():
    hidden, ref_hidden, weight, _ = inputs(torch.float64, N=4, V=11, H=3)
    options = dict(temperature=0.8, softcap=2.0, scale=1.7)
    assert torch.autograd.gradcheck(lambda h: linear_kl(h, ref_hidden, weight, **options), (hidden.requires_grad_(),))


@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operator_keeps_its_promises(kernel_device, backend, jacobian):
    hidden, ref_hidden, weight, _ = (x.to(kernel_device) for x in inputs(torch.float32, N=5, V=40))
    args = (hidden.requires_grad_(jacobian), ref_hidden, weight, 0.9, 3.0, 1.0, jacobian, backend)
    torch.library.opcheck(_linear_kl, args)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rows(kernel_device, backend):
    hidden = torch.zeros(0, 8, device=kernel_device, requires_grad=True)
    kl = linear_kl(hidden, hidden.detach(), torch.ones(5, 8, device=kernel_device), backend=backend)
    kl.sum().backward()
    assert kl.shape == (0,)
    assert hidden.grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(ref_hidden_NH=torch.zeros(4, 24)), "4 rows, but targets_N has 5|hidden_NH has 4"),
        (dict(ref_hidden_NH=torch.zeros(5, 23)), "H = 23"),
        (dict(ref_hidden_NH=torch.zeros(5, 24).half()), "must both be"),
        (dict(temperature=0.0), "temperature must be positive"),
    ],
)
def test_wrong_calls(change, match):
    hidden, ref_hidden, weight, _ = inputs(torch.float32, N=5, V=40)
    with pytest.raises(ValueError, match=match):
        linear_kl(**{**dict(hidden_NH=hidden, ref_hidden_NH=ref_hidden, weight_VH=weight), **change})


# --- in the losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dapo", "grpo", "gspo"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loss_with_the_exact_kl(kernel_device, backend, loss, monkeypatch):
    """linear_policy_loss, the three operators, and the textbook in float64: one loss, one gradient."""
    monkeypatch.setattr(sys.modules["mentor_kernels.linear_logprob"], "_chunk_rows", lambda V, element_size: 5)
    N = 12
    hidden, ref_hidden, weight, advantage = (x.to(kernel_device) for x in inputs(torch.float32, N=N, V=300))
    targets = torch.arange(N, device=kernel_device) * 7
    sequence = torch.arange(N, device=kernel_device) // 5
    advantage = advantage[sequence]
    config = PolicyLossConfig(loss=loss, kl="exact", beta=0.3, entropy_coef=0.05, tis_cap=None)
    rest = dict(sequence_N=sequence, config=config, normaliser=Normaliser(N, 3), backend=backend)

    leaf = hidden.clone().requires_grad_()
    fused = linear_policy_loss(
        leaf, weight, targets, old_logp_N=None, advantage_N=advantage, ref_hidden_NH=ref_hidden, **rest
    )
    (by_fused,) = torch.autograd.grad(fused.loss, leaf)
    logp, entropy = linear_logprob(leaf, weight, targets, backend=backend)
    kl = linear_kl(leaf, ref_hidden, weight, backend=backend)
    apart = policy_loss(logp, None, advantage, kl_N=kl, entropy_N=entropy, **rest)
    (by_apart,) = torch.autograd.grad(apart.loss, leaf)
    assert fused.loss.item() == pytest.approx(apart.loss.item(), rel=1e-6)
    metrics = {k: v.item() for k, v in apart.metrics.items()}
    assert {k: v.item() for k, v in fused.metrics.items()} == pytest.approx(metrics, rel=1e-6)
    assert relative_rms(by_fused, by_apart.double()) <= 1e-6

    exact = hidden.double().requires_grad_()
    log_p = torch.log_softmax(exact @ weight.double().T, -1)
    log_q = torch.log_softmax(ref_hidden.double() @ weight.double().T, -1)
    logp, p = log_p.gather(1, targets[:, None])[:, 0], log_p.exp()
    log_ratio = logp - logp.detach()
    if loss == "gspo":
        log_ratio = torch.stack([log_ratio[sequence == q].mean() for q in sequence.tolist()])
    terms = -log_ratio.exp() * advantage + 0.3 * (p * (log_p - log_q)).sum(1) + 0.05 * (p * log_p).sum(1)
    length = torch.stack([(sequence == q).sum() for q in sequence.tolist()])
    want = (terms / N if loss == "dapo" else terms / (3 * length)).sum()
    (by_want,) = torch.autograd.grad(want, exact)
    assert fused.loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert relative_rms(by_fused, by_want) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_exact_kl_needs_the_reference_in_the_right_form(kernel_device, backend):
    hidden, _, weight, advantage = (x.to(kernel_device) for x in inputs(torch.float32, N=6, V=40))
    none = torch.zeros(6, device=kernel_device)
    rest = dict(old_logp_N=None, advantage_N=advantage, sequence_N=none.long(), normaliser=Normaliser(6, 1),
                backend=backend)  # fmt: skip
    exact, k3 = PolicyLossConfig(kl="exact", beta=0.1), PolicyLossConfig(kl="k3", beta=0.1)
    with pytest.raises(ValueError, match="so ref_hidden_NH is needed"):
        linear_policy_loss(hidden, weight, none.long(), **rest, config=exact)
    with pytest.raises(ValueError, match="no use for ref_logp_N"):
        linear_policy_loss(hidden, weight, none.long(), **rest, ref_logp_N=none, config=PolicyLossConfig(kl="exact"))
    rest = {k: v for k, v in rest.items() if k not in ("old_logp_N", "advantage_N")}
    with pytest.raises(ValueError, match="so kl_N is needed"):
        policy_loss(none, None, advantage, **rest, config=exact)
    with pytest.raises(ValueError, match="no use for kl_N"):
        policy_loss(none, None, advantage, **rest, kl_N=none, ref_logp_N=none, config=k3)
