"""The checker that every implementation of `paged_attention` must pass, and that wrong ones must fail.

The reference gathers a row's tokens one by one, in order, and attends in float64.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from kernel_checks import poisoned_memory
from mentor_kernels import PagedRows


@dataclass(frozen=True)
class PagedCase:
    name: str
    query_BQD: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rows: PagedRows
    scaling: float
    window: int | None = None


def paged_case(
    name: str, own: list[int], *, shared: list[bool] | None = None, prefix: int = 0, kv: int = 2, repeats: int = 3,
    D: int = 8, page: int = 4, window: int | None = None, size: float = 1.0, dtype=torch.float32, extra: int = 0,
) -> PagedCase:  # fmt: skip
    """Rows with `own` tokens on pages of their own, in shuffled order; what no row may see is NaN."""
    make, order = torch.Generator().manual_seed(0), random.Random(0)
    shared = shared or [prefix > 0] * len(own)
    count = max(-(-n // page) for n in own) + extra
    first = -(-prefix // page)
    free = list(range(first, first + count * len(own)))
    order.shuffle(free)
    tables = [[free.pop() for _ in range(count)] for _ in own]
    keys, values = torch.full((2, first + count * len(own), page, kv, D), torch.nan).unbind()
    for cache in (keys, values):
        flat = cache.flatten(0, 1)
        flat[:prefix] = torch.randn(prefix, kv, D, generator=make) * size
        for table, n in zip(tables, own, strict=True):
            for i in range(n):
                flat[table[i // page] * page + i % page] = torch.randn(kv, D, generator=make) * size
    query_BQD = torch.randn(len(own), kv * repeats, D, generator=make) * size
    shared_B = torch.tensor([prefix if s else 0 for s in shared])
    rows = PagedRows(torch.tensor(tables), shared_B, shared_B + torch.tensor(own), prefix, page)
    return PagedCase(name, query_BQD.to(dtype), keys.to(dtype), values.to(dtype), rows, 0.3, window)


def paged_cases(split: int, block: int, dtype: torch.dtype = torch.float32) -> list[PagedCase]:
    """One case for each trap; `split` and `block` are the numbers of tokens that the implementation takes at once."""

    def case(name: str, own: list[int], **how) -> PagedCase:
        return paged_case(name, own, dtype=dtype, **how)

    return [
        case("one token", [1]),
        case("a page less one, a page, one more", [3, 4, 5]),
        case("rows of very different length", [1, 70, 9, 33]),
        case("a block less one, a block, one more", [block - 1, block, block + 1]),
        case("a split less one, a split, one more", [split - 1, split, split + 1], repeats=1),
        case("several splits", [2 * split + 3, 5], repeats=2),
        case("a prefix within a page", [3, 9], prefix=2),
        case("a prefix of full pages", [3, 9], prefix=8),
        case("a prefix that some rows do not have", [6, 6, 30], prefix=11, shared=[True, False, True]),
        case("a prefix over a split", [2, 7], prefix=split + 5, repeats=1),
        case("tables with pages to come", [3, 9], extra=3),
        case("one KV head", [5, 12], kv=1, repeats=4),
        case("a KV head for each query head", [5, 12], kv=4, repeats=1),
        case("more query heads than a tile has rows", [5, 12], kv=1, repeats=19),
        case("heads of an odd size", [5, 12], D=11),
        case("large heads", [5, 12], D=72),
        case("pages of one token", [5, 12], page=1, prefix=3),
        case("a window of one", [5, 12], window=1, prefix=3),
        case("a window within the own tokens", [9, 30], window=6, prefix=3),
        case("a window into the prefix", [9, 3], window=11, prefix=8),
        case("a window over everything", [9, 3], window=1000, prefix=8),
        case("a window behind whole splits", [2 * split + 9], window=split + 3, repeats=1),
        case("scores of hundreds", [40, 3], size=12.0, prefix=5),
    ]


def reference(case: PagedCase) -> torch.Tensor:
    """float64 [B, Q, D]."""
    rows, out = case.rows, []
    keys, values = (x.double().flatten(0, 1) for x in (case.keys, case.values))
    for b, query_QD in enumerate(case.query_BQD.double()):
        shared, end = int(rows.shared_B[b]), int(rows.end_B[b])
        places = [*range(shared)]
        places += [int(rows.tables_BN[b, i // rows.page]) * rows.page + i % rows.page for i in range(end - shared)]
        places = places[-(case.window or end) :]
        repeats = len(query_QD) // keys.shape[1]
        k, v = (x[places].repeat_interleave(repeats, 1) for x in (keys, values))  # [T, Q, D]
        weights_QT = (torch.einsum("qd,tqd->qt", query_QD, k) * case.scaling).softmax(-1)
        out.append(torch.einsum("qt,tqd->qd", weights_QT, v))
    return torch.stack(out)


BOUND = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest value: float32 sums, weights rounded to the dtype before they meet the values."""


def check_paged(operator: Callable, case: PagedCase, device: str = "cpu") -> None:
    """`operator(query, keys, values, rows, scaling=, window=) -> [B, Q, D]` against float64."""
    rows = case.rows
    moved = PagedRows(*(t.to(device) for t in (rows.tables_BN, rows.shared_B, rows.end_B)), rows.prefix, rows.page)
    inputs = (t.to(device) for t in (case.query_BQD, case.keys, case.values))
    with poisoned_memory():
        found = operator(*inputs, moved, scaling=case.scaling, window=case.window)
    assert (found.shape, found.dtype) == (case.query_BQD.shape, case.query_BQD.dtype), case.name
    wanted = reference(case)
    error = float((found.cpu().double() - wanted).abs().max() / wanted.abs().max())
    assert error <= BOUND[found.dtype], f"{case.name}: off by {error:.2e}"
