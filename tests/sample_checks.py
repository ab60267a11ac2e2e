"""The checker that every implementation of `sample` must pass, and that wrong ones must fail.

The reference is the float64 CDF of the same logits. A token must be the one whose stretch of the CDF holds the uniform;
only a uniform within SLACK of a boundary may fall on the neighbour, for that is what float32 exponentials get wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_checks import poisoned_memory

SLACK = 1e-6


@dataclass(frozen=True)
class SampleCase:
    name: str
    logits_BV: torch.Tensor
    uniform_B: torch.Tensor
    temperature: float = 1.0


def uniforms(logits_BV: torch.Tensor, temperature: float, make: torch.Generator) -> torch.Tensor:
    """The ends of [0, 1), then points just beside boundaries of the row's own CDF, then any."""
    B, V = logits_BV.shape
    uniform_B = torch.rand(B, generator=make, dtype=torch.float64)
    cdf_BV = (logits_BV.double() / (temperature or 1.0)).softmax(-1).cumsum(-1)
    boundary_B = cdf_BV.gather(1, torch.randint(V, (B, 1), generator=make))[:, 0]
    beside_B = boundary_B + 3 * SLACK * (torch.arange(B) % 2 * 2 - 1)
    uniform_B[B // 2 :] = beside_B[B // 2 :].clamp(0, 1 - 2**-53)
    uniform_B[:4] = torch.tensor([0.0, 2**-53, 1 - 2**-24, 1 - 2**-53], dtype=torch.float64)
    return uniform_B


def sample_cases(dtype: torch.dtype, block: int) -> list[SampleCase]:
    """One case for each trap; `block` is the number of columns that the implementation takes at once."""
    make = torch.Generator().manual_seed(0)

    def case(name: str, B: int = 16, V: int = block + 37, size: float = 2.0, temperature: float = 1.0, change=None):
        logits_BV = torch.randn(B, V, generator=make) * size
        if change is not None:
            change(logits_BV)
        logits_BV = logits_BV.to(dtype)
        return SampleCase(name, logits_BV, uniforms(logits_BV, temperature, make), temperature)

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


def check_sample(operator: Callable, case: SampleCase, device: str = "cpu") -> None:
    """`operator(logits, uniform, temperature=) -> (token, logprob)` against float64 of the same logits."""
    with poisoned_memory():
        found = operator(case.logits_BV.to(device), case.uniform_B.to(device), temperature=case.temperature)
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
        p_BV = want_BV.exp()
        cdf_BV = p_BV.cumsum(-1)
        high_B, p_B = cdf_BV.gather(1, at_B1)[:, 0], p_BV.gather(1, at_B1)[:, 0]
        assert bool((p_B > 0).all()), f"{case.name}: a token of probability 0"
        beside_B = torch.maximum(high_B - p_B - case.uniform_B, case.uniform_B - high_B)
        assert float(beside_B.max()) <= SLACK, f"{case.name}: drawn {float(beside_B.max()):.1e} beside its stretch"
    plain_BV = (case.logits_BV.float() / (case.temperature or 1.0)).log_softmax(-1)
    want_B1, own_B1 = want_BV.gather(1, at_B1), plain_BV.gather(1, at_B1)
    error, own = float((logprob_B[:, None] - want_B1).abs().max()), float((own_B1 - want_B1).abs().max())
    bound = 2 * own + 2e-6 * (1 + float(want_B1.abs().max()))
    assert error <= bound, f"{case.name}: logprob off by {error:.2e}, torch by {own:.2e}"
