"""The tiles that the head's gradient leaves out: no row loses more than it may, and its error keeps the bound."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import HeadCase, check_active_tiles, head_case, poisoned_memory, weight_cases
from mentor_kernels import Normaliser, PolicyLossConfig, linear_logprob, linear_policy_loss
from mentor_kernels.active_tiles import ActiveTiles, active_tiles, tile_weights
from mentor_kernels.linear_logprob import STATISTICS_TILE

MODULE = sys.modules["mentor_kernels.linear_logprob"]

# --- which tiles ---------------------------------------------------------------------------------------------------


def test_tiles_worked_by_hand():
    """Rows 0 and 2 have their weight in tile 1, row 1 in all of them, row 3 has none."""
    weight_TR = torch.tensor([[0.0625, 0.25, 0.0, 0.0], [0.875, 0.25, 1.0, 0.0], [0.0625, 0.5, 0.0, 0.0]])
    found = active_tiles(weight_TR, drop_mass=0.125, block_rows=2)
    assert found.order_R.tolist() == [2, 0, 1, 3]  # 1, 3, 3 and no tiles above 0.125 / 3
    assert found.tiles_BT.tolist() == [[1, 3, 3], [0, 1, 2]]  # 0.0625 + 0.0625 is what a row may lose
    assert found.counts_B.tolist() == [1, 3]
    assert active_tiles(weight_TR, drop_mass=0.124, block_rows=2).counts_B.tolist() == [2, 3]


@pytest.mark.parametrize("block_rows", [1, 16, 128])
@pytest.mark.parametrize("drop_mass", [0.0, 1e-9, 1e-3, 0.2, 0.999])
@pytest.mark.parametrize("name", weight_cases())
def test_no_row_loses_more_than_it_may(kernel_device, name, drop_mass, block_rows):
    check_active_tiles(active_tiles, weight_cases()[name].to(kernel_device), drop_mass, block_rows)


@settings(max_examples=50)
@given(
    T=st.integers(1, 40),
    R=st.integers(1, 40),
    peak=st.floats(0, 30),
    drop_mass=st.floats(0, 0.999),
    block_rows=st.sampled_from([1, 4, 64]),
    seed=st.integers(0, 99),
)
def test_no_row_of_any_distribution_loses_more(T, R, peak, drop_mass, block_rows, seed):
    logits_TR = peak * torch.randn(T, R, generator=torch.Generator().manual_seed(seed))
    check_active_tiles(active_tiles, logits_TR.softmax(0), drop_mass, block_rows)


# --- the gradient without the others -------------------------------------------------------------------------------


@dataclass
class Recorded:
    """What one gradient was made of: slopes (None where c is 1), weights, tiles; of a single chunk of rows."""

    by_logprob_R: torch.Tensor | None
    by_entropy_R: torch.Tensor | None
    weight_TR: torch.Tensor
    tiles: ActiveTiles
    block_rows: int

    def kept_RT(self) -> torch.Tensor:
        order_R, tiles_BT, counts_B = (x.cpu() for x in self.tiles)
        T = tiles_BT.shape[1]
        kept_BT = F.one_hot(tiles_BT.long(), T + 1)[:, :, :T].sum(1).bool()
        assert kept_BT.sum(1).tolist() == counts_B.tolist()
        kept_RT = torch.empty(len(order_R), T, dtype=torch.bool)
        kept_RT[order_R] = kept_BT.repeat_interleave(self.block_rows, 0)[: len(order_R)]
        return kept_RT

    def slopes_R(self) -> tuple[torch.Tensor, torch.Tensor]:
        """c and b, float64."""
        R = self.weight_TR.shape[1]
        c_R = torch.ones(R) if self.by_logprob_R is None else self.by_logprob_R
        b_R = torch.zeros(R) if self.by_entropy_R is None else self.by_entropy_R
        return c_R.cpu().double(), b_R.cpu().double()


@pytest.fixture
def recorded(monkeypatch) -> list[Recorded]:
    calls = []

    def weights(statistics_3TR, top_R, log_total_R, entropy_R, by_logprob_R=None, by_entropy_R=None):
        weight_TR = tile_weights(statistics_3TR, top_R, log_total_R, entropy_R, by_logprob_R, by_entropy_R)
        calls.append(Recorded(by_logprob_R, by_entropy_R, weight_TR, None, 0))
        return weight_TR

    def tiles(weight_TR, drop_mass, block_rows):
        calls[-1].tiles, calls[-1].block_rows = active_tiles(weight_TR, drop_mass, block_rows), block_rows
        return calls[-1].tiles

    monkeypatch.setattr(MODULE, "tile_weights", weights)
    monkeypatch.setattr(MODULE, "active_tiles", tiles)
    return calls


ROWS = 200


def peaked_case(dtype: torch.dtype, **options) -> HeadCase:
    """From rows that are sure to rows undecided between 11 tiles. The sure share four tiles; half have their target."""
    case = head_case("", dtype, N=ROWS, V=10 * STATISTICS_TILE + 37, H=40, seed=3, **options)
    make = torch.Generator().manual_seed(4)
    tile_N = torch.tensor([0, 3, 4, 9])[torch.randint(0, 4, (ROWS,), generator=make)]
    topic_N = tile_N * STATISTICS_TILE + torch.randint(0, STATISTICS_TILE, (ROWS,), generator=make)
    hidden_NH = case.weight_VH[topic_N] * torch.linspace(60, 4, ROWS)[:, None].to(dtype)
    targets_N = torch.where(torch.arange(ROWS) % 2 == 0, topic_N, case.targets_N)
    return replace(case, hidden_NH=hidden_NH, targets_N=targets_N)


def dense_gradient(case: HeadCase, c_R, b_R, kept_RT=None) -> torch.Tensor:
    """d (c logprob + b entropy) / d hidden, float64; without the columns of the tiles that a row does not keep.

    The target's coefficient is the sum of those kept, but under a softcap of all: K3's row sums are not known there.
    """
    hidden_NH, weight_VH = case.hidden_NH.detach().double(), case.weight_VH.double()
    softcap = case.options.get("softcap")
    temperature, scale = (case.options.get(name, 1.0) for name in ("temperature", "scale"))
    logits_NV = scale * hidden_NH @ weight_VH.T
    slope_NV = torch.ones_like(logits_NV)
    if softcap is not None:
        tanh_NV = torch.tanh(logits_NV / softcap)
        logits_NV, slope_NV = softcap * tanh_NV, 1 - tanh_NV**2
    log_p_NV = (logits_NV / temperature).log_softmax(1)
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(1)
    by_z_NV = -log_p_NV.exp() * (c_R[:, None] + b_R[:, None] * (log_p_NV + entropy_N[:, None]))
    target_N1 = case.targets_N[:, None]
    by_z_NV.scatter_(1, target_N1, 0)
    own_N1 = -by_z_NV.sum(1, keepdim=True)
    if kept_RT is not None:
        by_z_NV *= kept_RT.repeat_interleave(STATISTICS_TILE, 1)[:, : by_z_NV.shape[1]]
    by_z_NV.scatter_(1, target_N1, -by_z_NV.sum(1, keepdim=True) if softcap is None else own_N1)
    return (by_z_NV * slope_NV) @ weight_VH * (scale / temperature)


def check_recorded(case: HeadCase, found_NH: torch.Tensor, call: Recorded, drop_mass: float) -> None:
    """A gradient is the dense one without the tiles left out, and off by no more than the bound, but by 1 % of it."""
    c_R, b_R = call.slopes_R()
    kept_RT = call.kept_RT()
    exact_NH, without_NH = dense_gradient(case, c_R, b_R), dense_gradient(case, c_R, b_R, kept_RT)
    size_R = torch.maximum(c_R.abs(), b_R.abs())
    most = float(case.weight_VH.double().norm(dim=1).max()) * abs(case.options.get("scale", 1.0))
    bound_R = 2 * drop_mass * size_R * most / case.options.get("temperature", 1.0)
    assert bool(((without_NH - exact_NH).norm(dim=1) <= bound_R).all())
    assert not bool(((without_NH - exact_NH).norm(dim=1) <= bound_R / 100).all()), "the check could not fail"
    rounding = 2e-3 if case.hidden_NH.dtype is torch.float16 else 1e-5
    error = (found_NH.cpu().double() - without_NH).norm(dim=1)
    assert bool((error <= rounding * (without_NH.norm(dim=1) + 1e-3)).all()), float(error.max())
    assert 0.02 < float(kept_RT.double().mean()) < 0.9


OPTIONS = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "softcap": dict(softcap=30.0, scale=0.5, temperature=0.4),
}


@pytest.mark.parametrize(("dtype", "drop_mass"), [(torch.float32, 3e-2), (torch.float16, 1e-4)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_of_logprobs_is_off_by_no_more_than_the_bound(kernel_device, recorded, dtype, options, drop_mass):
    case = peaked_case(dtype, **options)
    found_NH, logprob_N, entropy_N = gradient(case, kernel_device, torch.ones(ROWS), torch.zeros(ROWS), drop_mass)
    (call,) = recorded
    check_recorded(case, found_NH, call, drop_mass)
    _, want_logprob_N, want_entropy_N = gradient(case, kernel_device, torch.ones(ROWS), torch.zeros(ROWS), 0.0)
    assert torch.equal(logprob_N, want_logprob_N)
    assert torch.equal(entropy_N, want_entropy_N)


def gradient(case: HeadCase, device: str, by_logprob_N, by_entropy_N, drop_mass: float) -> tuple[torch.Tensor, ...]:
    """(gradient, logprob, entropy)."""
    hidden = case.hidden_NH.to(device).requires_grad_()
    with poisoned_memory():
        out = linear_logprob(
            hidden, case.weight_VH.to(device), case.targets_N.to(device), **case.options, drop_mass=drop_mass,
            backend="triton",
        )  # fmt: skip
        mixed_N = out.logprob_N * by_logprob_N.to(device)
        if by_entropy_N.any():
            mixed_N = mixed_N + out.entropy_N * by_entropy_N.to(device)
        return torch.autograd.grad(mixed_N.sum(), hidden)[0], out.logprob_N.detach(), out.entropy_N.detach()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_of_entropies_is_off_by_no_more_than_the_bound(kernel_device, recorded, options):
    case, drop_mass = peaked_case(torch.float32, **options), 1e-3
    by_entropy_N = torch.linspace(-1, 1, ROWS)
    found_NH, *_ = gradient(case, kernel_device, torch.zeros(ROWS), by_entropy_N, drop_mass)
    assert [call.by_entropy_R is None for call in recorded] == [True, False]
    check_recorded(case, found_NH, recorded[1], drop_mass)


def policy_gradient(case: HeadCase, device: str, drop_mass: float, advantage_N=None, **fields):
    """(output, gradient) of the fused loss; a hundred tokens have no advantage."""
    hidden = case.hidden_NH.to(device).requires_grad_()
    if advantage_N is None:
        advantage_N = torch.linspace(-2, 1, ROWS).masked_fill(torch.arange(ROWS) % 3 == 1, 0.0)
    with poisoned_memory():
        out = linear_policy_loss(
            hidden, case.weight_VH.to(device), case.targets_N.to(device), old_logp_N=None,
            advantage_N=advantage_N.to(device), sequence_N=(torch.arange(ROWS) // 50).to(device), **case.options,
            config=PolicyLossConfig(tis_cap=None, **fields), normaliser=Normaliser(5, 1), drop_mass=drop_mass,
            backend="triton",
        )  # fmt: skip
        out.loss.backward()
    return out, hidden.grad


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_gradient_of_the_loss_is_off_by_no_more_than_the_bound(kernel_device, recorded, options, entropy_coef):
    case, drop_mass = peaked_case(torch.float32, **options), 1e-3
    out, found_NH = policy_gradient(case, kernel_device, drop_mass, entropy_coef=entropy_coef)
    (call,) = recorded
    check_recorded(case, found_NH, call, drop_mass)
    whole, _ = policy_gradient(case, kernel_device, 0.0, entropy_coef=entropy_coef)
    assert out.loss.item() == whole.loss.item()
    assert {name: value.item() for name, value in out.metrics.items()} == {
        name: value.item() for name, value in whole.metrics.items()
    }
    if not entropy_coef:
        assert not found_NH[torch.arange(ROWS) % 3 == 1].any()  # rows without an advantage


def test_a_row_of_nan_stays_alone(kernel_device):
    case = peaked_case(torch.float32)
    case.hidden_NH[7, 3] = torch.nan
    found_NH, *_ = gradient(case, kernel_device, torch.ones(ROWS), torch.zeros(ROWS), 1e-3)
    assert found_NH.isnan().any(1).nonzero()[:, 0].tolist() == [7]
    slope_N = torch.ones(ROWS)
    slope_N[9] = torch.nan
    _, found_NH = policy_gradient(peaked_case(torch.float32), kernel_device, 1e-3, advantage_N=slope_N)
    assert found_NH.isnan().any(1).nonzero()[:, 0].tolist() == [9]


def test_the_rest_of_the_head_is_not_read(kernel_device, recorded):
    """What saves the time: a NaN in a tile that no row needs is never met."""
    case = peaked_case(torch.float32)
    case = replace(case, hidden_NH=case.hidden_NH[:64], targets_N=case.targets_N[:64] % STATISTICS_TILE)
    ones = torch.ones(64)
    want_NH, *_ = gradient(case, kernel_device, ones, 0 * ones, 0.1)
    (call,) = recorded
    unread_T = ~call.kept_RT().any(0)
    assert int(unread_T.sum()) > 6
    at_scoring = MODULE.score_chunk

    def spoil(hidden_RH, targets_R, head, *rest):
        at_scoring(hidden_RH, targets_R, head, *rest)
        head.weight_VH[unread_T.repeat_interleave(STATISTICS_TILE)[: len(head.weight_VH)]] = torch.nan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "score_chunk", spoil)
        found_NH, *_ = gradient(replace(case, weight_VH=case.weight_VH.clone()), kernel_device, ones, 0 * ones, 0.1)
    assert torch.equal(found_NH, want_NH)


def test_the_torch_backend_leaves_nothing_out():
    case = peaked_case(torch.float32)
    found = []
    for drop_mass in (0.0, 0.5):
        hidden = case.hidden_NH.clone().requires_grad_()
        out = linear_logprob(hidden, case.weight_VH, case.targets_N, drop_mass=drop_mass, backend="torch")
        found.append(torch.autograd.grad((out.logprob_N + out.entropy_N).sum(), hidden)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("drop_mass", [-1e-9, 1.0, float("nan"), float("inf")])
def test_a_mass_outside_the_range_is_refused(drop_mass):
    case = peaked_case(torch.float32)
    with pytest.raises(ValueError, match=r"drop_mass must lie in \[0, 1\), not"):
        linear_logprob(case.hidden_NH, case.weight_VH, case.targets_N, drop_mass=drop_mass)
    with pytest.raises(ValueError, match=r"drop_mass must lie in \[0, 1\), not"):
        policy_gradient(case, "cpu", drop_mass)


def test_the_exact_kl_has_no_bound():
    with pytest.raises(ValueError, match="drop_mass bounds no error with kl = 'exact'"):
        policy_gradient(peaked_case(torch.float32), "cpu", 1e-3, kl="exact")
