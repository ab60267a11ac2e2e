"""The loss in the configuration we train: uneven lengths, tool masks, several rows, KL on and off, every loss type."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mentor_kernels import PolicyLossConfig

from lite_mentor import fit
from lite_mentor.batch import pack
from lite_mentor.config import PRESETS
from lite_mentor.errors import UserError
from lite_mentor.fit import fullest_row, largest_row, prove_fit, row_tokens
from lite_mentor.load import load_student
from lite_mentor.loss import StepMetrics, backward, batch_loss, check_backend, logprobs, loss_config, old_logprobs
from tests.test_batch import rollout

CONFIG = dataclasses.replace(PRESETS["tiny"], device="cpu", lora_rank=4, max_new_tokens=12)


@pytest.fixture(scope="module")
def student():
    student = load_student("tiny", quant="none", dtype="fp32", lora_rank=4, lora_alpha=8)
    torch.manual_seed(0)
    for parameter in student.trainable():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return student


def episodes():
    """Two groups with a shared opening, uneven tails, and a tool result (unsampled) inside some of them."""
    opening = [256, 267, 65, 66, 67]
    tails = [
        [(70, 1), (71, 1), (90, 0), (91, 0), (72, 1), (257, 1)],
        [(70, 1), (257, 1)],
        [(73, 1), (92, 0), (74, 1), (75, 1), (76, 1), (257, 1)],
        [(77, 1), (257, 1)],
        [(78, 1), (79, 1), (257, 1)],
    ]
    prompts = [[*opening, 80]] * 3 + [[*opening, 81, 82]] * 2
    groups, indices = (0, 0, 0, 1, 1), (0, 1, 2, 0, 1)
    return [rollout(p, t, g, i) for p, t, g, i in zip(prompts, tails, groups, indices, strict=True)]


ADVANTAGES = [1.0, -0.5, -0.5, 0.7, -0.7]


def gradient(student, rows, config) -> tuple[float, torch.Tensor]:
    loss = 0.0
    for row in rows:
        out = batch_loss(student, row, config)
        out.loss.backward()
        loss += out.loss.item()
    found = torch.cat([p.grad.flatten() for p in student.trainable()])
    for p in student.trainable():
        p.grad = None
    return loss, found


def test_the_loss_has_the_runs_own_settings():
    run = dict(loss="gspo", clip=(0.1, 0.4), kl="k2", beta=0.3, entropy=0.02, tis_cap=1.5, max_new_tokens=77)
    wanted = PolicyLossConfig(
        loss="gspo", clip_low=0.1, clip_high=0.4, kl="k2", beta=0.3, entropy_coef=0.02, tis_cap=1.5, max_new_tokens=77
    )
    assert loss_config(dataclasses.replace(CONFIG, **run)) == wanted
    assert loss_config(dataclasses.replace(CONFIG, tis_cap=0.0)).tis_cap is None


def test_packed_logprobs_are_those_of_each_rollout_alone(student):
    together = pack(episodes(), ADVANTAGES, 100)
    assert len(together) == 1
    alone = [pack([r], [a], 100)[0] for r, a in zip(episodes(), ADVANTAGES, strict=True)]
    with torch.no_grad():
        packed, entropy = logprobs(student, together[0])
        single = [logprobs(student, row) for row in alone]
    assert torch.allclose(packed, torch.cat([s[0] for s in single]), atol=2e-5)
    assert torch.allclose(entropy, torch.cat([s[1] for s in single]), atol=2e-5)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize(("beta", "kl"), [(0.0, "k3"), (0.1, "k3"), (0.1, "exact")])
def test_micro_batches_change_neither_loss_nor_gradient(student, loss, beta, kl):
    config = dataclasses.replace(CONFIG, loss=loss, beta=beta, kl=kl, entropy=0.01)
    whole, many = pack(episodes(), ADVANTAGES, 100), pack(episodes(), ADVANTAGES, 12)
    assert (len(whole), len(many)) == (1, 3)
    one, gradient_one = gradient(student, whole, config)
    three, gradient_three = gradient(student, many, config)
    assert one == pytest.approx(three, rel=1e-4, abs=1e-6)
    assert gradient_one.abs().max() > 1e-4
    assert torch.allclose(gradient_one, gradient_three, atol=1e-5 * gradient_one.abs().max() + 1e-7, rtol=1e-3)


def test_a_step_along_the_gradient_raises_what_was_good(student):
    rows = pack(episodes(), ADVANTAGES, 100)

    def objective() -> float:
        return sum((old_logprobs(student, row, CONFIG) * row.advantage_N).sum().item() for row in rows)

    before = objective()
    _, found = gradient(student, rows, CONFIG)
    saved = [p.detach().clone() for p in student.trainable()]
    start = 0
    for p in student.trainable():
        p.data -= 0.05 * found[start : start + p.numel()].view_as(p)
        start += p.numel()
    assert objective() > before
    for p, old in zip(student.trainable(), saved, strict=True):
        p.data.copy_(old)


def test_the_reference_is_the_student_with_its_adapters_off(student):
    row = pack(episodes(), ADVANTAGES, 100)[0]
    config = dataclasses.replace(CONFIG, beta=0.1, tis_cap=0.0)  # what "sampled" these rows was no policy
    assert batch_loss(student, row, config).metrics["kl"].item() > 1e-4
    fresh = load_student("tiny", quant="none", dtype="fp32", lora_rank=4, lora_alpha=8)  # its adapters add nothing yet
    assert batch_loss(fresh, row, config).metrics["kl"].item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "exact"])
def test_the_student_is_no_distance_from_a_reference_that_was_just_kept(kl):
    student = load_student("tiny", quant="none", dtype="fp32", lora_rank=4, lora_alpha=8)
    row = pack(episodes(), ADVANTAGES, 100)[0]
    config = dataclasses.replace(CONFIG, beta=0.1, kl=kl, tis_cap=0.0)
    kls = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        for parameter in student.trainable():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        if seed == 0:
            student.keep_reference()
        kls.append(batch_loss(student, row, config).metrics["kl"].item())
    assert kls[0] == 0
    assert abs(kls[1]) > 1e-4


def test_metrics_of_rows_combine_to_those_of_the_step(student):
    def combined(budget: int) -> dict[str, float]:
        metrics = StepMetrics(updates=1)
        for row in pack(episodes(), ADVANTAGES, budget):
            metrics.add(batch_loss(student, row, CONFIG), row)
        return metrics.result()

    whole, many = combined(100), combined(12)
    for name in ("loss", "entropy", "ratio/mean", "ratio/max", "logp_gap/mean", "logp_gap/max", "clip/low"):
        assert whole[name] == pytest.approx(many[name], rel=1e-4, abs=1e-6), name
    assert whole["tokens/trained"] < many["tokens/trained"]


def test_metrics_are_read_once_an_update(monkeypatch):
    """A look at a value stops the host until the GPU has caught up."""
    out = SimpleNamespace(loss=torch.tensor(1.0), metrics={"kl": torch.tensor(2.0), "ratio_max": torch.tensor(3.0)})
    bad = SimpleNamespace(loss=torch.tensor(math.nan), metrics=dict(kl=torch.tensor(1.0), ratio_max=torch.tensor(9.0)))
    row, reads = SimpleNamespace(ids_T=[0, 0]), []
    metrics = StepMetrics(updates=2)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    for found in (out, bad, out):
        metrics.add(found, row)
    assert not reads
    assert metrics.not_finite() == ["loss"]
    metrics.add(out, row)
    result = metrics.result()
    assert len(reads) == 2
    assert (result["kl"], result["ratio/max"], result["tokens/trained"]) == ((2 + 1 + 2 + 2) / 2, 9.0, 8)
    assert math.isnan(result["loss"])


def test_the_fullest_row_is_full_to_the_last_token(student):
    config = dataclasses.replace(CONFIG, max_prompt_tokens=20, max_new_tokens=10, micro_tokens=95)
    row = fullest_row(config, 300)
    assert len(row.ids_T) == 95
    assert row.segment_parents == (-1, *[0] * 9)  # one prompt
    # The last token of each rollout predicts nothing and takes no room: 20 + 8 * 9 + 3.
    assert row.segment_starts == (0, *range(20, 95, 9))
    assert len(row.targets_N) == 8 * 10 + 4
    text = prove_fit(student, config)
    assert "the fullest row (95 tokens, 84 of them sampled) fits" in text


@pytest.mark.parametrize(("prompt", "new", "micro"), [(5, 1, 6), (5, 1, 9), (5, 2, 7), (7, 100, 107), (1, 3, 2)])
def test_the_fullest_row_of_odd_sizes(prompt, new, micro):
    config = dataclasses.replace(CONFIG, max_prompt_tokens=prompt, max_new_tokens=new, micro_tokens=micro)
    row = fullest_row(config, 300)
    assert len(row.ids_T) == (prompt if new == 1 else micro)


def test_the_student_is_left_as_it_was(student):
    prove_fit(student, dataclasses.replace(CONFIG, max_prompt_tokens=20, max_new_tokens=10, micro_tokens=40))
    assert all(p.grad is None for p in student.trainable())


@pytest.mark.parametrize(
    ("longest", "room", "chosen"),
    [
        (500, 499, 500),  # one whole rollout, whatever it takes
        (500, 511, 500),
        (500, 512, 512),
        (512, 4095, 2048),
        (512, 1 << 40, 16_384),
        (20_000, 1 << 40, 20_000),
    ],
)
def test_a_row_is_the_largest_that_fits(longest, room, chosen):
    tried = []
    assert largest_row(longest, room, lambda tokens: tried.append(tokens) or tokens) == chosen
    assert max(tried) == chosen  # no larger one was run, which might have run out of memory


def test_a_row_that_takes_more_than_expected_is_not_chosen():
    needs = {500: 100, 512: 110, 1024: 220, 2048: 2000}
    assert largest_row(500, 450, needs.__getitem__) == 1024
    assert largest_row(500, 450, lambda tokens: float("inf")) == 500  # and prove_fit will say why


@pytest.mark.parametrize(("longest", "chosen"), [(30, 1024), (3000, 3000)])
def test_on_a_cpu_a_row_has_a_fixed_size(student, longest, chosen):
    config = dataclasses.replace(CONFIG, max_prompt_tokens=10, max_new_tokens=longest - 10, micro_tokens=0)
    assert row_tokens(student, config) == chosen


def test_on_a_gpu_half_of_the_free_memory_is_a_rows(monkeypatch):
    class OnCuda:
        device = torch.device("cuda", 1)

    config = dataclasses.replace(CONFIG, max_prompt_tokens=100, max_new_tokens=200, micro_tokens=0)
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (8 << 20, 24 << 20))
    monkeypatch.setattr(fit, "_row_bytes", lambda student, config: config.micro_tokens << 10)
    assert row_tokens(OnCuda, config) == 4096
    assert asked == [OnCuda.device]


def test_a_row_that_runs_out_of_memory_needs_more_than_there_is(student, monkeypatch):
    def full(*_):
        raise UserError("A row does not fit")

    peaks = iter([7 << 20, 9 << 20])
    emptied = []
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(fit, "prove_fit", lambda *_: "fits")
    assert fit._row_bytes(student, CONFIG) == 2 << 20
    peaks = iter([7 << 20])
    monkeypatch.setattr(fit, "prove_fit", full)
    assert fit._row_bytes(student, CONFIG) == math.inf
    assert len(emptied) == 2


@pytest.mark.gpu
def test_a_rows_memory_is_measured_and_given_back(student):
    there = load_student("tiny", quant="none", dtype="fp32", device="cuda")
    config = dataclasses.replace(CONFIG, max_prompt_tokens=100, max_new_tokens=200, micro_tokens=0)
    assert 300 <= row_tokens(there, config) <= fit.MOST_ROW_TOKENS
    small, large = (fit._row_bytes(there, dataclasses.replace(config, micro_tokens=n)) for n in (512, 4096))
    assert 0 < small < large


def test_kernels_that_cannot_run_are_refused():
    with pytest.raises(UserError, match="--backend triton needs a GPU"):
        check_backend(dataclasses.replace(CONFIG, backend="triton", dtype="bf16"))
    with pytest.raises(UserError, match="--drop-mass is for the head's Triton kernels"):
        check_backend(dataclasses.replace(CONFIG, drop_mass=1e-3))
    check_backend(dataclasses.replace(CONFIG, drop_mass=1e-3, backend="triton"))  # in the interpreter, here
    with pytest.raises(UserError, match="--cuda-graphs on: they need a GPU; leave it out"):
        check_backend(dataclasses.replace(CONFIG, cuda_graphs="on"))
    with pytest.raises(UserError, match="--cuda-graphs on: they record Triton's attention, not torch's"):
        check_backend(dataclasses.replace(CONFIG, cuda_graphs="on", device="cuda", backend="torch"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_the_first_ratio_is_exactly_1(quant, dtype, checkpointing):
    """Whatever the sampler's logprobs are: here they are wrong by many nats."""
    found = load_student("tiny", quant=quant, dtype=dtype, lora_rank=4, gradient_checkpointing=checkpointing)
    torch.manual_seed(0)
    for parameter in found.trainable():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    config = dataclasses.replace(CONFIG, temperature=0.7)
    for row in pack(episodes(), ADVANTAGES, 20):
        old = old_logprobs(found, row, config)
        assert torch.equal(old, logprobs(found, row, temperature=0.7)[0].detach())
        later, on_policy = batch_loss(found, row, config, old), batch_loss(found, row, config)
        assert later.metrics["ratio_max"].item() == 1.0
        assert later.metrics["logp_gap_max"].item() > 5
        assert torch.equal(later.loss, on_policy.loss)
        gradients = [torch.autograd.grad(out.loss, found.trainable()) for out in (later, on_policy)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("loss", ["dapo", "gspo", "cispo"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_first_ratio_is_exactly_1_for_every_kind_of_ratio(student, backend, loss):
    config = dataclasses.replace(CONFIG, backend=backend, loss=loss, beta=0.1, entropy=0.01)
    row = pack(episodes(), ADVANTAGES, 100)[0]
    out = batch_loss(student, row, config, old_logprobs(student, row, config))
    assert out.metrics["ratio_max"].item() == 1.0
    assert torch.equal(out.loss, batch_loss(student, row, config).loss)


@pytest.mark.parametrize("loss", ["dapo", "gspo"])
def test_the_kernels_train_as_torch_does(loss):
    """Four updates by the same rows, through interpreted kernels and through torch: the same losses and weights."""
    results = []
    for backend in ("torch", "triton"):
        student = load_student("tiny", quant="none", dtype="fp32", lora_rank=4, lora_alpha=8, seed=0)
        config = dataclasses.replace(CONFIG, backend=backend, loss=loss, beta=0.1, entropy=0.01)
        optimizer = torch.optim.Adam(student.trainable(), lr=1e-3)
        rows = pack(episodes(), ADVANTAGES, 100)
        old = [old_logprobs(student, row, config) for row in rows]
        losses = []
        for _ in range(4):
            outs = [batch_loss(student, row, config, o) for row, o in zip(rows, old, strict=True)]
            total = sum(out.loss for out in outs)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item())
        results.append((losses, torch.cat([p.detach().flatten() for p in student.trainable()])))
    (torchs, torch_weights), (kernels, kernel_weights) = results
    assert kernels == pytest.approx(torchs, rel=1e-4, abs=1e-6)
    assert abs(torchs[-1] - torchs[0]) > 1e-3
    assert float((kernel_weights - torch_weights).norm() / torch_weights.norm()) < 1e-3


@pytest.mark.parametrize("loss", ["dapo", "gspo"])  # gspo's goes through the separate operators
def test_a_drop_mass_reaches_the_gradient_and_nothing_else(student, loss):
    row = pack(episodes(), ADVANTAGES, 100)[0]
    found = {}
    for drop_mass in (0.0, 1e-6, 0.9):
        config = dataclasses.replace(CONFIG, backend="triton", loss=loss, drop_mass=drop_mass)
        found[drop_mass] = gradient(student, [row], config)
    exact, same, dropped = (found[drop_mass][1] for drop_mass in (0.0, 1e-6, 0.9))
    assert found[0.0][0] == found[0.9][0]  # the loss
    assert float((same - exact).norm() / exact.norm()) < 1e-5  # all tiles, rows in another order
    assert 1e-3 < float((dropped - exact).norm() / exact.norm()) < 1


def test_what_fits_is_said_of_the_whole_card(student, monkeypatch):
    config = dataclasses.replace(CONFIG, max_prompt_tokens=20, max_new_tokens=10, micro_tokens=40)
    monkeypatch.setattr(fit, "peak_memory_bytes", lambda device: 2 * 2**30)
    monkeypatch.setattr(fit, "reserved_memory_bytes", lambda device: 3 * 2**30)
    assert prove_fit(student, config).endswith(
        "fits: 2.00 GiB at most so far, 3.00 GiB of the card with what is reserved and the CUDA context"
    )


def test_what_does_not_fit_names_the_preset_that_does(student, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = dataclasses.replace(CONFIG, max_prompt_tokens=20, max_new_tokens=10, micro_tokens=40)
    monkeypatch.setattr(fit, "batch_loss", full)
    monkeypatch.setattr(fit, "memory_left", lambda device: "A Card has 7.1 GiB; --preset 8gb is made for that.")
    with pytest.raises(UserError, match=r"A row of 40 tokens does not fit on cpu; .* --preset 8gb is made for that"):
        prove_fit(student, config)


# --- gradients that repeat ------------------------------------------------------------------------------------------


def modes() -> tuple[int, bool]:
    return torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory


class Probe(torch.autograd.Function):
    """Notes under which modes its backward runs."""

    seen: tuple[int, bool] = (0, False)

    @staticmethod
    def forward(ctx, x, fails):
        ctx.fails = fails
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        Probe.seen = modes()
        if ctx.fails:
            raise RuntimeError("the backward failed")
        return grad.expand(3), None


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_the_backward_alone_is_deterministic(before, fails):
    x = torch.zeros(3, requires_grad=True)
    loss = Probe.apply(x, fails)
    outside = modes()
    torch.set_deterministic_debug_mode(before)
    try:
        if fails:
            with pytest.raises(RuntimeError, match="the backward failed"):
                backward(loss, CONFIG)
        else:
            backward(loss, CONFIG)
            assert x.grad.tolist() == [1, 1, 1]
        assert Probe.seen == (2, False)
        assert modes() == (before, outside[1])
    finally:
        torch.set_deterministic_debug_mode(outside[0])


def test_it_can_be_left_as_it_is():
    x = torch.zeros(3, requires_grad=True)
    backward(Probe.apply(x, False), dataclasses.replace(CONFIG, deterministic=False))
    assert Probe.seen == modes()


def test_nothing_else_calls_a_backward():
    root = Path(__file__).parent.parent
    files = [root / "train.py", *(root / "lite_mentor").rglob("*.py")]
    calls = {f.name: len(re.findall(r"\.backward\(\)", f.read_text(encoding="utf-8"))) for f in files}
    assert {name: n for name, n in calls.items() if n} == {"loss.py": 3}  # two calls, and the docstring that names them


def test_a_workspace_that_cublas_does_not_repeat_with_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'.*--no-deterministic"):
        check_backend(dataclasses.replace(CONFIG, device="cuda"))
    check_backend(dataclasses.replace(CONFIG, device="cuda", deterministic=False))
    check_backend(CONFIG)


def repeated_gradients(dtype: str, checkpointing: bool, device: str) -> list[list[torch.Tensor]]:
    found = load_student(
        "tiny", quant="none", dtype=dtype, lora_rank=4, device=device, gradient_checkpointing=checkpointing
    )
    torch.manual_seed(0)
    for parameter in found.trainable():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    (row,) = pack(episodes() * 8, ADVANTAGES * 8, 1000)
    config = dataclasses.replace(CONFIG, device=device, beta=0.1, entropy=0.01)
    grads = []
    for _ in range(3):
        backward(batch_loss(found, row, config).loss, config)
        grads.append([p.grad for p in found.trainable()])
        for p in found.trainable():
            p.grad = None
    return grads


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_repeat_bit_for_bit(dtype, checkpointing, device):
    """Forty rollouts of two prompts: what they share collects gradients from all of them."""
    first, *again = repeated_gradients(dtype, checkpointing, device)
    assert any(g.abs().max() > 0 for g in first)
    assert all(torch.equal(a, b) for grads in again for a, b in zip(first, grads, strict=True))
