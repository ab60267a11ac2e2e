"""The policy losses on the torch backend: hand-worked numbers, float64 with autograd, micro-batches, metrics."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import PolicyCase, check_policy, policy_cases
from mentor_kernels import Normaliser, PolicyLossConfig, linear_logprob, linear_policy_loss, policy_loss
from mentor_kernels.policy_loss import KL, METRICS, _policy_loss

CASES = policy_cases()


def loss_of(*, logp_N, old_logp_N, advantage_N, **rest) -> torch.Tensor:
    return policy_loss(logp_N, old_logp_N, advantage_N, **rest).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_against_float64_whole_and_in_micro_batches(case, dtype):
    check_policy(loss_of, case, dtype)


def triton_loss_of(*, logp_N, old_logp_N, advantage_N, **rest) -> torch.Tensor:
    return policy_loss(logp_N, old_logp_N, advantage_N, backend="triton", **rest).loss


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_kernels_against_float64_whole_and_in_micro_batches(case):
    check_policy(triton_loss_of, case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_kernels_on_a_gpu(case):
    check_policy(triton_loss_of, case, device="cuda")


def test_the_kernels_take_float32_alone():
    with pytest.raises(ValueError, match="float64 needs backend='torch'"):
        check_policy(triton_loss_of, CASES[0], torch.float64, "cuda" if torch.cuda.is_available() else "cpu")


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple),
    case=st.sampled_from(CASES),
    seed=st.integers(0, 999),
)
def test_any_lengths_and_any_split(lengths, case, seed):
    check_policy(loss_of, PolicyCase(case.name, case.config, lengths, case.on_policy, seed), torch.float64)


# Two sequences of 1 and 3 tokens. Ratios 2, 1.1, 0.5, 4; advantages 1 and -1; the whole step is these two sequences.
RATIOS = torch.tensor([2.0, 1.1, 0.5, 4.0])
ADVANTAGE = torch.tensor([1.0, -1.0, -1.0, -1.0])
SEQUENCE = torch.tensor([0, 1, 1, 1])
OLD = torch.tensor([-1.0, -2.0, -0.5, -3.0])


def by_hand(advantage=ADVANTAGE, **fields):
    logp = (OLD + RATIOS.log()).requires_grad_()
    config = PolicyLossConfig(**{"clip_low": 0.2, "clip_high": 0.3, "tis_cap": None, **fields})
    out = policy_loss(logp, OLD, advantage, sequence_N=SEQUENCE, config=config, normaliser=Normaliser(4, 2))
    out.loss.backward()
    return out, logp.grad.tolist()


# -min(rho A, clip A): -1.3 (clipped above), 1.1, 0.8 (clipped below), 3 (dual clip; 4 without)
@pytest.mark.parametrize(
    ("fields", "loss", "gradient"),
    [
        (dict(loss="dapo"), (-1.3 + 1.1 + 0.8 + 3) / 4, [0, 1.1 / 4, 0, 0]),
        (dict(loss="dapo", dual_clip=None), (-1.3 + 1.1 + 0.8 + 4) / 4, [0, 1.1 / 4, 0, 1]),
        (dict(loss="grpo"), (-1.3 + (1.1 + 0.8 + 3) / 3) / 2, [0, 1.1 / 6, 0, 0]),
        (dict(loss="dr_grpo", max_new_tokens=10), (-1.3 + 1.1 + 0.8 + 3) / 20, [0, 1.1 / 20, 0, 0]),
        # Sequence ratios 2 and (1.1 * 0.5 * 4)^(1/3) = 2.2^(1/3).
        (dict(loss="gspo"), (-1.3 + 2.2 ** (1 / 3)) / 2, [0, *[2.2 ** (1 / 3) / 6] * 3]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_clipped_losses_by_hand(fields, loss, gradient):
    out, found = by_hand(**fields)
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert found == pytest.approx(gradient, abs=1e-6)
    assert out.loss.dtype == torch.float32


def test_cispo_by_hand():
    out, found = by_hand(loss="cispo", cispo_max=1.5)
    capped = [1.5, 1.1, 0.5, 1.5]
    logp = [old + math.log(ratio) for old, ratio in zip(OLD.tolist(), RATIOS.tolist(), strict=True)]
    terms = [-c * a * x for c, a, x in zip(capped, ADVANTAGE.tolist(), logp, strict=True)]
    assert out.loss.item() == pytest.approx(sum(terms) / 4, abs=1e-6)
    assert found == pytest.approx([-1.5 / 4, 1.1 / 4, 0.5 / 4, 1.5 / 4], abs=1e-6)  # capped tokens keep a gradient
    assert out.metrics["clip_high"].item() == pytest.approx(2 / 4)


@pytest.mark.parametrize("weight", [1.0, 1.5 * 0.8])
@pytest.mark.parametrize(("kl", "value"), [("k1", -0.4), ("k2", 0.08), ("k3", math.exp(0.4) - 1.4)])
def test_kl_by_hand(kl, value, weight):
    """d = 0.4: another value for each estimator, and one slope; off-policy with rho = 1.5 and b = 0.8 in front."""
    logp = torch.tensor([-1.4, -1.4], requires_grad=True)
    old = None if weight == 1 else logp.detach() - math.log(1.5)
    out = policy_loss(
        logp, old, torch.zeros(2), sequence_N=torch.tensor([0, 1]), ref_logp_N=torch.tensor([-1.0, -1.0]),
        behaviour_logp_N=None if weight == 1 else old - math.log(0.8),
        config=PolicyLossConfig(kl=kl, beta=0.5), normaliser=Normaliser(2, 2),
    )  # fmt: skip
    out.loss.backward()
    assert out.metrics["kl"].item() == pytest.approx(weight * value, abs=1e-6)
    assert out.loss.item() == pytest.approx(0.5 * weight * value, abs=1e-6)
    assert logp.grad.tolist() == pytest.approx([0.25 * weight * -0.4] * 2, abs=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("kl", get_args(KL))
def test_the_mean_gradient_of_every_estimator_is_that_of_the_kl(kernel_device, kl, off_policy, loss, backend):
    """One softmax, a distant reference, and every token as often as the sampler draws it; gspo by sequences of two."""
    make = torch.Generator().manual_seed(1)
    logits, reference, old, sampler = 1.5 * torch.randn(4, 36, generator=make, dtype=torch.float64)
    old, sampler = (logits + 0.2 * x if off_policy else logits for x in (old, sampler))
    ref, old, sampler = (torch.log_softmax(x, -1) for x in (reference, old, sampler))

    def policy(leaf):
        logp = torch.log_softmax(leaf, -1)
        return logp, (logp.exp() * (logp - ref)).sum(-1)

    leaf = logits.clone().requires_grad_()
    exact = policy(leaf)[1]
    (want,) = torch.autograd.grad(exact, leaf)
    rows = logits.expand(36, 36).clone().requires_grad_()
    logp, divergence = policy(rows)
    vectors = dict(behaviour_logp_N=sampler, **(dict(kl_N=divergence) if kl == "exact" else dict(ref_logp_N=ref)))
    out = policy_loss(
        logp.diagonal().float().to(kernel_device),
        old.float().to(kernel_device) if off_policy else None,
        torch.zeros(36, device=kernel_device),
        sequence_N=torch.arange(36, device=kernel_device) // 2,
        **{name: x.float().to(kernel_device) for name, x in vectors.items()},
        config=PolicyLossConfig(loss, kl=kl, beta=2.0 if loss == "gspo" else 1.0, tis_cap=1e6),
        normaliser=Normaliser(1, 1),
        backend=backend,
    )
    out.loss.backward()
    assert exact > 1
    assert (sampler.exp() @ rows.grad - want).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("fields", "weights", "capped"),
    [
        (dict(tis_cap=2.0), [0.5, 2.0, 2.0, 1.0], 1 / 4),
        (dict(tis_cap=2.0, tis_mode="masked"), [0.5, 2.0, 0.0, 1.0], 1 / 4),
        (dict(tis_cap=4.0, tis_level="sequence"), [0.5, 4.0, 4.0, 4.0], 3 / 4),  # 2 * 3 * 1 > 4
        (dict(tis_cap=4.0, tis_level="sequence", tis_mode="masked"), [0.5, 0.0, 0.0, 0.0], 3 / 4),
    ],
)
def test_sampler_correction_by_hand(fields, weights, capped):
    gap = torch.tensor([0.5, 1.99999, 3.0, 1.0])  # exp(old - behaviour)
    logp = OLD.clone().requires_grad_()
    out = policy_loss(
        logp, None, torch.ones(4), sequence_N=SEQUENCE, behaviour_logp_N=OLD - gap.log(),
        config=PolicyLossConfig(**fields), normaliser=Normaliser(4, 2),
    )  # fmt: skip
    out.loss.backward()
    assert logp.grad.tolist() == pytest.approx([-w / 4 for w in weights], abs=1e-5)
    assert out.metrics["tis_mean"].item() == pytest.approx(sum(weights) / 4, abs=1e-5)
    assert out.metrics["tis_capped"].item() == pytest.approx(capped)
    assert out.metrics["logp_gap_max"].item() == pytest.approx(math.log(3), abs=1e-5)
    assert out.metrics["logp_gap_mean"].item() == pytest.approx((math.log(6) + math.log(2)) / 4, abs=1e-5)


def test_entropy_bonus_by_hand():
    entropy = torch.tensor([1.0, 3.0], requires_grad=True)
    out = policy_loss(
        torch.zeros(2), None, torch.zeros(2), sequence_N=torch.tensor([4, 9]), entropy_N=entropy,
        config=PolicyLossConfig(entropy_coef=0.1), normaliser=Normaliser(tokens=8, sequences=3),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-0.1 * 4 / 8)
    assert entropy.grad.tolist() == pytest.approx([-0.1 / 8] * 2)
    assert out.metrics["entropy"].item() == pytest.approx(4 / 8)


def test_metrics_by_hand():
    metrics = {name: value.item() for name, value in by_hand(loss="dapo")[0].metrics.items()}
    assert metrics == pytest.approx(
        dict(
            pg=3.6 / 4,
            clip_low=1 / 4,
            clip_high=1 / 4,
            clip_dual=1 / 4,
            ratio_mean=(2 + 1.1 + 0.5 + 4) / 4,
            ratio_max=4,
        ),
        abs=1e-6,
    )


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_metrics_of_micro_batches_combine_to_those_of_the_whole(case):
    vectors = case.vectors()
    N = sum(case.lengths)
    normaliser = Normaliser(N, len(case.lengths))

    def metrics(rows: slice) -> dict[str, float]:
        part = {name: v if v is None else v[rows] for name, v in vectors.items()}
        logp, old, advantage = (part.pop(name) for name in ("logp_N", "old_logp_N", "advantage_N"))
        out = policy_loss(logp, old, advantage, **part, config=case.config, normaliser=normaliser)
        return {name: value.item() for name, value in out.metrics.items()}

    cut = sum(case.lengths[:2])
    whole, first, second = metrics(slice(0, N)), metrics(slice(0, cut)), metrics(slice(cut, N))
    for name, value in whole.items():
        combined = max(first[name], second[name]) if name.endswith("_max") else first[name] + second[name]
        assert combined == pytest.approx(value, abs=1e-12), name
    assert set(whole) <= set(METRICS)


def test_what_was_not_measured_is_absent():
    args = (torch.zeros(2), None, torch.ones(2))
    rest = dict(sequence_N=torch.zeros(2, dtype=torch.int64), config=PolicyLossConfig(), normaliser=Normaliser(2, 1))
    bare = {"pg", "clip_low", "clip_high", "clip_dual", "ratio_mean", "ratio_max"}
    assert set(policy_loss(*args, **rest).metrics) == bare
    zeros = torch.zeros(2)
    everything = policy_loss(*args, **rest, ref_logp_N=zeros, behaviour_logp_N=zeros, entropy_N=zeros).metrics
    assert set(everything) == set(METRICS)
    assert not any(value.requires_grad for value in everything.values())


def test_on_policy_the_ratio_is_exactly_one_and_the_gradient_is_the_policy_gradient():
    logp = torch.tensor([-0.1, -7.3, -2.2], requires_grad=True)
    advantage = torch.tensor([0.5, -1.5, 2.0])
    out = policy_loss(
        logp,
        None,
        advantage,
        sequence_N=torch.tensor([0, 0, 1]),
        config=PolicyLossConfig(),
        normaliser=Normaliser(3, 2),
    )
    out.loss.backward()
    assert out.metrics["ratio_max"].item() == 1.0
    assert out.metrics["ratio_mean"].item() == pytest.approx(1.0, abs=1e-7)
    assert torch.allclose(logp.grad, -advantage / 3)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_no_tokens(loss):
    logp, entropy = torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)
    empty = torch.zeros(0)
    out = policy_loss(
        logp, empty, empty, sequence_N=torch.zeros(0, dtype=torch.int64), ref_logp_N=empty, behaviour_logp_N=empty,
        entropy_N=entropy, config=PolicyLossConfig(loss, beta=0.1, entropy_coef=0.1, max_new_tokens=5),
        normaliser=Normaliser(0, 0),
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert logp.grad.shape == entropy.grad.shape == (0,)
    assert all(value.item() == 0.0 for value in out.metrics.values())


def test_a_batch_in_which_everything_is_clipped_gives_exactly_no_gradient():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    old = torch.tensor([-2.0, -1.0])  # ratios e and 1/e
    out = policy_loss(
        logp, old, torch.tensor([1.0, -1.0]), sequence_N=torch.tensor([0, 1]), config=PolicyLossConfig(),
        normaliser=Normaliser(2, 2),
    )  # fmt: skip
    out.loss.backward()
    assert logp.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_an_overflowing_ratio_does_not_make_nan(loss):
    logp = torch.zeros(3, requires_grad=True)
    far = torch.full((3,), -300.0)
    out = policy_loss(
        logp, far, torch.tensor([0.0, 1.0, -1.0]), sequence_N=torch.arange(3), ref_logp_N=-far,
        behaviour_logp_N=2 * far, config=PolicyLossConfig(loss, beta=0.1, max_new_tokens=5),
        normaliser=Normaliser(3, 3),
    )  # fmt: skip
    out.loss.backward()
    assert math.isfinite(out.loss.item())
    assert bool(logp.grad.isfinite().all())
    assert logp.grad[0].item() < 0  # no advantage: only the KL, which pulls towards the reference


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "gspo"])
def test_gradcheck(loss):
    # With one weight a sequence, gspo's stop-gradients leave the true gradient of its loss.
    config = PolicyLossConfig(loss, beta=0.3, entropy_coef=0.2, tis_cap=1.5, tis_level="sequence", max_new_tokens=5)
    case = PolicyCase("", config, (2, 3))
    vectors = case.vectors()
    logp, entropy = vectors.pop("logp_N").requires_grad_(), vectors.pop("entropy_N").requires_grad_()
    old, advantage = vectors.pop("old_logp_N"), vectors.pop("advantage_N")

    def loss_of(logp, entropy):
        return policy_loss(
            logp, old, advantage, entropy_N=entropy, **vectors, config=case.config, normaliser=Normaliser(5, 2)
        ).loss

    assert torch.autograd.gradcheck(loss_of, (logp, entropy))


def linear_inputs():
    make = torch.Generator().manual_seed(0)
    hidden, reference = torch.randn(2, 10, 8, generator=make)
    weight = torch.randn(33, 8, generator=make)
    targets = torch.randint(0, 33, (10,), generator=make)
    rest = dict(advantage_N=torch.randn(10, generator=make), sequence_N=torch.arange(10) // 4)
    return hidden.requires_grad_(), reference, weight, targets, rest


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_the_linear_loss_is_the_two_operators(entropy_coef):
    hidden, reference, weight, targets, rest = linear_inputs()
    config = PolicyLossConfig("grpo", beta=0.2, entropy_coef=entropy_coef)
    how = dict(config=config, normaliser=Normaliser(10, 3))
    head = dict(temperature=0.7, softcap=4.0, scale=1.2)
    old = linear_logprob(reference, weight, targets, **head).logprob_N
    fused = linear_policy_loss(
        hidden,
        weight,
        targets,
        old_logp_N=old,
        ref_hidden_NH=reference,
        behaviour_logp_N=old - 0.1,
        **rest,
        **head,
        **how,
    )
    (found,) = torch.autograd.grad(fused.loss, hidden)
    logp, entropy = linear_logprob(hidden, weight, targets, **head)
    rest = dict(rest)
    two = policy_loss(
        logp, old, rest.pop("advantage_N"), ref_logp_N=old, behaviour_logp_N=old - 0.1, entropy_N=entropy, **rest, **how
    )
    (expected,) = torch.autograd.grad(two.loss, hidden)
    assert fused.loss.item() == two.loss.item()
    assert torch.equal(found, expected)
    assert {k: v.item() for k, v in fused.metrics.items()} == {k: v.item() for k, v in two.metrics.items()}
    given = linear_policy_loss(
        hidden, weight, targets, old_logp_N=old, ref_logp_N=old, behaviour_logp_N=old - 0.1, **rest, **head, **how,
        advantage_N=linear_inputs()[-1]["advantage_N"],
    )  # fmt: skip
    assert given.loss.item() == fused.loss.item()


def test_the_linear_loss_takes_one_reference():
    hidden, reference, weight, targets, rest = linear_inputs()
    with pytest.raises(ValueError, match="not both"):
        linear_policy_loss(
            hidden, weight, targets, old_logp_N=None, ref_hidden_NH=reference, ref_logp_N=torch.zeros(10), **rest,
            config=PolicyLossConfig(), normaliser=Normaliser(10, 3),
        )  # fmt: skip


def test_one_graph_under_compile():
    hidden, reference, weight, targets, rest = linear_inputs()

    def loss(hidden):
        out = linear_policy_loss(
            hidden, weight, targets, old_logp_N=None, ref_hidden_NH=reference, **rest,
            config=PolicyLossConfig(beta=0.1, entropy_coef=0.1), normaliser=Normaliser(10, 3),
        )  # fmt: skip
        return out.loss, out.metrics["kl"]

    (eager, eager_kl), (compiled, kl) = loss(hidden), torch.compile(loss, backend="aot_eager", fullgraph=True)(hidden)
    assert (eager.item(), eager_kl.item()) == (compiled.item(), kl.item())
    assert torch.equal(*(torch.autograd.grad(value, hidden)[0] for value in (eager, compiled)))


def test_the_operator_keeps_its_promises():
    v = PolicyCase("", PolicyLossConfig(), (2, 3)).vectors()
    args = (
        v["logp_N"].requires_grad_(), v["old_logp_N"], v["advantage_N"], v["sequence_N"], v["ref_logp_N"], None,
        v["entropy_N"].requires_grad_(), "grpo", 0.2, 0.3, 3.0, 5.0, "k3", 0.1, 0.1, 2.0, "tis", "token", None, 5, 2,
        "torch",
    )  # fmt: skip
    torch.library.opcheck(_policy_loss, args)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(loss="ppo"), "loss must be one of grpo, dapo, dr_grpo, gspo, cispo"),
        (dict(kl="k4"), "kl must be one of"),
        (dict(tis_mode="off"), "tis_mode"),
        (dict(tis_level="batch"), "tis_level"),
        (dict(clip_low=-0.1), "clip_low"),
        (dict(clip_low=1.1), "clip_low"),
        (dict(clip_high=math.nan), "clip_high"),
        (dict(dual_clip=1.0), "dual_clip"),
        (dict(tis_cap=0.0), "tis_cap"),
        (dict(cispo_max=0.0), "cispo_max"),
        (dict(loss="dr_grpo"), "max_new_tokens"),
    ],
)
def test_wrong_configurations(fields, match):
    with pytest.raises(ValueError, match=match):
        PolicyLossConfig(**fields)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(logp_N=torch.zeros(3, dtype=torch.bfloat16)), "logp_N must be float32"),
        (dict(logp_N=torch.zeros(3, 1)), "logp_N must be float32"),
        (dict(old_logp_N=torch.zeros(2)), "old_logp_N"),
        (dict(advantage_N=torch.zeros(3, dtype=torch.float64)), "advantage_N"),
        (dict(sequence_N=torch.zeros(3)), "sequence_N must be int64"),
        (dict(ref_logp_N=torch.zeros(3, device="meta")), "ref_logp_N"),
        (dict(config=PolicyLossConfig(beta=0.1)), "ref_logp_N is needed"),
        (dict(config=PolicyLossConfig(entropy_coef=0.1)), "entropy_N is needed"),
        (dict(backend="numpy"), "backend"),
    ],
)
def test_wrong_calls(change, match):
    args = dict(
        logp_N=torch.zeros(3), old_logp_N=None, advantage_N=torch.zeros(3),
        sequence_N=torch.zeros(3, dtype=torch.int64), config=PolicyLossConfig(), normaliser=Normaliser(3, 1),
    )  # fmt: skip
    with pytest.raises(ValueError, match=match):
        loss_of(**{**args, **change})


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="negative"):
        Normaliser(tokens=-1, sequences=0)
