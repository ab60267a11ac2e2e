"""Logprobs of chosen tokens, and the KL to a teacher's likeliest: float64 on both backends, and wrong twins."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import head_case, poisoned_memory, relative_rms
from mentor_kernels import linear_logprob, linear_topk, topk_kl

OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.6),
    "softcap": dict(softcap=4.0, scale=1.5, temperature=1.3),
}


def plain_log_p(hidden, weight, temperature=1.0, softcap=None, scale=1.0):
    x = scale * (hidden @ weight.T)
    return torch.log_softmax((x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature, -1)


def problem(dtype, *, N=19, V=515, H=70, K=5, seed=0, size=2.0):
    """Hidden states, head, targets; ids of which the first is the target, the last the last of all; a teacher."""
    case = head_case("", dtype, N=N, V=V, H=H, size=size, seed=seed)
    make = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, V, (N, K), generator=make)
    ids[:, 0], ids[:, -1] = case.targets_N, V - 1
    teacher = torch.log_softmax(torch.randn(N, K + 1, generator=make) * 3, -1)[:, :K]  # the rest was not cached
    return case, ids, teacher


def mixed_loss(operator, case, ids, teacher, device, dtype, **options):
    """(logprobs of the ids, gradient by hidden of: a non-uniform mix of the KL and the target's logprob)."""
    leaf = case.hidden_NH.to(device, dtype).requires_grad_()
    teacher = teacher.to(device, torch.promote_types(dtype, torch.float32))
    with poisoned_memory():
        logp, topk = operator(
            leaf, case.weight_VH.to(device, dtype), case.targets_N.to(device), ids.to(device), **options
        )
        grads = case.grad_logprob_N.to(device, logp.dtype), case.grad_entropy_N.to(device, logp.dtype)
        loss = (logp * grads[0] + topk_kl(topk, teacher) * grads[1]).sum()
        (by_hidden,) = torch.autograd.grad(loss, leaf)
    return topk.detach().cpu().double(), by_hidden.cpu().double()


def ours(backend):
    def run(hidden, weight, targets, ids, **options):
        logp = linear_logprob(hidden, weight, targets, backend=backend, **options).logprob_N
        return logp, linear_topk(hidden, weight, targets, logp, ids, backend=backend, **options)

    return run


def textbook(hidden, weight, targets, ids, **options):
    log_p = plain_log_p(hidden, weight, **options)
    return log_p.gather(1, targets[:, None])[:, 0], log_p.gather(1, ids)


def check(operator, dtype, device="cpu", options=None, **sizes):
    case, ids, teacher = problem(dtype, **sizes)
    found, by_hidden = mixed_loss(operator, case, ids, teacher, device, dtype, **(options or {}))
    want, want_by_hidden = mixed_loss(textbook, case, ids, teacher, "cpu", torch.float64, **(options or {}))
    assert float((found - want).abs().max()) <= (1e-12 if dtype is torch.float64 else 3e-6) * (
        1 + float(want.abs().max())
    )
    bound = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 4e-3)
    assert relative_rms(by_hidden, want_by_hidden) <= bound


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype, options):
    check(ours("torch"), dtype, options=options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_against_float64(kernel_device, dtype, options):
    check(ours("triton"), dtype, kernel_device, options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kernels_in_bf16(options):
    check(ours("triton"), torch.bfloat16, "cuda", options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("N", "V", "H", "K"), [(3, 5, 1, 1), (7, 131, 128, 16), (3, 300, 129, 17), (4, 40, 3, 40)])
def test_any_sizes(kernel_device, backend, N, V, H, K):
    check(ours(backend), torch.float32, kernel_device if backend == "triton" else "cpu", N=N, V=V, H=H, K=K)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("N", "K"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_do(kernel_device, backend, N, K):
    hidden = torch.randn(N, 8, device=kernel_device, requires_grad=True)
    weight, targets = torch.randn(20, 8, device=kernel_device), torch.zeros(N, dtype=torch.int64, device=kernel_device)
    logp = linear_logprob(hidden, weight, targets, backend=backend).logprob_N
    ids = torch.zeros(N, K, dtype=torch.int64, device=kernel_device)
    found = linear_topk(hidden, weight, targets, logp, ids, backend=backend)
    kl = topk_kl(found, torch.zeros_like(found))
    assert found.shape == (N, K)
    assert kl.tolist() == [0.0] * N
    kl.sum().backward()
    assert hidden.grad.tolist() == torch.zeros(N, 8).tolist()


def test_by_hand():
    """Logits log 1, log 2, log 5 (T = 1): p = 1/8, 2/8, 5/8; a teacher known by the last two, 0.5 and 0.25."""
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    targets, ids = torch.tensor([0]), torch.tensor([[2, 1]])
    logp = linear_logprob(hidden, weight, targets).logprob_N
    found = linear_topk(hidden, weight, targets, logp, ids)
    assert found.exp().tolist()[0] == pytest.approx([0.625, 0.25])
    kl = topk_kl(found, torch.tensor([[0.5, 0.25]]).log())
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.625) + 0.25 * math.log(0.25 / 0.25))
    kl.backward()
    mean = 0.25 * math.log(2) + 0.625 * math.log(5)
    assert hidden.grad.item() == pytest.approx(0.75 * mean - 0.5 * math.log(5) - 0.25 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_target_has_its_own_logprob_however_confident(kernel_device, backend):
    """At a margin of 25 nats a logprob formed from logsumexp would be 0."""
    hidden, weight = torch.full((1, 1), 25.0, device=kernel_device), torch.tensor([[1.0], [0.0]], device=kernel_device)
    for target in (0, 1):
        targets = torch.tensor([target], device=kernel_device)
        logp = linear_logprob(hidden, weight, targets, backend=backend).logprob_N
        found = linear_topk(
            hidden, weight, targets, logp, torch.tensor([[0, 1]], device=kernel_device), backend=backend
        )
        assert found[0, target] == logp[0]
    assert logp.item() == pytest.approx(-25 - math.log1p(math.exp(-25)))


def test_a_missing_token_counts_nothing_and_passes_no_nan():
    logp = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    kl = topk_kl(logp, torch.tensor([[math.log(0.5), -torch.inf]]))
    assert kl.item() == pytest.approx(0.5 * (math.log(0.5) + 1))
    kl.backward()
    assert logp.grad.tolist() == [[-0.5, 0.0]]


@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.1, 12), st.integers(0, 1000))
@settings(max_examples=30)
def test_at_the_teacher_the_kl_of_the_whole_vocabulary_is_0_and_flat(N, V, size, seed):
    make = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, 4, generator=make, dtype=torch.float64) * size).requires_grad_()
    weight, targets = torch.randn(V, 4, generator=make, dtype=torch.float64), torch.zeros(N, dtype=torch.int64)
    ids = torch.arange(V).expand(N, V)
    _, found = ours("torch")(hidden, weight, targets, ids)
    kl = topk_kl(found, plain_log_p(hidden, weight).detach())
    assert float(kl.detach().abs().max()) <= 1e-9
    kl.sum().backward()
    assert float(hidden.grad.abs().max()) <= 1e-9
    other = topk_kl(found.detach(), torch.full((N, V), -math.log(V), dtype=torch.float64))
    assert bool((other >= -1e-12).all())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_row_has_the_same_bits_in_any_batch(kernel_device, backend):
    case, ids, _ = problem(torch.float32, N=9, K=21)
    hidden, weight, targets, ids = (x.to(kernel_device) for x in (case.hidden_NH, case.weight_VH, case.targets_N, ids))
    logp = linear_logprob(hidden, weight, targets, backend=backend).logprob_N
    whole = linear_topk(hidden, weight, targets, logp, ids, backend=backend)
    for n in range(9):
        row = slice(n, n + 1)
        one = linear_topk(hidden[row], weight, targets[row], logp[row], ids[row], backend=backend)
        assert torch.equal(one[0], whole[n])


def test_chunks_of_rows_change_nothing(monkeypatch):
    case, ids, teacher = problem(torch.float32, N=23)
    whole = mixed_loss(ours("torch"), case, ids, teacher, "cpu", torch.float32)
    monkeypatch.setattr(sys.modules["mentor_kernels.linear_topk"], "GATHERED_BYTES", 5000)
    for a, b in zip(whole, mixed_loss(ours("torch"), case, ids, teacher, "cpu", torch.float32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_inputs(kernel_device, backend):
    case, ids, _ = problem(torch.float32, N=6)
    hidden, weight = case.hidden_NH.to(kernel_device), case.weight_VH.to(kernel_device)
    targets, ids = case.targets_N.to(kernel_device), ids.to(kernel_device)
    want = ours(backend)(hidden, weight, targets, ids)[1]
    found = ours(backend)(hidden.T.contiguous().T, weight.T.contiguous().T, targets, ids.T.contiguous().T)[1]
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_compiles_without_a_graph_break():
    case, ids, teacher = problem(torch.float32, N=5)

    def loss(hidden):
        logp, found = ours("torch")(hidden, case.weight_VH, case.targets_N, ids)
        return (topk_kl(found, teacher) - logp).sum()

    eager, compiled = (case.hidden_NH.clone().requires_grad_() for _ in range(2))
    want = loss(eager)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled)
    want.backward()
    found.backward()
    assert torch.equal(found, want)
    torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_input(kernel_device, backend):
    hidden, weight = torch.randn(3, 4, device=kernel_device), torch.randn(6, 4, device=kernel_device)
    targets, logp = torch.zeros(3, dtype=torch.int64, device=kernel_device), torch.zeros(3, device=kernel_device)
    ids = torch.zeros(3, 2, dtype=torch.int64, device=kernel_device)

    def run(ids=ids, logp=logp, targets=targets, **options):
        return linear_topk(hidden, weight, targets, logp, ids, backend=backend, **options)

    for wrong in (ids[:2], ids[0], ids[None]):
        with pytest.raises(ValueError, match=r"ids_NK must be \[N, K\] for N = 3 rows"):
            run(wrong)
    with pytest.raises(ValueError, match=r"logprob_N must be \[N\] for N = 3 rows"):
        run(logp=logp[:2])
    with pytest.raises(ValueError, match="ids_NK must be int64"):
        run(ids.int())
    with pytest.raises(ValueError, match="temperature must be positive"):
        run(temperature=0.0)
    if kernel_device == "cpu" or backend == "torch":
        for bad in (-1, 6):
            with pytest.raises(ValueError, match=r"targets_N and ids_NK must lie in \[0, 6\)"):
                run(torch.full_like(ids, bad))
            with pytest.raises(ValueError, match=r"targets_N and ids_NK must lie in \[0, 6\)"):
                run(targets=torch.full_like(targets, bad))
    else:
        ids[1, 1] = 6
        assert run(ids).isnan().tolist() == [[False, False], [False, True], [False, False]]


# --- wrong twins: each has the defect of its name and is right otherwise ----------------------------------------------


def without_the_temperature(hidden, weight, targets, ids, **options):
    logp, _ = textbook(hidden, weight, targets, ids, **options)
    x = hidden @ weight.T
    return logp, logp[:, None] + x.gather(1, ids) - x.gather(1, targets[:, None])


def detached_from_the_logprob(hidden, weight, targets, ids, **options):
    logp, found = textbook(hidden, weight, targets, ids, **options)
    return logp, logp.detach()[:, None] + (found - logp[:, None])


def detached_logits(hidden, weight, targets, ids, **options):
    logp, found = textbook(hidden, weight, targets, ids, **options)
    return logp, logp[:, None] + (found - logp[:, None]).detach()


def in_bf16(hidden, weight, targets, ids, **options):
    logp, found = textbook(hidden, weight, targets, ids, **options)
    return logp, logp[:, None] + (found - logp[:, None]).bfloat16().to(logp.dtype)


def among_themselves(hidden, weight, targets, ids, **options):
    logp, found = textbook(hidden, weight, targets, ids, **options)
    return logp, torch.log_softmax(found, 1)


def last_id_twice(hidden, weight, targets, ids, **options):
    return textbook(hidden, weight, targets, torch.cat([ids[:, :-2], ids[:, -1:], ids[:, -1:]], 1), **options)


WRONG = [without_the_temperature, detached_from_the_logprob, detached_logits, in_bf16, among_themselves, last_id_twice]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_the_check_rejects(wrong):
    check(textbook, torch.float32, options=dict(temperature=0.6))
    with pytest.raises(AssertionError):
        check(wrong, torch.float32, options=dict(temperature=0.6))
