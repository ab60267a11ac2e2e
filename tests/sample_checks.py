"""The checker that every implementation of `sample` must pass, and that wrong ones must fail.

The reference runs the same race in float64, on noise made with unsigned integers. Only tokens within SLACK of the
winner may win in its place, for that is what float32 gets wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from kernel_checks import poisoned_memory

SLACK = 2e-5
"""Of a score, which reaches some tens: a few units in the last place of a float32."""


@dataclass(frozen=True)
class SampleCase:
    name: str
    logits_BV: torch.Tensor
    uniform_B: torch.Tensor
    temperature: float = 1.0
    cut: dict = field(default_factory=dict)
    """top_k and top_p."""


def exponentials(uniform_B: torch.Tensor, columns: int) -> torch.Tensor:
    """The noise of each row and token, float64 [B, columns]: murmur3's finaliser of u's first 32 bits and the token."""
    seed_B1 = (uniform_B.numpy() * 2.0**32).astype(np.uint64)[:, None]
    mask = np.uint64(0xFFFFFFFF)
    x = (seed_B1 + np.arange(columns, dtype=np.uint64) * np.uint64(0x9E3779B9)) & mask
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B) & mask
    x = (x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35) & mask
    x = x ^ (x >> np.uint64(16))
    u = np.minimum((x.astype(np.float64) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return torch.from_numpy(-np.log1p(-u))


def uniforms(rows: int, make: torch.Generator) -> torch.Tensor:
    """The ends of [0, 1), and any."""
    uniform_B = torch.rand(rows, generator=make, dtype=torch.float64)
    uniform_B[:4] = torch.tensor([0.0, 2**-33, 1 - 2**-32, 1 - 2**-53], dtype=torch.float64)
    return uniform_B


def sample_cases(dtype: torch.dtype, block: int) -> list[SampleCase]:
    """One case for each trap; `block` is the number of columns that the implementation takes at once."""
    make = torch.Generator().manual_seed(0)

    def case(name: str, B: int = 16, V: int = block + 37, size: float = 2.0, temperature: float = 1.0, change=None):
        logits_BV = torch.randn(B, V, generator=make) * size
        if change is not None:
            change(logits_BV)
        logits_BV = logits_BV.to(dtype)
        return SampleCase(name, logits_BV, uniforms(B, make), temperature)

    def masked(*columns: slice) -> Callable[[torch.Tensor], None]:
        def change(logits_BV: torch.Tensor) -> None:
            for where in columns:
                logits_BV[:, where] = -math.inf

        return change

    def only_one(logits_BV: torch.Tensor) -> None:
        finite = torch.arange(len(logits_BV)) * 311 % logits_BV.shape[1]
        kept = logits_BV[torch.arange(len(logits_BV)), finite]
        logits_BV.fill_(-math.inf)
        logits_BV[torch.arange(len(logits_BV)), finite] = kept

    def confident(logits_BV: torch.Tensor) -> None:
        logits_BV[:, 77] = torch.linspace(8, 60, len(logits_BV))

    def ties(logits_BV: torch.Tensor) -> None:
        logits_BV.round_().clamp_(max=3)

    cases = [
        case("plain"),
        case("one block less one", V=block - 1),
        case("one block", V=block),
        case("one column more", V=block + 1),
        case("several blocks", V=3 * block + 5, size=1.0),
        case("few tokens", V=7, B=24),
        case("one token", V=1),
        case("cold", temperature=0.3, size=1.0),
        case("hot", temperature=3.0, size=8.0),
        case("all logits near -200", change=lambda x: x.sub_(200)),
        case("the first tokens cannot be", change=masked(slice(0, 300))),
        case("the last tokens cannot be", change=masked(slice(-300, None))),
        case("whole blocks cannot be", V=3 * block, change=masked(slice(0, block), slice(2 * block, None))),
        case("every second token cannot be", V=301, B=24, change=masked(slice(0, None, 2))),
        case("one finite logit", change=only_one),
        case("confident tokens", change=confident),
        case("greedy", temperature=0.0),
        case("greedy with ties", temperature=0.0, V=2 * block + 3, change=ties),
    ]
    if dtype is torch.float32:  # float16 cannot hold it
        cases.append(case("a common offset of 2^20", V=515, change=lambda x: x.round_().add_(2.0**20)))
    return cases


def cut_cases(dtype: torch.dtype, block: int) -> list[SampleCase]:
    """Races of the likeliest tokens alone, in rows of several blocks; the last has many that are equally likely."""
    make = torch.Generator().manual_seed(1)
    logits_BV = (torch.randn(6, 2 * block + 37, generator=make) * 3).to(dtype)
    ties_BV = logits_BV.float().round().clamp(max=8).to(dtype)
    options = [dict(top_k=2), dict(top_p=0.8), dict(top_k=20, top_p=0.9), dict(top_k=1), dict(top_k=10**6)]
    cases = [
        SampleCase(f"{cut} at {temperature}", logits_BV, uniforms(6, make), temperature, cut)
        for cut in options
        for temperature in (0.5, 3.0)
    ]
    return [
        *cases,
        SampleCase("a cut has no meaning for a greedy one", logits_BV, uniforms(6, make), 0.0, dict(top_k=5)),
        SampleCase("ties at the cut", ties_BV, uniforms(6, make), 1.0, dict(top_k=3)),
    ]


def kept(logits_BV: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Which tokens race: of the top_k those of the smallest set with top_p; and what is as likely as the last."""
    best_BK = logits_BV.double().sort(-1, descending=True).values[:, : top_k or None]
    p_BK = (best_BK / temperature).softmax(-1)
    count_B = (p_BK.cumsum(-1) - p_BK < top_p).sum(-1) if top_p < 1 else torch.full((len(best_BK),), best_BK.shape[1])
    return logits_BV.double() >= best_BK.gather(1, count_B[:, None] - 1)


def check_sample(operator: Callable, case: SampleCase, device: str = "cpu") -> None:
    """`operator(logits, uniform, temperature=, **cut) -> (token, logprob)` against float64 of the same logits."""
    with poisoned_memory():
        found = operator(case.logits_BV.to(device), case.uniform_B.to(device), temperature=case.temperature, **case.cut)
    token_B, logprob_B = (x.cpu() for x in found)
    B, V = case.logits_BV.shape
    assert (token_B.dtype, logprob_B.dtype, token_B.shape, logprob_B.shape) == (torch.int64, torch.float32, (B,), (B,))
    assert bool(((token_B >= 0) & (token_B < V)).all()), f"{case.name}: a token outside the vocabulary"
    wide_BV = case.logits_BV.double() / (case.temperature or 1.0)
    want_BV = wide_BV.log_softmax(-1)
    at_B1 = token_B[:, None]
    if case.temperature == 0:
        first_B = (wide_BV == wide_BV.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(token_B, first_B), f"{case.name}: not the first of the largest"
    else:
        score_BV = want_BV - exponentials(case.uniform_B, V).log()
        if case.cut:
            score_BV[~kept(case.logits_BV, case.temperature, **case.cut)] = -math.inf
        assert bool((want_BV.gather(1, at_B1) > -math.inf).all()), f"{case.name}: a token of probability 0"
        behind_B = score_BV.amax(-1) - score_BV.gather(1, at_B1)[:, 0]
        assert float(behind_B.max()) <= SLACK, f"{case.name}: the token lost its race by {float(behind_B.max()):.1e}"
    plain_BV = (case.logits_BV.float() / (case.temperature or 1.0)).log_softmax(-1)
    want_B1, own_B1 = want_BV.gather(1, at_B1), plain_BV.gather(1, at_B1)
    error, own = float((logprob_B[:, None] - want_B1).abs().max()), float((own_B1 - want_B1).abs().max())
    bound = 2 * own + 2e-6 * (1 + float(want_B1.abs().max()))
    assert error <= bound, f"{case.name}: logprob off by {error:.2e}, torch by {own:.2e}"
