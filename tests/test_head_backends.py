"""The torch backend as CUDA runs it, bf16 straight into cuBLAS; and which backend a card takes."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace

import conftest
import pytest
import torch
from kernel_checks import check_head, head_case, head_cases, poisoned_memory, relative_rms
from mentor_kernels import Normaliser, PolicyLossConfig, linear_kl, linear_logprob, linear_policy_loss, policy_loss
from mentor_kernels.backend import HEAD_BACKENDS, interpreter_problem, resolve_backend, resolve_head_backend
from mentor_kernels.linear_logprob import TILINGS
from test_linear_kl import OPTIONS, check, found_and_wanted, inputs, plain_kl

MODULE, KL = (sys.modules[f"mentor_kernels.{name}"] for name in ("linear_logprob", "linear_kl"))
torch_head = partial(linear_logprob, backend="torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [(dtype, i) for dtype in DTYPES for i in range(len(head_cases(dtype)))]


@pytest.fixture
def cublas_device(kernel_device, monkeypatch) -> str:
    """A GPU; or a CPU that goes through CUDA's tiles, with a stand-in for the product that only CUDA has."""

    def mm(left, right, *, out_dtype):
        assert (left.dtype, right.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        return left.float() @ right.float()

    if kernel_device == "cpu":
        monkeypatch.setitem(TILINGS, "cpu", TILINGS["cuda"])
        monkeypatch.setattr(torch, "mm", mm)
    return kernel_device


@pytest.mark.parametrize(
    ("dtype", "i"), CASES, ids=[f"{str(d).removeprefix('torch.')}-{head_cases(d)[i].name}" for d, i in CASES]
)
def test_against_float64(cublas_device, dtype, i):
    check_head(torch_head, head_cases(dtype, TILINGS["cuda"].columns)[i], cublas_device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_bf16_stays_narrow(cublas_device, dtype, monkeypatch):
    taken, product = set(), MODULE.product

    def watched(left, right, onto=None):
        found = product(left, right, onto)
        taken.add((left.dtype, right.dtype, found.dtype))
        return found

    monkeypatch.setattr(MODULE, "product", watched)
    check_head(torch_head, head_case("", dtype, V=300), cublas_device)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    operand = dtype if dtype is torch.bfloat16 else wide
    assert taken == {(operand, operand, wide)}


@pytest.mark.parametrize("options", [{}, dict(softcap=5.0)], ids=["plain", "softcap"])
def test_the_score_is_bitwise_the_same_with_and_without_gradient(cublas_device, options):
    case = head_case("", torch.bfloat16, N=1030, V=300)
    hidden, weight, targets = (x.to(cublas_device) for x in (case.hidden_NH, case.weight_VH, case.targets_N))
    found = torch_head(hidden.clone().requires_grad_(), weight, targets, **options)
    score = torch_head(hidden, weight, targets, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, score, strict=True))


def test_no_rows(cublas_device):
    hidden = torch.zeros(0, 8, dtype=torch.bfloat16, device=cublas_device, requires_grad=True)
    weight, targets = torch.ones(5, 8).to(hidden), torch.zeros(0, dtype=torch.int64, device=cublas_device)
    out = torch_head(hidden, weight, targets)
    (out.logprob_N.sum() + out.entropy_N.sum() + linear_kl(hidden, hidden, weight, backend="torch").sum()).backward()
    assert hidden.grad.shape == (0, 8)


def test_a_row_of_nan_stays_alone(cublas_device):
    case = head_case("", torch.bfloat16, N=5, V=300)
    case.hidden_NH[2] = torch.nan
    hidden = case.hidden_NH.to(cublas_device).requires_grad_()
    out = torch_head(hidden, case.weight_VH.to(cublas_device), case.targets_N.to(cublas_device))
    (out.logprob_N.sum() + out.entropy_N.sum()).backward()
    for found in (out.logprob_N, out.entropy_N, hidden.grad[:, 0]):
        assert found.isnan().tolist() == [False, False, True, False, False]


# A first tile (CUDA's) and a part of a second one; and a bound that bf16's own rounding, 2^-9, leaves some room under.
V = TILINGS["cuda"].columns + 37


@pytest.mark.parametrize("away", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_kl_against_float64(cublas_device, options, away):
    check(found_and_wanted(torch.bfloat16, cublas_device, "torch", options, away=away, V=V), 5e-3)


def kl_gradient_error(device: str) -> float:
    """Where all logits of the policy are 30 above the reference's: that changes neither the KL nor its gradient."""
    hidden, ref_hidden, weight, grad = inputs(torch.bfloat16, V=V, away=0.1)
    weight[:, -1], ref_hidden[:, -1] = 8.0, hidden[:, -1] - 30 / 8
    found = []
    for operator, place, dtype in (
        (partial(linear_kl, backend="torch"), device, torch.bfloat16), (plain_kl, "cpu", torch.float64)
    ):  # fmt: skip
        leaf = hidden.to(place, dtype).requires_grad_()
        with poisoned_memory():
            kl = operator(leaf, ref_hidden.to(place, dtype), weight.to(place, dtype))
            found.append(torch.autograd.grad((kl * grad.to(kl)).sum(), leaf)[0].cpu())
    return relative_rms(found[0], found[1])


def test_an_offset_of_all_logits_costs_the_kl_no_digits(cublas_device):
    assert kl_gradient_error(cublas_device) <= 5e-3


def test_checks_reject_unbalanced_and_uncentred_sums(cublas_device, monkeypatch):
    """What keeps rounding errors from multiplying an offset is needed: without it the same checks fail."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "mean", lambda d_RC, dim: d_RC.new_zeros(len(d_RC)))
        assert kl_gradient_error(cublas_device) > 5e-2
    monkeypatch.setattr(MODULE, "balanced", lambda hidden, softcap: False)
    offset = next(case for case in head_cases(torch.bfloat16) if case.name == "a common offset of 2^20")
    with pytest.raises(AssertionError, match="gradient of both off by"):
        check_head(torch_head, offset, cublas_device)


# --- which backend -------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Puts a card of this capability into the machine, and these measurements into the table."""

    def put(major: int, minor: int, measured: dict[tuple[int, int], str]) -> torch.device:
        found = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        monkeypatch.setattr(sys.modules["mentor_kernels.backend"], "HEAD_BACKENDS", measured)
        return torch.device("cuda")

    return put


def test_the_table_decides_for_its_cards_and_the_head_alone(card):
    cuda = card(9, 0, {(9, 0): "torch", (8, 0): "triton"})
    assert resolve_head_backend(None, cuda) == "torch"
    assert resolve_head_backend("triton", cuda) == "triton"
    assert resolve_backend(None, cuda) == "triton"
    assert [resolve_head_backend(None, card(*c, {(8, 0): "torch"})) for c in ((8, 0), (8, 6), (9, 0))] == [
        "torch", "triton", "triton"
    ]  # fmt: skip
    assert resolve_head_backend(None, torch.device("cpu")) == "torch"
    with pytest.raises(ValueError, match='must be "triton", "torch" or None'):
        resolve_head_backend("cublas", cuda)


def test_the_table_holds_backends():
    assert set(HEAD_BACKENDS.values()) <= {"torch", "triton"}


@pytest.mark.parametrize("exact", [True, False])
def test_the_loss_is_that_of_its_parts(cublas_device, exact):
    """linear_policy_loss where the head's backend is torch's."""
    hidden, ref_hidden, weight, advantage = (x.to(cublas_device) for x in inputs(torch.bfloat16, N=12, V=300))
    targets, sequence = torch.arange(12, device=cublas_device) * 7, torch.arange(12, device=cublas_device) // 5
    config = PolicyLossConfig(kl="exact" if exact else "k3", beta=0.3 * exact, entropy_coef=0.05, tis_cap=None)
    rest = dict(sequence_N=sequence, config=config, normaliser=Normaliser(12, 3), backend="torch")
    leaf = hidden.requires_grad_()
    whole = linear_policy_loss(
        leaf, weight, targets, old_logp_N=None, advantage_N=advantage, ref_hidden_NH=ref_hidden if exact else None,
        **rest,
    )  # fmt: skip
    logp, entropy = torch_head(leaf, weight, targets)
    kl = linear_kl(leaf, ref_hidden, weight, backend="torch") if exact else None
    parts = policy_loss(logp, None, advantage, kl_N=kl, entropy_N=entropy, **rest)
    torch.testing.assert_close(whole.loss, parts.loss)
    torch.testing.assert_close(*(torch.autograd.grad(out.loss, leaf)[0] for out in (whole, parts)))


@pytest.mark.gpu
def test_the_default_on_a_gpu_compiles_into_one_graph():
    case = head_case("", torch.bfloat16, V=300)
    hidden, weight, targets = (x.to("cuda") for x in (case.hidden_NH, case.weight_VH, case.targets_N))
    found = torch.compile(linear_logprob, backend="aot_eager", fullgraph=True)(hidden, weight, targets)
    assert torch.equal(found.logprob_N, linear_logprob(hidden, weight, targets).logprob_N)


@pytest.mark.parametrize(
    ("versions", "works"),
    [
        (("3.6.0", "2.3.5"), True), (("3.6.0", "2.4.0"), False), (("3.6.0+git1", "3.0.1"), False),
        (("3.7.1", "2.4.6"), True), (("3.10.0", "2.10.0"), True), (("3.6.0", "1.26.4"), True),
    ],
)  # fmt: skip
def test_an_interpreter_that_cannot_run_is_one_sentence(versions, works, monkeypatch):
    problem = interpreter_problem(*versions)
    assert (problem == "") == works
    if not works:
        assert "install triton 3.7, or numpy below 2.4" in problem
        monkeypatch.setattr(sys.modules["mentor_kernels.backend"], "INTERPRETER_PROBLEM", problem)
        with pytest.raises(ValueError, match=r"fails with NumPy 2\.4 and newer"):
            resolve_backend("triton", torch.device("cpu"))
        assert resolve_backend("torch", torch.device("cpu")) == "torch"


def test_pytest_ends_with_that_sentence(monkeypatch):
    monkeypatch.setattr(sys.modules["mentor_kernels.backend"], "INTERPRETER_PROBLEM", "it fails")
    with pytest.raises(pytest.UsageError, match=r"^it fails\.$"):
        conftest.pytest_configure()
