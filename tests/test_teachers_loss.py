"""A teacher's likeliest tokens in the policy loss: float64 on both backends, fused and not; and wrong twins."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from kernel_checks import head_case, plain_policy, poisoned_memory, relative_rms
from mentor_kernels import (
    Normaliser,
    PolicyLossConfig,
    PolicyLossOut,
    TeacherTopK,
    linear_kl,
    linear_logprob,
    linear_policy_loss,
    linear_topk,
    policy_loss,
    topk_kl,
)
from mentor_kernels.linear_policy_loss import _linear_policy_loss

LENGTHS, TEMPERATURE, K = (30, 1, 64, 20, 15), 0.8, 5
NORMALISER = Normaliser(sum(LENGTHS) + 5, len(LENGTHS) + 2)  # the step has more in it
POLICIES = {
    "grpo, reference, entropy": PolicyLossConfig("grpo", beta=0.3, entropy_coef=0.1),
    "dapo": PolicyLossConfig(),
    "dr_grpo": PolicyLossConfig("dr_grpo", max_new_tokens=40, tis_cap=None),
    "cispo": PolicyLossConfig("cispo", cispo_max=1.2),
    "gspo": PolicyLossConfig("gspo", clip_low=3e-4, clip_high=4e-4),
    "weights of sequences": PolicyLossConfig("grpo", tis_level="sequence", beta=0.3),
}


def inputs(dtype: torch.dtype, config: PolicyLossConfig, softcap: float | None = None) -> dict:
    """Those of `linear_policy_loss` in float64, head and hidden states rounded to `dtype`.

    A whole sequence has an advantage of 0; some ratios are clipped; of the teacher's tokens the first is the target.
    """
    N = sum(LENGTHS)
    case = head_case("", dtype, N=N, V=515, H=40, size=2.0, seed=3)
    make = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 515, (N, K), generator=make)
    ids[:, 0], ids[:, -1] = case.targets_N, 514
    teacher = torch.log_softmax(torch.randn(N, K + 1, generator=make) * 3, -1)[:, :K]  # the rest was not cached
    teacher[::7, 2] = -torch.inf
    hidden, weight, targets = case.hidden_NH.double(), case.weight_VH.double(), case.targets_N
    near = all_log_p(hidden, weight, softcap).gather(1, targets[:, None])[:, 0]
    noise = torch.randn(3, N, generator=make, dtype=torch.float64) * (2e-3 if config.loss == "gspo" else 0.3)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    return dict(
        hidden_NH=hidden,
        weight_VH=weight,
        targets_N=targets,
        old_logp_N=near + noise[0],
        advantage_N=torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5], dtype=torch.float64)[sequence],
        sequence_N=sequence * 3,
        ref_logp_N=near + noise[1] if config.beta else None,
        behaviour_logp_N=near + noise[2],
        teacher=TeacherTopK(ids, teacher, 0.7),
        temperature=TEMPERATURE,
        softcap=softcap,
        config=config,
        normaliser=NORMALISER,
    )


def result(operator, given: dict, dtype: torch.dtype, device: str = "cpu", **changed) -> tuple:
    """(loss, gradient by the hidden states, metrics) of `operator` in this dtype, upstream gradient 3."""
    wide = torch.promote_types(dtype, torch.float32)
    now = dict(given)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            to = (dtype if name in ("hidden_NH", "weight_VH") else wide) if value.is_floating_point() else None
            now[name] = value.to(device, to)
    ids, logp, coefficient = given["teacher"]
    now["teacher"] = TeacherTopK(ids.to(device), logp.to(device), coefficient)
    now["hidden_NH"].requires_grad_()
    with poisoned_memory():
        out = operator(**now, **changed)
        (grad,) = torch.autograd.grad(3 * out.loss, now["hidden_NH"])
    return out.loss.item(), grad.cpu(), {name: value.item() for name, value in out.metrics.items()}


def all_log_p(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    x = hidden @ weight.T
    return torch.log_softmax((x if softcap is None else softcap * torch.tanh(x / softcap)) / TEMPERATURE, -1)


def weights(config: PolicyLossConfig, dtype: torch.dtype) -> torch.Tensor:
    """What each token counts, from the lengths."""
    each = {"dr_grpo": NORMALISER.sequences * (config.max_new_tokens or 1)}.get(config.loss, NORMALISER.tokens)
    by_length = config.loss in ("grpo", "gspo")
    each = [1 / (NORMALISER.sequences * n if by_length else each) for n in LENGTHS]
    return torch.tensor(each, dtype=dtype).repeat_interleave(torch.tensor(LENGTHS))


def textbook(
    *, hidden_NH, weight_VH, targets_N, teacher, temperature, softcap, config, normaliser, term=None, **vectors
) -> PolicyLossOut:
    """All log-probabilities; `term(log_p, teacher, w)` is the teacher's part of the loss."""
    log_p = all_log_p(hidden_NH, weight_VH, softcap)
    vectors = {name: torch.zeros_like(log_p[:, 0]) if v is None else v for name, v in vectors.items()}
    policy = plain_policy(
        logp_N=log_p.gather(1, targets_N[:, None])[:, 0], entropy_N=-(log_p.exp() * log_p).sum(1), config=config,
        normaliser=normaliser, **vectors,
    )  # fmt: skip
    teacher = teacher._replace(logp_NK=teacher.logp_NK.to(log_p.dtype))
    return PolicyLossOut(policy + (term or right_term)(log_p, teacher, weights(config, log_p.dtype)), {})


def right_term(log_p, teacher, w):
    q = teacher.logp_NK.exp()
    gap = (teacher.logp_NK - log_p.gather(1, teacher.ids_NK)).nan_to_num(neginf=0)
    return teacher.weight * (w * (q * gap).sum(1)).sum()


def check(operator, dtype: torch.dtype, config: PolicyLossConfig, device: str = "cpu", **options) -> None:
    given = inputs(dtype, config, **options)
    loss, grad, _ = result(operator, given, dtype, device)
    want_loss, want, _ = result(textbook, given, torch.float64)
    assert loss == pytest.approx(want_loss, rel=2e-5, abs=2e-6)
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 6e-3}[dtype]
    assert relative_rms(grad, want) <= bound


def ours(backend: str):
    return lambda **given: linear_policy_loss(**given, backend=backend)


def separately(**given) -> PolicyLossOut:
    """The Triton backends of the separate operators."""
    hidden, weight, targets = (given.pop(name) for name in ("hidden_NH", "weight_VH", "targets_N"))
    teacher, old, advantage = (given.pop(name) for name in ("teacher", "old_logp_N", "advantage_N"))
    head = dict(temperature=given.pop("temperature"), softcap=given.pop("softcap"), backend="triton")
    logp, entropy = linear_logprob(hidden, weight, targets, **head)
    out = policy_loss(logp, old, advantage, entropy_N=entropy, backend="triton", **given)
    kl = topk_kl(linear_topk(hidden, weight, targets, logp, teacher.ids_NK, **head), teacher.logp_NK)
    w = weights(given["config"], torch.float32).to(kl.device)
    metrics = {**out.metrics, "teacher_kl": kl.sum() / NORMALISER.tokens}
    return PolicyLossOut(out.loss + teacher.weight * (w * kl).sum(), metrics)


@pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype, config):
    check(ours("torch"), dtype, config)


@pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_against_float64(kernel_device, dtype, config):
    check(ours("triton"), dtype, config, kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)
def test_kernels_in_bf16(config):
    check(ours("triton"), torch.bfloat16, config, "cuda")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_kernels_under_a_softcap(kernel_device, backend):
    device = kernel_device if backend == "triton" else "cpu"
    check(ours(backend), torch.float32, POLICIES["dapo"], device, softcap=2.0)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(config, torch.float16 if i % 4 == 0 else torch.float32) for i, config in enumerate(POLICIES.values())],
    ids=POLICIES,
)
def test_the_fused_kernels_are_the_separate_ones(kernel_device, config, dtype, monkeypatch):
    monkeypatch.setattr(sys.modules["mentor_kernels.linear_logprob"], "_chunk_rows", lambda V, element_size: 64)
    given = inputs(dtype, config)
    loss, grad, metrics = result(ours("triton"), given, dtype, kernel_device)
    want_loss, want, want_metrics = result(separately, given, dtype, kernel_device)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    assert metrics == pytest.approx(want_metrics, rel=1e-6)
    assert relative_rms(grad, want.double()) <= (2e-6 if dtype is torch.float32 else 2e-3)


def test_with_the_exact_kl(kernel_device):
    """Against its parts, which have their own tests."""
    config = PolicyLossConfig(kl="exact", beta=0.3)
    given = inputs(torch.float32, config)
    given["ref_logp_N"], reference = None, (given["hidden_NH"].roll(1, 0) * 0.1 + given["hidden_NH"]).float()

    def fused(**given):
        return linear_policy_loss(**given, ref_hidden_NH=reference.to(kernel_device), backend="triton")

    def parts(**given):
        rest = {k: v for k, v in given.items() if k != "config"}
        without = separately(**rest, config=PolicyLossConfig())
        kl = linear_kl(
            given["hidden_NH"], reference.to(kernel_device), given["weight_VH"], temperature=TEMPERATURE,
            backend="triton",
        )  # fmt: skip
        return PolicyLossOut(without.loss + 0.3 * kl.sum() / NORMALISER.tokens, without.metrics)

    loss, grad, metrics = result(fused, given, torch.float32, kernel_device)
    want_loss, want, want_metrics = result(parts, given, torch.float32, kernel_device)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    assert metrics["teacher_kl"] == pytest.approx(want_metrics["teacher_kl"], rel=1e-5)
    assert relative_rms(grad, want.double()) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_by_hand(kernel_device, backend):
    """p = 1/8, 2/8, 5/8, the first sampled with an advantage of 0; a teacher known by the others, 0.5 and 0.25."""
    device = kernel_device if backend == "triton" else "cpu"
    hidden = torch.ones(1, 1, device=device, requires_grad=True)
    zero, whole = torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    out = linear_policy_loss(
        hidden, torch.tensor([[0.0], [math.log(2)], [math.log(5)]], device=device), whole, old_logp_N=None,
        advantage_N=zero, sequence_N=whole, config=PolicyLossConfig(), normaliser=Normaliser(4, 1), backend=backend,
        teacher=TeacherTopK(torch.tensor([[2, 1]], device=device), torch.tensor([[0.5, 0.25]], device=device).log(), 2),
    )  # fmt: skip
    kl = 0.5 * math.log(0.5 / 0.625) + 0.25 * math.log(0.25 / 0.25)
    assert out.metrics["teacher_kl"].item() == pytest.approx(kl / 4)
    assert out.loss.item() == pytest.approx(2 * kl / 4)
    out.loss.backward()
    mean = 0.25 * math.log(2) + 0.625 * math.log(5)
    want = 0.75 * mean - 0.5 * math.log(5) - 0.25 * math.log(2)
    assert hidden.grad.item() == pytest.approx(2 * want / 4, rel=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_of_nothing(kernel_device, backend):
    device = kernel_device if backend == "triton" else "cpu"
    hidden = torch.zeros(0, 8, device=device, requires_grad=True)
    none, whole = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    out = linear_policy_loss(
        hidden, torch.ones(5, 8, device=device), whole, old_logp_N=None, advantage_N=none, sequence_N=whole,
        config=PolicyLossConfig(), normaliser=Normaliser(0, 0), backend=backend,
        teacher=TeacherTopK(whole.view(0, 1).expand(0, 3), none.view(0, 1).expand(0, 3), 1.0),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == out.metrics["teacher_kl"].item() == 0
    assert hidden.grad.shape == (0, 8)


def small(device: str) -> dict:
    case = head_case("", torch.float32, N=6, V=40)
    sequence = torch.tensor([0, 0, 0, 1, 1, 1], device=device)
    ids = torch.arange(12, device=device).view(6, 2)
    return dict(
        hidden_NH=case.hidden_NH.to(device).requires_grad_(), weight_VH=case.weight_VH.to(device),
        targets_N=case.targets_N.to(device), old_logp_N=None, advantage_N=torch.linspace(-1, 1, 6, device=device),
        sequence_N=sequence, config=PolicyLossConfig(), normaliser=Normaliser(6, 2),
        teacher=TeacherTopK(ids, torch.full((6, 2), -1.0, device=device), 0.5),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_into_one_graph(kernel_device, backend):
    given = small(kernel_device if backend == "triton" else "cpu")
    hidden = given.pop("hidden_NH")

    def loss(hidden):
        out = linear_policy_loss(hidden, **given, backend=backend)
        return out.loss, out.metrics["teacher_kl"]

    eager, compiled = loss(hidden), torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden)
    assert [x.item() for x in eager] == [x.item() for x in compiled]
    grads = (torch.autograd.grad(value[0], hidden)[0] for value in (eager, compiled))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


def test_the_operator_keeps_its_promises(kernel_device):
    given = small(kernel_device)
    head = [given[name] for name in ("hidden_NH", "weight_VH", "targets_N")]
    config = ("dapo", 0.2, 0.28, 3.0, 5.0, "k3", 0.0, 0.1, 2.0, "tis", "token", None)
    torch.library.opcheck(
        _linear_policy_loss,
        (*head, None, given["advantage_N"], given["sequence_N"], None, None, None, *given["teacher"], 0.9, None, 1.0,
         *config, 6, 2, 0.0, True),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_teachers(kernel_device, backend):
    given = small(kernel_device if backend == "triton" else "cpu")
    ids, logp, _ = given["teacher"]
    wrong = [
        (dict(ids_NK=ids[:5]), r"ids_NK must be \[N, K\] for N = 6 rows"),
        (dict(ids_NK=ids.int()), "ids_NK must be int64"),
        (dict(logp_NK=logp[:, :1]), r"the teacher's logp_NK must be float32 \(6, 2\)"),
        (dict(logp_NK=logp.double()), "the teacher's logp_NK must be float32"),
    ]
    if ids.device.type == "cpu":
        wrong += [(dict(ids_NK=ids + 29), r"must lie in \[0, 40\), but reach from .* to 40")]
    for changed, match in wrong:
        with pytest.raises(ValueError, match=match):
            linear_policy_loss(**{**given, "teacher": given["teacher"]._replace(**changed)}, backend=backend)


# --- wrong twins: each has the defect of its name and is right otherwise ----------------------------------------------


def without_its_weight(log_p, teacher, w):
    return right_term(log_p, teacher._replace(weight=1.0), w)


def all_tokens_alike(log_p, teacher, w):
    return right_term(log_p, teacher, torch.full_like(w, 1 / len(w)))


def backwards(log_p, teacher, w):
    return -right_term(log_p, teacher, w)


def without_the_gathered_rows(log_p, teacher, w):
    """Right in value; the gradient is that of the shared logsumexp alone."""
    shared = log_p - (log_p - log_p[:, :1]).detach()
    return right_term(shared, teacher, w)


def not_learned_from(log_p, teacher, w):
    return right_term(log_p.detach(), teacher, w)


WRONG = [without_its_weight, all_tokens_alike, backwards, without_the_gathered_rows, not_learned_from]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_the_check_rejects(wrong):
    config = POLICIES["grpo, reference, entropy"]
    check(textbook, torch.float32, config)
    with pytest.raises(AssertionError):
        check(lambda **given: textbook(**given, term=wrong), torch.float32, config)
