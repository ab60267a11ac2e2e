"""K1 against its definition written column by column: every column of a tile is masked and compared, as int64.

The kernel looks for what does not count only where a tile has some. That may not move a bit, so here the products with
the head are exact in any order, and in the interpreter both sides are numpy's exp and sum. On a GPU they round apart.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from kernel_checks import poisoned_memory
from mentor_kernels.linear_logprob import (
    BARRED,
    STATISTICS_TILE,
    Head,
    Rows,
    _planes,
    _workspace,
    new_rows,
    score_chunk,
)

R, H = 40, 24
TEMPERATURE, SCALE = 0.7, 1.25


def scaled(dot: np.ndarray, softcap: float | None) -> np.ndarray:
    """z from the products with the head, as the kernel's `_scaled`."""
    if softcap is None:
        return dot * np.float32(SCALE / TEMPERATURE)
    x = dot * np.float32(SCALE / softcap)
    u = np.exp(np.float32(-2) * np.abs(x))
    tanh = (1 - u) / (1 + u)
    return np.where(x < 0, -tanh, tanh) * np.float32(softcap / TEMPERATURE)


def definition(dots: list[np.ndarray], targets: np.ndarray, softcap: float | None, dtype: torch.dtype) -> dict:
    """m, s, a and e of each row and tile without the target, and the target's z; with a second product its own too."""
    V, found = dots[0].shape[1], {}
    column = np.arange(-(-V // STATISTICS_TILE) * STATISTICS_TILE, dtype=np.int64)
    inside, own = column < V, column == targets[:, None]
    z, *of_reference = (scaled(np.pad(dot, ((0, 0), (0, len(column) - V))), softcap) for dot in dots)
    other = inside & ~own
    tiles = partial(np.split, indices_or_sections=len(column) // STATISTICS_TILE, axis=1)

    def by_tile(of, *arrays):
        return np.stack([of(*parts) for parts in zip(*map(tiles, arrays), strict=True)])

    def statistics(z, counts):
        z = np.where(counts, z, np.float32(BARRED))
        shifted = np.concatenate([part - part.max(1, keepdims=True) for part in tiles(z)], 1)
        return z, np.where(counts, np.exp(shifted), np.float32(0)), shifted

    barred, e, shifted = statistics(z, other)
    total = partial(np.sum, axis=1)
    found |= dict(m=by_tile(partial(np.max, axis=1), barred), s=by_tile(total, e))
    found |= dict(a=by_tile(total, np.where(other, e * shifted, np.float32(0))), e=e.astype(np.float32))
    known = (targets >= 0) & (targets < V)
    found["target_z"] = np.where(known, np.where(own & inside, z, np.float32(0)).sum(1), np.float32(np.nan))
    for ref_z in of_reference:
        d = z - ref_z
        ref_barred, ref_e, _ = statistics(ref_z, inside)
        found |= dict(ref_m=by_tile(partial(np.max, axis=1), ref_barred), ref_s=by_tile(total, ref_e))
        found |= dict(drift=by_tile(total, e * d), d=d)
        found["target_d"] = np.where(known, np.where(own & inside, d, np.float32(0)).sum(1), np.float32(np.nan))
    found = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()}
    return found | {name: found[name].to(dtype) for name in ("e", "d") if name in found}


def by_kernel(hidden, ref_hidden, weight, targets, softcap, store: bool) -> dict:
    reference = ref_hidden is not None
    with poisoned_memory():
        space = _workspace(hidden, len(weight), store, reference)
        rows: Rows = new_rows(hidden, reference)
        score_chunk(hidden, targets, Head(weight, TEMPERATURE, softcap, SCALE), space, rows, ref_hidden)
    found = dict(zip("msa", _planes(space.statistics_3TR, len(hidden)), strict=True)) | dict(target_z=rows.target_z_R)
    if store:
        found["e"] = space.e_RV
    if reference:
        found |= dict(zip(("ref_m", "ref_s", "drift"), _planes(space.divergence_3TR, len(hidden)), strict=True))
        found |= dict(target_d=rows.target_d_R) | (dict(d=space.d_RV) if store else {})
    return {name: value.cpu() for name, value in found.items()}


def targets_of(kind: str, V: int) -> torch.Tensor:
    last = STATISTICS_TILE - 1
    return {
        "anywhere": torch.randint(V, (R,), generator=torch.Generator().manual_seed(0)),
        "all the last of all": torch.full((R,), V - 1),
        "the last and first of tiles": torch.tensor([last, last + 1, 0, V - 1] * (R // 4)),
        "outside": torch.tensor([-1, V, V + 5, 2**32, 2**32 + 3, -(2**32) + 1, 7, -(2**62)] * (R // 8)),
    }[kind]


@pytest.mark.parametrize("kind", ["anywhere", "all the last of all", "the last and first of tiles", "outside"])
@pytest.mark.parametrize("V", [257, 300, 384])
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "reference"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("store", [False, True], ids=["score", "store"])
def test_a_tile_has_the_bits_of_its_definition(kernel_device, kind, V, reference, softcap, store):
    make, targets = torch.Generator().manual_seed(V), targets_of(kind, V)
    for dtype in (torch.float32, torch.float16, *([torch.bfloat16] if kernel_device == "cuda" else [])):
        hidden, ref_hidden = torch.randint(-8, 9, (2, R, H), generator=make) / 8
        weight = torch.randint(-8, 9, (V, H), generator=make) / 8
        given = [x.to(kernel_device, dtype) for x in (hidden, ref_hidden, weight)]
        found = by_kernel(
            given[0], given[1] if reference else None, given[2], targets.to(kernel_device), softcap, store
        )
        dots = [(x @ weight.T).numpy() for x in (hidden, ref_hidden)[: 1 + reference]]
        wanted = definition(dots, targets.numpy(), softcap, dtype)
        assert set(found) == set(wanted) - (set() if store else {"e", "d"})
        for name, value in found.items():
            rtol = 0 if kernel_device == "cpu" else 1e-5 if value.dtype is torch.float32 else 1e-2
            torch.testing.assert_close(value, wanted[name], rtol=rtol, atol=10 * rtol, equal_nan=True, msg=name)
