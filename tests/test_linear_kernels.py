"""The fused head's Triton kernels: float64 on every trap, whose bits depend on what, and the fused policy loss."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    HeadCase,
    check_head,
    exact_head,
    head_case,
    head_cases,
    poisoned_memory,
    policy_cases,
    relative_rms,
)
from mentor_kernels import Normaliser, PolicyLossConfig, linear_logprob, linear_policy_loss, policy_loss
from mentor_kernels.linear_logprob import STATISTICS_TILE, _forward_triton, _linear_logprob
from mentor_kernels.linear_policy_loss import _linear_policy_loss

MODULE = sys.modules["mentor_kernels.linear_logprob"]
triton_head = partial(linear_logprob, backend="triton")


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """The interpreter computes bf16 wrongly, and the operator refuses it there."""
    return (torch.float32, torch.float16) + ((torch.bfloat16,) if device == "cuda" else ())


CASES = [(dtype, i) for dtype in dtypes("cuda") for i in range(len(head_cases(dtype)))]


@pytest.mark.parametrize(
    ("dtype", "i"), CASES, ids=[f"{str(d).removeprefix('torch.')}-{head_cases(d)[i].name}" for d, i in CASES]
)
def test_kernels_against_float64(kernel_device, dtype, i):
    if dtype not in dtypes(kernel_device):
        with pytest.raises(ValueError, match="interpreter computes garbage from bfloat16"):
            check_head(triton_head, head_cases(dtype)[i])
        return
    check_head(triton_head, head_cases(dtype, STATISTICS_TILE)[i], kernel_device)


@pytest.mark.parametrize("H", [1, 63, 64, 128, 130])
def test_kernels_with_any_hidden_size(kernel_device, H):
    check_head(triton_head, head_case(f"H = {H}", torch.float32, H=H, V=300, N=9), kernel_device)


def gradients(case: HeadCase, device: str, rows=slice(None), operator=triton_head) -> tuple[torch.Tensor, ...]:
    """logprob, entropy, and the gradient of a mix of both, of the given rows as a batch of their own."""
    hidden = case.hidden_NH.to(device)[rows].requires_grad_()
    out = operator(hidden, case.weight_VH.to(device), case.targets_N.to(device)[rows], **case.options)
    mixed = out.logprob_N * case.grad_logprob_N.to(device)[rows] + out.entropy_N * case.grad_entropy_N.to(device)[rows]
    return out.logprob_N.detach(), out.entropy_N.detach(), torch.autograd.grad(mixed.sum(), hidden)[0]


def same_bits(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.float16, dict(softcap=5.0, temperature=0.7, scale=1.2))],
    ids=["plain", "softcap"],
)
def test_kernel_bits_depend_on_the_row_alone(kernel_device, dtype, options, monkeypatch):
    case = head_case("", dtype, N=300, V=515, H=40, seed=3, **options)
    whole = gradients(case, kernel_device)
    assert same_bits(gradients(case, kernel_device), whole)  # and not on the run
    parts = [slice(0, 128), slice(128, 300), slice(256, 300)]
    if kernel_device == "cuda":  # the interpreter's matmul rounds a row by its place in the block
        parts += [slice(7, 150), torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    for rows in parts:
        assert same_bits(gradients(case, kernel_device, rows), [x[rows] for x in whole])
    monkeypatch.setattr(MODULE, "_chunk_rows", lambda V, element_size: 128)
    assert same_bits(gradients(case, kernel_device), whole)
    with torch.no_grad():
        score = triton_head(*(x.to(kernel_device) for x in (case.hidden_NH, case.weight_VH, case.targets_N)), **options)
    assert same_bits(score, whole[:2])


def test_kernels_take_any_layout(kernel_device):
    case = head_case("", torch.float32, N=40, V=300, H=48)
    hidden, weight, targets = (x.to(kernel_device) for x in (case.hidden_NH, case.weight_VH, case.targets_N))
    want = triton_head(hidden, weight, targets)
    odd = [
        (hidden.repeat_interleave(2, 1)[:, ::2], weight, targets),
        (hidden.T.contiguous().T, weight.T.contiguous().T, targets),
        (hidden.repeat_interleave(2, 0)[::2], torch.cat([weight, weight], 1)[:, :48], targets),
        (hidden, weight, targets.repeat_interleave(3)[::3]),
        (torch.cat([hidden[:1], hidden])[1:], weight, torch.cat([targets[:1], targets])[1:]),
    ]
    for inputs in odd:
        leaf = inputs[0].detach().requires_grad_()
        assert same_bits(triton_head(leaf, *inputs[1:]), want)


def test_kernels_on_no_rows(kernel_device):
    hidden = torch.zeros(0, 8, device=kernel_device, requires_grad=True)
    out = triton_head(
        hidden, torch.ones(5, 8, device=kernel_device), torch.zeros(0, dtype=torch.int64).to(kernel_device)
    )
    assert out.logprob_N.shape == out.entropy_N.shape == (0,)
    (out.logprob_N.sum() + out.entropy_N.sum()).backward()
    assert hidden.grad.shape == (0, 8)


def test_kernels_on_a_vocabulary_of_one(kernel_device):
    hidden = torch.ones(2, 3, device=kernel_device, requires_grad=True)
    out = triton_head(
        hidden, torch.ones(1, 3, device=kernel_device), torch.zeros(2, dtype=torch.int64).to(kernel_device)
    )
    assert out.logprob_N.tolist() == out.entropy_N.tolist() == [0.0, 0.0]
    (out.logprob_N.sum() + out.entropy_N.sum()).backward()
    assert hidden.grad.tolist() == [[0.0] * 3] * 2


def test_not_a_number_stays_in_its_row(kernel_device):
    case = head_case("", torch.float32, N=70, V=300)
    want = gradients(case, kernel_device)
    sick = replace(case, hidden_NH=case.hidden_NH.clone())
    sick.hidden_NH[5, 3] = math.nan
    rest = torch.arange(70, device=kernel_device) != 5
    found = gradients(sick, kernel_device)
    assert all(bool(x[5].isnan().all()) for x in found)
    assert same_bits([x[rest] for x in found], [x[rest] for x in want])


def test_a_target_outside_the_vocabulary_is_not_a_number(kernel_device):
    """On a GPU nobody looks at the targets, so the kernels must not read outside the head for them."""
    case = head_case("", torch.float32, N=6, V=300)
    targets = case.targets_N.clone()
    targets[1], targets[4] = 300, -1
    inputs = [x.to(kernel_device) for x in (case.hidden_NH, case.weight_VH, targets)]
    logprob_N, entropy_N, _, jacobian_NH = _forward_triton(*inputs, 1.0, None, 1.0, True, 0.0)
    bad = torch.tensor([False, True, False, False, True, False], device=kernel_device)
    assert torch.equal(logprob_N.isnan(), bad)
    assert torch.equal(entropy_N.isnan(), bad)
    assert torch.equal(jacobian_NH.isnan().any(1), bad)
    if kernel_device == "cpu":
        with pytest.raises(ValueError, match=r"\[0, 300\)"):
            triton_head(*inputs)


def test_rows_without_a_coefficient_get_exactly_nothing(kernel_device):
    case = head_case("", torch.float32, N=300, V=300)
    keep = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.2
    keep[:130] = False  # more than a whole block
    sparse = replace(case, grad_logprob_N=torch.zeros(300), grad_entropy_N=case.grad_entropy_N * keep)
    whole = gradients(replace(case, grad_logprob_N=torch.zeros(300)), kernel_device)[2].cpu()
    found = gradients(sparse, kernel_device)[2].cpu()
    torch.testing.assert_close(found[keep], whole[keep], rtol=1e-5, atol=1e-7)
    assert not found[~keep].any()


@pytest.mark.parametrize("settings", [{}, dict(entropy_coef=0.1)])
def test_a_slope_that_is_nan_spoils_its_own_row_and_no_other(kernel_device, settings):
    """A GPU's maximum drops NaN: a row whose largest slope came from it would look as if it had none."""
    case = head_case("", torch.float32, N=200, V=300)
    advantage = torch.zeros(200)
    advantage[[3, 150]] = torch.tensor([torch.nan, 1.0])  # a block of rows with nothing but the NaN in it, and another
    hidden = case.hidden_NH.to(kernel_device).requires_grad_()
    out = linear_policy_loss(
        hidden, case.weight_VH.to(kernel_device), case.targets_N.to(kernel_device), old_logp_N=None,
        advantage_N=advantage.to(kernel_device), sequence_N=torch.arange(200, device=kernel_device),
        config=PolicyLossConfig(**settings), normaliser=Normaliser(200, 200), backend="triton",
    )  # fmt: skip
    out.loss.backward()
    bad = hidden.grad.isnan().any(1).nonzero()[:, 0].tolist()
    assert bad == [3]
    assert out.loss.isnan()
    assert hidden.grad[150].abs().sum() > 0


def test_float64_is_for_the_torch_backend(kernel_device):
    case = head_case("", torch.float64, N=4, V=9)
    with pytest.raises(ValueError, match="float64 needs backend='torch'"):
        triton_head(*(x.to(kernel_device) for x in (case.hidden_NH, case.weight_VH, case.targets_N)))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(3, 70),
    H=st.integers(1, 70),
    V=st.integers(2, 300),
    size=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 99),
    options=st.sampled_from([{}, dict(temperature=0.3), dict(softcap=3.0, scale=0.5)]),
)
def test_kernels_with_any_shape(kernel_device, N, H, V, size, seed, options):
    case = head_case(f"{N, H, V, size, seed, options}", torch.float32, N=N, H=H, V=V, size=size, seed=seed, **options)
    with poisoned_memory():
        found = [x.cpu() for x in gradients(case, kernel_device)]
    want = gradients(replace(case, hidden_NH=case.hidden_NH.double(), weight_VH=case.weight_VH.double()), "cpu",
                     operator=lambda *args, **kw: MODULE.LogprobOut(*exact_head(*args, **kw)))  # fmt: skip
    scale = 1 + float(want[0].abs().max())
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(found[1].double(), want[1], rtol=1e-5, atol=1e-6 * scale)
    # Its terms may cancel, and rounded logits are off by as much as they are large.
    size = (1 + float(case.weight_VH.abs().max())) * scale / options.get("temperature", 1.0)
    assert float((found[2] - want[2]).abs().max()) <= 1e-6 * size


@pytest.mark.parametrize("jacobian", [True, False])
def test_the_kernel_operator_keeps_its_promises(kernel_device, jacobian):
    case = head_case("", torch.float32, N=5, V=40)
    inputs = [x.to(kernel_device) for x in (case.hidden_NH, case.weight_VH, case.targets_N)]
    inputs[0].requires_grad_(jacobian)
    torch.library.opcheck(_linear_logprob, (*inputs, 0.9, 3.0, 1.0, jacobian, 0.0, "triton"))


# --- linear_policy_loss --------------------------------------------------------------------------------------------

POLICY_CASES = policy_cases()
LENGTHS = (30, 1, 70, 40, 20)


def both_losses(policy, device: str, dtype=torch.float32, advantage_of=None, lengths=LENGTHS, **how):
    """(fused, two operators) on the same inputs: loss, gradient by the hidden states, metrics."""
    vectors = {k: v if v is None else v.to(device) for k, v in replace(policy, lengths=lengths).vectors().items()}
    sequence_N = vectors.pop("sequence_N")
    vectors = {k: v if v is None else v.float() for k, v in vectors.items() if k not in ("logp_N", "entropy_N")}
    case = head_case("", dtype, N=sum(lengths), V=300, H=40, seed=policy.seed)
    weight, targets = case.weight_VH.to(device), case.targets_N.to(device)
    head = dict(temperature=0.8, softcap=how.pop("softcap", None), backend="triton")
    near = linear_logprob(case.hidden_NH.to(device), weight, targets, **head).logprob_N
    wide = 2e-3 if policy.config.loss == "gspo" else 0.4  # ratios near 1, some of them clipped
    for name in ("old_logp_N", "ref_logp_N", "behaviour_logp_N"):
        if vectors[name] is not None:
            vectors[name] = near + wide * torch.sin(vectors[name] * 100)
    if advantage_of:
        vectors["advantage_N"] = advantage_of(sequence_N)
    rest = dict(sequence_N=sequence_N, config=policy.config, normaliser=Normaliser(sum(lengths), len(lengths)))
    results = []
    for fused in (True, False):
        hidden = case.hidden_NH.to(device).requires_grad_()
        with poisoned_memory():
            if fused:
                out = linear_policy_loss(hidden, weight, targets, **vectors, **rest, **head)
            else:
                logp, entropy = linear_logprob(hidden, weight, targets, **head)
                out = policy_loss(logp, entropy_N=entropy, **vectors, **rest, backend="triton")
            (grad,) = torch.autograd.grad(3 * out.loss, hidden)
        results.append((out.loss.item(), grad, {k: v.item() for k, v in out.metrics.items()}))
    return results


# float16 goes the same way and differs in its rounding: a few cases.
FUSED_CASES = [(case, torch.float32) for case in POLICY_CASES] + [(case, torch.float16) for case in POLICY_CASES[::11]]


@pytest.mark.parametrize(("policy", "dtype"), FUSED_CASES, ids=[f"{c.name}-{d}" for c, d in FUSED_CASES])
def test_the_fused_loss_is_the_two_operators(kernel_device, policy, dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "_chunk_rows", lambda V, element_size: 64)  # cuts sequences
    (loss, grad, metrics), (want_loss, want_grad, want_metrics) = both_losses(policy, kernel_device, dtype)
    assert loss == want_loss
    assert metrics == want_metrics
    assert relative_rms(grad, want_grad.double()) <= (1e-6 if dtype is torch.float32 else 2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICY_CASES, ids=[case.name for case in POLICY_CASES])
def test_the_fused_loss_in_bf16(policy):
    (loss, grad, metrics), (want_loss, want_grad, want_metrics) = both_losses(policy, "cuda", torch.bfloat16)
    assert loss == want_loss
    assert metrics == want_metrics
    assert relative_rms(grad, want_grad.double()) <= 5e-3


def test_the_fused_loss_under_a_softcap(kernel_device):
    (loss, grad, _), (want_loss, want_grad, _) = both_losses(POLICY_CASES[6], kernel_device, softcap=2.0)
    assert loss == want_loss
    assert relative_rms(grad, want_grad.double()) <= 1e-6


def test_silent_rows_of_the_fused_loss_get_exactly_nothing(kernel_device):
    silent = partial(both_losses, POLICY_CASES[1], kernel_device, advantage_of=lambda q: (q == 6).float())
    (_, grad, _), (_, want, _) = silent()
    spoken = want.abs().amax(1) > 0
    assert 0 < int(spoken.sum()) <= 70
    assert torch.equal(grad.abs().amax(1) > 0, spoken)


def test_the_fused_loss_of_nothing(kernel_device):
    hidden = torch.zeros(0, 8, device=kernel_device, requires_grad=True)
    none = torch.zeros(0, device=kernel_device)
    out = linear_policy_loss(
        hidden, torch.ones(5, 8, device=kernel_device), none.long(), old_logp_N=None, advantage_N=none,
        sequence_N=none.long(), config=PolicyLossConfig(), normaliser=Normaliser(0, 0), backend="triton",
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0
    assert hidden.grad.shape == (0, 8)


def fused_inputs(device: str) -> dict:
    case = head_case("", torch.float32, N=6, V=40)
    return dict(
        hidden_NH=case.hidden_NH.to(device).requires_grad_(), weight_VH=case.weight_VH.to(device),
        targets_N=case.targets_N.to(device), old_logp_N=None, advantage_N=torch.linspace(-1, 1, 6, device=device),
        sequence_N=torch.tensor([0, 0, 0, 1, 1, 1], device=device), config=PolicyLossConfig(entropy_coef=0.1),
        normaliser=Normaliser(6, 2), backend="triton",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (dict(config=PolicyLossConfig(beta=0.1)), "ref_logp_N is needed"),
        (dict(advantage_N=torch.zeros(5)), r"advantage_N must be torch.float32 \(6,\)"),
        (dict(sequence_N=torch.zeros(6)), "sequence_N must be int64"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(hidden_NH=torch.zeros(6, 24, dtype=torch.float64)), "must both be"),
    ],
)
def test_wrong_fused_calls(kernel_device, changed, match):
    changed = {k: v.to(kernel_device) if isinstance(v, torch.Tensor) else v for k, v in changed.items()}
    with pytest.raises(ValueError, match=match):
        linear_policy_loss(**{**fused_inputs(kernel_device), **changed})


def test_the_fused_loss_compiles_into_one_graph(kernel_device):
    inputs = fused_inputs(kernel_device)
    hidden = inputs.pop("hidden_NH")

    def loss(hidden):
        return linear_policy_loss(hidden, **inputs).loss

    eager, compiled = loss(hidden), torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden)
    assert eager.item() == compiled.item()
    assert torch.equal(*(torch.autograd.grad(value, hidden)[0] for value in (eager, compiled)))


def test_the_fused_operator_keeps_its_promises(kernel_device):
    case = head_case("", torch.float32, N=6, V=40)
    inputs = [x.to(kernel_device) for x in (case.hidden_NH.requires_grad_(), case.weight_VH, case.targets_N)]
    vectors = [x.to(kernel_device) for x in (torch.linspace(-1, 1, 6), torch.tensor([0, 0, 0, 1, 1, 1]))]
    config = ("dapo", 0.2, 0.28, 3.0, 5.0, "k3", 0.0, 0.1, 2.0, "tis", "token", None)
    torch.library.opcheck(
        _linear_policy_loss,
        (*inputs, None, *vectors, None, None, None, None, None, 0.0, 0.9, None, 1.0, *config, 6, 2, 0.0, True),
    )
