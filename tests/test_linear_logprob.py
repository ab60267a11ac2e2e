"""The fused head on the torch backend: against float64 on every trap, and its contract."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import check_head, exact_head, head_case, head_cases
from mentor_kernels import linear_logprob
from mentor_kernels.linear_logprob import TILINGS, Tiling, _forward_torch, _linear_logprob
from torch.utils._python_dispatch import TorchDispatchMode

MODULE = sys.modules["mentor_kernels.linear_logprob"]
TILE_ROWS, TILE_COLUMNS, _ = TILINGS["cpu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CASES = [(dtype, i) for dtype in DTYPES for i in range(len(head_cases(dtype)))]


@pytest.mark.parametrize(
    ("dtype", "i"), CASES, ids=[f"{str(d).removeprefix('torch.')}-{head_cases(d)[i].name}" for d, i in CASES]
)
def test_against_float64(dtype, i):
    check_head(linear_logprob, head_cases(dtype, TILE_COLUMNS)[i])


def test_by_hand():
    hidden = torch.tensor([[1.0], [2.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(3)]])  # row 0: p = 1/6, 2/6, 3/6; row 1: 1/14, 4/14, 9/14
    out = linear_logprob(hidden, weight, torch.tensor([2, 1]))
    assert out.logprob_N.tolist() == pytest.approx([math.log(3 / 6), math.log(4 / 14)], abs=1e-6)
    entropy = [-sum(p * math.log(p) for p in row) for row in ((1 / 6, 2 / 6, 3 / 6), (1 / 14, 4 / 14, 9 / 14))]
    assert out.entropy_N.tolist() == pytest.approx(entropy, abs=1e-6)
    (2 * out.logprob_N[0] - out.logprob_N[1]).backward()
    mean = (2 / 6 * math.log(2) + 3 / 6 * math.log(3), 4 / 14 * math.log(2) + 9 / 14 * math.log(3))
    expected = [2 * (math.log(3) - mean[0]), -(math.log(2) - mean[1])]
    assert hidden.grad[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_softcap_temperature_and_scale_by_hand():
    # z = 3 tanh(2 h w / 3) / 0.5 with h = 1.5 and w = 0, 1: z = 0, 6 tanh(1).
    out = linear_logprob(
        torch.tensor([[1.5]]), torch.tensor([[0.0], [1.0]]), torch.tensor([1]), temperature=0.5, softcap=3.0, scale=2.0
    )
    assert out.logprob_N.item() == pytest.approx(-math.log1p(math.exp(-6 * math.tanh(1.0))), abs=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_score_is_bitwise_the_same_with_and_without_gradient(dtype):
    case = head_case("", dtype, N=TILE_ROWS + 3, V=TILE_COLUMNS + 5)
    with_gradient = linear_logprob(case.hidden_NH.requires_grad_(), case.weight_VH, case.targets_N)
    with torch.no_grad():
        score = linear_logprob(case.hidden_NH, case.weight_VH, case.targets_N)
    assert with_gradient.logprob_N.requires_grad
    assert not score.logprob_N.requires_grad
    assert torch.equal(with_gradient.logprob_N, score.logprob_N)
    assert torch.equal(with_gradient.entropy_N, score.entropy_N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype):
    hidden = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    out = linear_logprob(hidden, torch.ones(5, 8, dtype=dtype), torch.zeros(0, dtype=torch.int64))
    assert out.logprob_N.shape == out.entropy_N.shape == (0,)
    (out.logprob_N.sum() + out.entropy_N.sum()).backward()
    assert hidden.grad.shape == (0, 8)


def test_a_vocabulary_of_one():
    hidden = torch.ones(2, 3, requires_grad=True)
    out = linear_logprob(hidden, torch.ones(1, 3), torch.zeros(2, dtype=torch.int64))
    assert out.logprob_N.tolist() == out.entropy_N.tolist() == [0.0, 0.0]
    (out.logprob_N.sum() + out.entropy_N.sum()).backward()
    assert hidden.grad.tolist() == [[0.0] * 3] * 2


def test_outputs_are_float32_and_the_gradient_has_the_dtype_of_hidden():
    case = head_case("", torch.bfloat16)
    out = linear_logprob(case.hidden_NH.requires_grad_(), case.weight_VH.requires_grad_(), case.targets_N)
    assert out.logprob_N.dtype == out.entropy_N.dtype == torch.float32
    out.logprob_N.sum().backward()
    assert case.hidden_NH.grad.dtype == torch.bfloat16
    assert case.weight_VH.grad is None  # the head is frozen, whatever its flag says


def test_the_entropy_costs_its_gradient_only_when_asked(monkeypatch):
    calls = []
    original = MODULE._entropy_backward
    monkeypatch.setattr(MODULE, "_entropy_backward", lambda *args: calls.append(1) or original(*args))
    case = head_case("", torch.float32)
    out = linear_logprob(case.hidden_NH.requires_grad_(), case.weight_VH, case.targets_N)
    out.logprob_N.sum().backward(retain_graph=True)
    assert calls == []
    out.entropy_N.sum().backward()
    assert calls == [1]


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_no_tensor_is_larger_than_a_tile():
    case = head_case("", torch.bfloat16, N=2 * TILE_ROWS + 5, V=2 * TILE_COLUMNS + 5)
    with _Largest() as largest:
        _forward_torch(case.hidden_NH, case.weight_VH, case.targets_N, 1.0, 5.0, 1.0, True)
    assert largest.elements == TILE_ROWS * TILE_COLUMNS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_the_logits(dtype):
    case = head_case("", dtype)
    hidden = case.hidden_NH.requires_grad_()

    def run():
        out = linear_logprob(hidden, case.weight_VH, case.targets_N)
        mixed = (out.logprob_N * case.grad_logprob_N + out.entropy_N * case.grad_entropy_N).sum()
        return *out, *torch.autograd.grad(mixed, hidden)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    assert all(torch.equal(a, b) for a, b in zip(inside, run(), strict=True))


def test_bf16_products_are_a_private_affair():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    case = head_case("", torch.bfloat16)
    linear_logprob(case.hidden_NH, case.weight_VH, case.targets_N)
    assert matmul.fp32_precision == before
    with MODULE.float32_sums(case.hidden_NH):
        assert matmul.fp32_precision == "bf16"
    with MODULE.float32_sums(case.hidden_NH.float()):
        assert matmul.fp32_precision == before


def test_gradcheck():
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, generator=make, requires_grad=True)
    weight = torch.randn(11, 3, dtype=torch.float64, generator=make)
    targets = torch.tensor([0, 10, 3, 3])
    options = dict(temperature=0.8, softcap=2.0, scale=1.7)
    assert torch.autograd.gradcheck(lambda h: tuple(linear_logprob(h, weight, targets, **options)), (hidden,))


def test_one_graph_under_compile():
    case = head_case("", torch.float32)

    def loss(hidden):
        out = linear_logprob(hidden, case.weight_VH, case.targets_N, temperature=0.7)
        return (out.logprob_N * case.grad_logprob_N + out.entropy_N * case.grad_entropy_N).sum()

    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        hidden = case.hidden_NH.detach().requires_grad_()
        value = run(hidden)
        value.backward()
        results.append((value.item(), hidden.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_its_promises(dtype, jacobian):
    case = head_case("", dtype, N=5, V=40)
    inputs = (case.hidden_NH.requires_grad_(jacobian), case.weight_VH, case.targets_N)
    torch.library.opcheck(_linear_logprob, (*inputs, 0.9, 3.0, 1.0, jacobian, 0.0, "torch"))


def _wrong_calls():
    hidden, weight, targets = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
    return {
        "target too large": ((hidden, weight, torch.tensor([0, 5])), {}, r"\[0, 5\)"),
        "target negative": ((hidden, weight, torch.tensor([-1, 0])), {}, r"\[0, 5\)"),
        "hidden sizes": ((hidden, torch.ones(5, 4), targets), {}, "H = 3"),
        "rows": ((hidden, weight, torch.tensor([0])), {}, "2 rows"),
        "shapes": ((hidden[None], weight, targets), {}, "shapes"),
        "targets shape": ((hidden, weight, targets[None]), {}, "shapes"),
        "empty vocabulary": ((hidden, weight[:0], targets), {}, "no rows"),
        "dtypes": ((hidden.bfloat16(), weight, targets), {}, "bfloat16"),
        "integer hidden": ((hidden.long(), weight.long(), targets), {}, "int64"),
        "targets dtype": ((hidden, weight, targets.float()), {}, "int64"),
        "devices": ((hidden, weight.to("meta"), targets), {}, "meta"),
        "temperature 0": ((hidden, weight, targets), {"temperature": 0.0}, "temperature"),
        "temperature NaN": ((hidden, weight, targets), {"temperature": math.nan}, "temperature"),
        "softcap": ((hidden, weight, targets), {"softcap": -1.0}, "softcap"),
        "backend": ((hidden, weight, targets), {"backend": "cuda"}, "backend"),
    }


@pytest.mark.parametrize("name", _wrong_calls())
def test_wrong_calls(name):
    args, options, match = _wrong_calls()[name]
    with pytest.raises(ValueError, match=match):
        linear_logprob(*args, **options)


@settings(max_examples=30)
@given(
    N=st.integers(1, 9),
    H=st.integers(1, 17),
    V=st.integers(1, 70),
    rows=st.integers(1, 4),
    columns=st.integers(1, 33),
    size=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_tiling(N, H, V, rows, columns, size, seed):
    case = head_case("", torch.float64, N=max(N, 3), H=H, V=V, size=size, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TILINGS, "cpu", Tiling(rows, columns, ()))
        out = linear_logprob(case.hidden_NH.requires_grad_(), case.weight_VH, case.targets_N)
        mixed = (out.logprob_N * case.grad_logprob_N + out.entropy_N * case.grad_entropy_N).sum()
        (found,) = torch.autograd.grad(mixed, case.hidden_NH)
    expected = exact_head(case.hidden_NH, case.weight_VH, case.targets_N)
    mixed = (expected[0] * case.grad_logprob_N + expected[1] * case.grad_entropy_N).sum()
    (wanted,) = torch.autograd.grad(mixed, case.hidden_NH)
    if V > 1:
        torch.testing.assert_close(out.logprob_N, expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(out.entropy_N, expected[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert bool((out.logprob_N <= 0).all())
    assert bool((out.entropy_N <= math.log(V) + 1e-12).all())


def test_probabilities_of_all_targets_sum_to_one():
    case = head_case("", torch.float32, V=50, size=5.0)
    targets = torch.arange(50)
    total = torch.stack(
        [linear_logprob(row.expand(50, -1), case.weight_VH, targets).logprob_N.exp().sum() for row in case.hidden_NH]
    )
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-5)
