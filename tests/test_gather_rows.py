"""Gathered rows: the gradient against float64 on both backends, the same bits from both, and wrong twins."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import poisoned_memory
from mentor_kernels import RowCopies, gather_rows


@dataclass(frozen=True)
class Case:
    name: str
    source_TGD: torch.Tensor
    index_K: torch.Tensor
    repeats: int = 1


def case(name: str, index: list[int], T: int, G: int = 1, D: int = 5, repeats: int = 1, seed: int = 0) -> Case:
    make = torch.Generator().manual_seed(seed)
    return Case(name, torch.randn(T, G, D, generator=make), torch.tensor(index, dtype=torch.int64), repeats)


CASES = [
    case("each row once", [2, 0, 1], 3),
    case("a row that many share, and some that nobody takes", [1, 4, 1, 1, 6, 4, 1], 9, D=33),
    case("the first and the last row", [0, 7, 7, 0, 0], 8),
    case("heads that repeat", [0, 1, 2, 0, 1, 3], 5, G=2, D=8, repeats=3),
    case("one KV head of many", [0, 0, 1], 2, D=16, repeats=7),
    case("more columns than a block", [0, 2, 2, 0, 2], 3, G=3, D=400, repeats=2),
    case("exactly a block", [1, 1], 2, D=1024),
    case("one copy", [0], 1, D=1),
    case("a path of a path", [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5], 6, G=2, D=3, repeats=2),
]


def upstream(case: Case) -> torch.Tensor:
    """A gradient of the result that is uniform nowhere, with numbers whose float16 sums lose digits."""
    K, (_, G, D) = len(case.index_K), case.source_TGD.shape
    make = torch.Generator().manual_seed(1)
    return torch.randn(K, G * case.repeats, D, generator=make) * 10 ** torch.randn(K, 1, 1, generator=make)


def exact(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Result, gradient, and the sum of its terms' sizes, in float64, one row of the definition after the other."""
    (T, G, D), r = case.source_TGD.shape, case.repeats
    source, grad = case.source_TGD.to(dtype).double(), upstream(case).to(dtype).double()
    out = torch.zeros(len(case.index_K), G * r, D).double()
    by_source, sizes = torch.zeros(2, T, G, D).double()
    for k, t in enumerate(case.index_K.tolist()):
        for e in range(G * r):
            out[k, e] = source[t, e // r]
            by_source[t, e // r] += grad[k, e]
            sizes[t, e // r] += grad[k, e].abs()
    return out, by_source, sizes


def check(operator, case: Case, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """`operator(source, copies, repeats=)` against float64; returns its gradient."""
    leaf = case.source_TGD.to(device, dtype).requires_grad_()
    copies = RowCopies.of(case.index_K, len(leaf), device)
    with poisoned_memory():
        out = operator(leaf, copies, repeats=case.repeats)
        (found,) = torch.autograd.grad(out, leaf, upstream(case).to(device, dtype))
    wanted_out, wanted, sizes = exact(case, dtype)
    assert torch.equal(out.detach().cpu().double(), wanted_out), case.name
    # The sum is rounded once; on the way there, float32 (in float64: itself) rounds each of a dozen terms at most.
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = wanted.abs() * torch.finfo(dtype).eps / 2 + 12 * wide * sizes
    assert found.dtype is dtype
    assert bool(((found.cpu().double() - wanted).abs() <= bound).all()), case.name
    return found.cpu()


def ours(backend: str):
    return lambda source, copies, **how: gather_rows(source, copies, backend=backend, **how)


@pytest.mark.parametrize("each", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(each, dtype):
    check(ours("torch"), each, dtype)


@pytest.mark.parametrize("each", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_has_the_bits_of_the_torch_backend(kernel_device, each, dtype):
    found = check(ours("triton"), each, dtype, kernel_device)
    assert torch.equal(found, check(ours("torch"), each, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("each", CASES, ids=lambda c: c.name)
def test_the_kernel_in_bf16(each):
    found = check(ours("triton"), each, torch.bfloat16, "cuda")
    assert torch.equal(found, check(ours("torch"), each, torch.bfloat16))


@settings(max_examples=20)
@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=20), st.integers(1, 3), st.integers(0, 1000))
def test_any_index(T, index, repeats, seed):
    each = case("any", [i % T for i in index], T, G=2, D=3, repeats=repeats, seed=seed)
    check(ours("torch"), each, torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("T", "K", "G", "D"), [(3, 0, 2, 4), (0, 0, 2, 4), (3, 2, 0, 4), (3, 2, 2, 0)])
def test_nothing_to_do(kernel_device, backend, T, K, G, D):
    source = torch.randn(T, G, D, device=kernel_device, requires_grad=True)
    copies = RowCopies.of(torch.zeros(K, dtype=torch.int64), T, kernel_device)
    out = gather_rows(source, copies, repeats=2, backend=backend)
    assert out.shape == (K, 2 * G, D)
    out.sum().backward()
    expected = torch.zeros(T, G, D)
    expected[:1] = 2 * K
    assert torch.equal(source.grad.cpu(), expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_source_of_any_strides(kernel_device, backend):
    """Keys come as [heads, T, D], and a gradient may be an expanded number."""
    source = torch.randn(2, 5, 3, device=kernel_device)
    leaf = source.transpose(0, 1).requires_grad_()
    copies = RowCopies.of(torch.tensor([4, 0, 4]), 5, kernel_device)
    out = gather_rows(leaf, copies, repeats=2, backend=backend)
    assert torch.equal(out, source.transpose(0, 1)[[4, 0, 4]].repeat_interleave(2, 1))
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad[:, 0, 0].tolist() == [2, 0, 0, 0, 4]


def test_what_pytorch_checks_of_an_operator():
    source = torch.randn(4, 2, 3, requires_grad=True)
    copies = RowCopies.of(torch.tensor([1, 1, 3]), 4)
    arguments = (source, copies.index_K, copies.ends_T, copies.places_K, 2, "torch")
    torch.library.opcheck(torch.ops.mentor_kernels.gather_rows.default, arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: RowCopies.of(torch.tensor([0, 3]), 3), "outside of 3 rows"),
        (lambda: RowCopies.of(torch.tensor([-1]), 3), "outside of 3 rows"),
        (lambda: RowCopies.of(torch.tensor([0.0]), 3), "must be int64"),
        (lambda: gather_rows(torch.zeros(2, 1, 1), RowCopies.of(torch.tensor([0]), 3)), "of the 3 rows"),
        (lambda: gather_rows(torch.zeros(3, 1), RowCopies.of(torch.tensor([0]), 3)), "expected source_TGD"),
        (lambda: gather_rows(torch.zeros(3, 1, 1), RowCopies.of(torch.tensor([0]), 3), repeats=0), "repeats of 1"),
        (lambda: gather_rows(torch.zeros(3, 1, 1), RowCopies.of(torch.tensor([0]), 3), backend="x"), "backend must"),
    ],
)
def test_bad_input_is_one_sentence(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# --- wrong twins: each has the defect of its name and is right otherwise ---------------------------------------------


def twin(add):
    """An operator with the right result and the gradient that `add(grad [K, G, r, D], copies, T)` gives."""

    class Twin(torch.autograd.Function):
        @staticmethod
        def forward(ctx, source, copies, repeats):
            ctx.copies, ctx.repeats, ctx.T = copies, repeats, len(source)
            return source[copies.index_K].repeat_interleave(repeats, 1)

        @staticmethod
        def backward(ctx, grad):
            parts = grad.unflatten(1, (grad.shape[1] // ctx.repeats, ctx.repeats))
            return add(parts, ctx.copies, ctx.T).to(grad.dtype), None, None

    return lambda source, copies, repeats: Twin.apply(source, copies, repeats)


def right(grad, copies, T):
    wide = grad.double().sum(2)
    return wide.new_zeros(T, *wide.shape[1:]).index_add_(0, copies.index_K, wide)


def rounded_every_time(grad, copies, T):
    out = grad.new_zeros(T, grad.shape[1], grad.shape[3])
    for j in range(grad.shape[2]):
        out.index_add_(0, copies.index_K, grad[:, :, j])
    return out


def last_copy_missing(grad, copies, T):
    out, last = right(grad, copies, T), len(copies.index_K) - 1
    out[copies.index_K[last]] -= grad[last].double().sum(1)
    return out


def a_copy_replaces_the_others(grad, copies, T):
    out = right(grad, copies, T)
    out[copies.index_K] = grad.double().sum(2)
    return out


def first_head_alone(grad, copies, T):
    return right(grad[:, :, :1], copies, T)


def heads_side_by_side(grad, copies, T):
    K, G, r, D = grad.shape
    return right(grad.reshape(K, r, G, D).transpose(1, 2), copies, T)


def places_for_rows(grad, copies, T):
    wide = grad.double().sum(2)
    order = copies.places_K.clamp(max=T - 1)
    return wide.new_zeros(T, *wide.shape[1:]).index_add_(0, order, wide)


WRONG = [last_copy_missing, a_copy_replaces_the_others, first_head_alone, heads_side_by_side, places_for_rows]


def refused(operator, dtype=torch.float32) -> int:
    count = 0
    for each in CASES:
        try:
            check(operator, each, dtype)
        except AssertionError:
            count += 1
    return count


def test_the_right_twin_passes():
    assert refused(twin(right)) == 0


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_twin_is_refused(wrong):
    assert refused(twin(wrong)) > 0


def test_sums_that_are_rounded_every_time_are_refused():
    assert refused(twin(rounded_every_time), torch.bfloat16) > 0
    assert refused(twin(rounded_every_time), torch.float16) > 0
