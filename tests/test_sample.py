"""Sampling: both backends against a float64 race on every trap, what a row's bits depend on, and garbage."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mentor_kernels import sample
from mentor_kernels.sample import BLOCK, SampleOut, _sample, _seeds, noise
from sample_checks import SampleCase, check_sample, cut_cases, exponentials, sample_cases, uniforms

MODULE = sys.modules["mentor_kernels.sample"]
triton_sample = partial(sample, backend="triton")
torch_sample = partial(sample, backend="torch")
NAMES = [case.name for case in sample_cases(torch.float32, 400)]


@pytest.fixture(params=["torch", "triton"])
def draw(request, kernel_device):
    """`sample` of one backend, on the device that is tested; results on the CPU."""

    def run(logits_BV, uniform_B, **options) -> SampleOut:
        uniform_B = torch.as_tensor(uniform_B, dtype=torch.float64)
        out = sample(logits_BV.to(kernel_device), uniform_B.to(kernel_device), backend=request.param, **options)
        return SampleOut(*(x.cpu() for x in out))

    return run


# --- garbage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "uniform", "options", "sentence"),
    [
        (torch.zeros(3), torch.zeros(3), {}, r"or float16 \[B, V\], not torch.float32 \(3,\)"),
        (torch.zeros(2, 3).double(), torch.zeros(2), {}, "not torch.float64"),
        (torch.zeros(2, 0), torch.zeros(2), {}, "a vocabulary has 1 to 4194304 tokens, not 0"),
        (torch.zeros(1, 1).expand(1, 2**22 + 1), torch.zeros(1), {}, "not 4194305"),
        (torch.zeros(2, 3), torch.zeros(3), {}, r"or float64 \[2\], not torch.float32 \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {}, "not torch.int64"),
        (torch.zeros(2, 3), torch.zeros(2, device="meta"), {}, "uniform_B is on meta, but logits_BV on cpu"),
        (torch.zeros(2, 3), torch.zeros(2), dict(temperature=-1.0), "temperature must be finite and not negative"),
        (torch.zeros(2, 3), torch.zeros(2), dict(temperature=math.nan), "temperature must be finite"),
        (torch.zeros(2, 3), torch.zeros(2), dict(temperature=math.inf), "temperature must be finite"),
        (torch.zeros(2, 3), torch.zeros(2), dict(top_k=-1), "top_k must not be negative"),
        (torch.zeros(2, 3), torch.zeros(2), dict(top_p=0.0), r"top_p lie in \(0, 1\]"),
        (torch.zeros(2, 3), torch.zeros(2), dict(backend="cuda"), "backend must be"),
    ],
)
def test_what_has_no_meaning_is_refused(logits, uniform, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(logits, uniform, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes bf16")
def test_the_interpreter_is_not_trusted_with_bf16():
    with pytest.raises(ValueError, match="interpreter computes garbage from bfloat16"):
        triton_sample(torch.zeros(1, 3, dtype=torch.bfloat16), torch.zeros(1))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("columns", [1, 10, 300, BLOCK + 300])
def test_a_row_without_a_distribution_spoils_itself_alone(draw, columns, temperature):
    logits = torch.zeros(6, columns)
    logits[0, columns // 2] = math.nan
    logits[1, -1] = math.inf
    logits[2] = -math.inf
    logits[3] = math.nan
    token_B, logprob_B = draw(logits, [0.985] * 6, temperature=temperature)
    assert token_B[:4].tolist() == [0] * 4
    assert logprob_B[:4].isnan().all()
    lots = exponentials(torch.tensor([0.985], dtype=torch.float64), columns)  # equal logits: the smallest wins
    want = 0 if temperature == 0 else int(lots.argmin())
    assert token_B[4:].tolist() == [want] * 2
    assert logprob_B[4:].tolist() == pytest.approx([-math.log(columns)] * 2, abs=1e-5)


def test_uniforms_outside_count_as_the_nearest_inside(draw):
    logits = torch.zeros(4, 300)
    inside = draw(logits, [0.0, *[1 - 2**-53] * 3]).token_B
    assert inside[0] != inside[1]
    assert torch.equal(draw(logits, [-0.5, 1.0, 7.0, math.inf]).token_B, inside)


def test_no_rows(draw):
    token_B, logprob_B = draw(torch.zeros(0, 5), [])
    assert (token_B.shape, token_B.dtype, logprob_B.shape, logprob_B.dtype) == ((0,), torch.int64, (0,), torch.float32)


# --- against float64 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_against_float64(dtype, i):
    cases = sample_cases(dtype, 384)
    if i < len(cases):
        check_sample(torch_sample, cases[i])


@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernel_against_float64(kernel_device, dtype, i):
    cases = sample_cases(dtype, BLOCK)
    if i < len(cases):
        check_sample(triton_sample, cases[i], kernel_device)


@pytest.mark.gpu
@pytest.mark.parametrize("i", range(len(NAMES) - 1), ids=NAMES[:-1])
def test_the_kernel_against_float64_in_bf16(i):
    check_sample(triton_sample, sample_cases(torch.bfloat16, BLOCK)[i], "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_cut_in_torch_against_float64(dtype):
    for case in cut_cases(dtype, 384):
        check_sample(torch_sample, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_cut_in_the_kernel_against_float64(kernel_device, dtype):
    for case in cut_cases(dtype, BLOCK):
        check_sample(triton_sample, case, kernel_device)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 700), size=st.floats(0, 30),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]), share=st.floats(0, 0.99),
)  # fmt: skip
def test_any_row_against_float64(kernel_device, seed, columns, size, temperature, share):
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, columns, generator=make) * size
    off = torch.rand(6, columns, generator=make) < share
    off[:, torch.randint(columns, (1,), generator=make)] = False
    logits[off] = -math.inf
    case = SampleCase("random", logits, uniforms(6, make), temperature)
    check_sample(torch_sample, case)
    check_sample(triton_sample, case, kernel_device)


def test_the_race_by_hand(draw):
    """Murmur3 of seed 2^31 and of 3 x 2^30, as plain integers: E as below; the smallest E / p wins."""
    logits = torch.log(torch.tensor([[0.5, 0.0, 0.3, 0.2]]))
    assert noise(_seeds(torch.tensor([0.5, 0.75])), 4).tolist() == [
        pytest.approx([0.5563511, 1.341573, 0.07363149, 0.04914405], rel=1e-5),
        pytest.approx([0.6153646, 0.5678158, 0.6214983, 0.3805721], rel=1e-5),
    ]
    # 1.11, -, 0.245, 0.246 and 1.23, -, 2.07, 1.90
    token_B, logprob_B = draw(logits.expand(2, -1), [0.5, 0.75])
    assert token_B.tolist() == [2, 0]
    assert logprob_B.tolist() == pytest.approx([math.log(0.3), math.log(0.5)], abs=1e-6)


def test_the_reported_logprob_is_that_of_the_temperature_and_of_all_tokens(draw):
    logits = torch.log(torch.tensor([[0.5, 0.1, 0.3, 0.1]]))
    squares = [0.25, 0.01, 0.09, 0.01]

    def one(uniform: float, **options) -> tuple[int, float]:
        token_B, logprob_B = draw(logits, [uniform], **options)
        return token_B.item(), pytest.approx(logprob_B.item(), abs=1e-6)

    assert one(0.45) == (3, math.log(0.1))
    assert one(0.65) == (2, math.log(0.3))
    assert one(0.65, temperature=0.5) == (0, math.log(0.25 / sum(squares)))
    assert one(0.45, top_k=2) == (0, math.log(0.5))
    assert one(0.65, top_p=0.79) == (2, math.log(0.3))
    assert one(0.65, temperature=0.5, top_k=2) == (0, math.log(0.25 / sum(squares)))
    assert one(0.7, temperature=0.5, top_k=2) == (2, math.log(0.09 / sum(squares)))
    assert one(0.65, temperature=0) == (0, math.log(0.5))


@given(
    st.lists(st.floats(-9, 9), min_size=1, max_size=9),
    st.integers(0, 10),
    st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99, 1.0]),
)
@example([0.0, 0.0, 0.0, 0.0, 0.0, 7.25, -8.0], 0, 1.0)
@settings(max_examples=200)
def test_what_truncation_keeps_by_its_definition(row, top_k, top_p):
    """Walk down the tokens: at most top_k of them, until those before hold top_p; those as likely as the last, too."""
    logits = torch.tensor([row])
    order = sorted(range(len(row)), key=lambda v: -logits[0, v].item())[: top_k or None]
    p = logits[0, order].softmax(0)
    # All together may round to 1 before the last.
    kept = [v for i, v in enumerate(order) if i == 0 or top_p == 1 or float(p.cumsum(0)[i] - p[i]) < top_p]
    assert MODULE.least_logits(logits, 1.0, top_k, top_p).item() == logits[0, kept[-1]].item()


def test_truncation_leaves_a_nan_to_the_row_that_has_it():
    logits = torch.tensor([[1.0, torch.nan, 0.0], [1.0, 2.0, 0.0]])
    token, logp = sample(logits, torch.tensor([0.5, 0.5]), top_k=2, top_p=0.5)
    assert logp.isnan().tolist() == [True, False]
    assert token[1] == 1


@pytest.mark.parametrize("probabilities", [[0.5, 0.2, 0.2, 0.09, 0.0099, 0.0001], [0.001, 0.999], [0.25] * 4], ids=str)
@pytest.mark.parametrize("grid", [False, True])
def test_frequencies_follow_the_distribution(probabilities, grid):
    """Within five standard deviations, for uniforms at random and for one after another."""
    p, n = torch.tensor(probabilities, dtype=torch.float64), 200_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    uniform = (torch.arange(n) + 0.5) / n if grid else uniform
    counted = torch.bincount(torch_sample(p.log().float().expand(n, -1), uniform).token_B, minlength=len(p))
    assert ((counted - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


def test_the_noise_is_exponential_and_independent():
    """64 rows of 20,000 tokens: quantiles, and correlations between neighbours, rows and distant tokens."""
    noise_BV = noise(_seeds(torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(4))), 20_000)
    values = noise_BV.flatten().double()
    n = values.numel()
    assert 0 < values.min() < 1e-5 < 12 < values.max() < 17
    for q in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        assert float((values < -math.log1p(-q)).double().mean()) == pytest.approx(q, abs=5 * math.sqrt(q * (1 - q) / n))
    centred = noise_BV.double() - 1  # variance 1
    for a, b in (
        (centred[:, 1:], centred[:, :-1]),
        (centred[1:], centred[:-1]),
        (centred[:, 4096:], centred[:, :-4096]),
    ):
        assert float((a * b).mean()) == pytest.approx(0, abs=5 / math.sqrt(a.numel()))


def test_a_small_change_of_the_logits_rarely_changes_the_token():
    """About as often as the two distributions differ; an inverse CDF changes ten times as many here."""
    make = torch.Generator().manual_seed(6)
    logits = torch.randn(4000, 500, generator=make) * 2
    other = logits + 0.02 * torch.randn(4000, 500, generator=make)
    uniform = torch.rand(4000, generator=make, dtype=torch.float64)
    changed = (torch_sample(logits, uniform).token_B != torch_sample(other, uniform).token_B).double().mean()
    distance = 0.5 * (logits.softmax(-1) - other.softmax(-1)).abs().sum(-1).mean()
    assert 0.5 * distance < changed < 2.5 * distance
    by_cdf = [torch.searchsorted(x.double().softmax(-1).cumsum(-1), uniform[:, None])[:, 0] for x in (logits, other)]
    assert (by_cdf[0] != by_cdf[1]).double().mean() > 5 * changed


def test_a_confident_logprob_keeps_its_digits(kernel_device):
    """From a margin of 17 nats on, z - logsumexp(z) in float32 is 0."""
    logits = torch.tensor([[0.0, 5.0], [10.0, 0.0], [17.5, 0.0]], device=kernel_device)
    _, logprob_B = triton_sample(logits, torch.full((3,), 0.5, device=kernel_device))
    for found, margin in zip(logprob_B.tolist(), (5, 10, 17.5), strict=True):
        assert found == pytest.approx(-math.log1p(math.exp(-margin)), rel=1e-4, abs=0)


# --- what the bits depend on ---------------------------------------------------------------------------------------


def same_bits(found: SampleOut, want: SampleOut) -> bool:
    return torch.equal(found.token_B, want.token_B) and torch.equal(found.logprob_B, want.logprob_B)


def some(columns: int = BLOCK + 37) -> tuple[torch.Tensor, torch.Tensor]:
    make = torch.Generator().manual_seed(5)
    return torch.randn(12, columns, generator=make) * 3, torch.rand(12, generator=make, dtype=torch.float64)


def test_a_token_depends_on_its_row_alone(draw):
    logits, uniform = some()
    whole = draw(logits, uniform, temperature=0.8)
    assert same_bits(draw(logits, uniform, temperature=0.8), whole)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 12), torch.randperm(12)):
        part = draw(logits[rows], uniform[rows], temperature=0.8)
        assert same_bits(part, SampleOut(*(x[rows] for x in whole)))


def test_any_layout(draw):
    logits, uniform = some(500)
    whole = draw(logits, uniform)
    odd = [logits.T.contiguous().T, logits.repeat_interleave(2, 1)[:, ::2], torch.cat([logits, logits], 1)[:, :500]]
    assert all(same_bits(draw(x, uniform), whole) for x in odd)
    assert same_bits(draw(logits[:1].expand(3, -1), uniform[:1].expand(3)), SampleOut(*(x[[0] * 3] for x in whole)))


@pytest.mark.parametrize("block", [512, 2048, 2 * BLOCK])
def test_the_kernels_blocks_cannot_matter(kernel_device, block, monkeypatch):
    logits, uniform = (x.to(kernel_device) for x in some())
    whole = triton_sample(logits, uniform, temperature=0.8)
    monkeypatch.setattr(MODULE, "BLOCK", block)
    assert same_bits(triton_sample(logits, uniform, temperature=0.8), whole)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operator_is_what_it_says_to_the_compiler(kernel_device, backend):
    logits, uniform = (x.to(kernel_device) for x in some(300))
    torch.library.opcheck(_sample, (logits, uniform, None, 1.0, backend))
    torch.library.opcheck(_sample, (logits, uniform, logits.amax(1) - 1, 1.0, backend))
