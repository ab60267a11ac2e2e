"""Where keys and values live while the engine decodes: a fixed pool of pages, and the attention that reads them.

A page holds `page` consecutive tokens of one sequence, in every layer. A sequence names its pages in order (its block
table); a page may have several holders, and goes back to the pool when the last one drops it. Nobody writes to a page
that others hold: a sequence shares full pages and copies the last, partly filled one before it writes on.

    L layers   B rows that decode one token   N pages of a row's table
    P tokens of the shared prefix   T new tokens of the step   D head dimension
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mentor_kernels import PagedRows, paged_attention

from lite_mentor.attention import as_bias, under_bias


class PagePool:
    """`pages` pages of `page` tokens, all allocated at once. `keys` and `values` are [L, pages + 1, page, Hkv, D].

    The page behind the last, `spare`, belongs to nobody: rows that only fill up a batch write there.
    """

    def __init__(self, *, layers: int, pages: int, page: int, kv_heads: int, head_dim: int, device, dtype):
        shape = (layers, pages + 1, page, kv_heads, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.page, self.spare = page, pages
        self.holders = [0] * pages
        self.free = list(range(pages))[::-1]

    def pages_for(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.page)

    def take(self, count: int) -> list[int]:
        """Free pages, lowest numbers first when the whole pool is free. Raises RuntimeError when there are too few."""
        if count > len(self.free):
            raise RuntimeError(f"{count} pages wanted, {len(self.free)} free")
        if len(self.free) == len(self.holders):
            self.free.sort(reverse=True)
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages: abc.Sequence[int]) -> list[int]:
        """One more holder for each of these pages."""
        for page in pages:
            self.holders[page] += 1
        return list(pages)

    def drop(self, pages: abc.Sequence[int]) -> None:
        """One holder less for each of these pages; pages without holders are free again."""
        for page in pages:
            if not self.holders[page]:
                raise RuntimeError(f"page {page} was dropped by one who did not hold it")
            self.holders[page] -= 1
            if not self.holders[page]:
                self.free.append(page)

    def copy(self, source: int, targets: abc.Sequence[int]) -> None:
        """The content of one page into others."""
        for cache in (self.keys, self.values):
            cache[:, list(targets)] = cache[:, source].clone().unsqueeze(1)

    def write(self, layer: int, places_T: torch.Tensor, key, value) -> tuple[torch.Tensor, torch.Tensor]:
        """Put key and value [1, Hkv, T, D] there; the layer's keys and values [pages + 1, page, Hkv, D]."""
        caches = self.keys[layer], self.values[layer]
        for cache, new in zip(caches, (key, value), strict=True):
            cache.flatten(0, 1)[places_T] = new[0].transpose(0, 1).to(cache.dtype)
        return caches


class Span(NamedTuple):
    """One row of an engine step: positions [cached, end) are new, those before `shared` live in the shared prefix."""

    pages: list[int]
    """The block table: where positions from `shared` on live."""
    shared: int
    cached: int
    end: int


class DecodePlan:
    """Attention of rows with one new token each. It lives on the device, and `advance` moves it on to the next token.

    A table may name more pages than its row fills now, so that the row can advance onto them. `rows` and `tables` fill
    the batch up to that many rows, which read and write the spare page, and the tables up to that many pages.
    """

    def __init__(
        self, pool: PagePool, prefix: int, spans: list[Span], *, rows: int = 0, width: int = 0,
        backend: str | None = None,
    ):  # fmt: skip
        device = pool.keys.device
        self.pool, self.backend = pool, backend
        spans = [*spans, *[Span([pool.spare], 0, 0, 1)] * (rows - len(spans))]
        width = max([width, *(len(s.pages) for s in spans)])
        tables = [s.pages + [pool.spare] * (width - len(s.pages)) for s in spans]
        self.rows = PagedRows(
            torch.tensor(tables, dtype=torch.long, device=device).view(len(spans), width),
            torch.tensor([s.shared for s in spans], dtype=torch.long, device=device),
            torch.tensor([s.end for s in spans], dtype=torch.long, device=device),
            prefix,
            pool.page,
        )
        self.positions_T, self.write_T = self.rows.end_B - 1, self._places()

    def _places(self) -> torch.Tensor:
        """Where in the pool, counted in tokens, each row's new token goes."""
        own_B = self.rows.end_B - 1 - self.rows.shared_B
        # A row that has advanced past its table will not be used again.
        last = self.rows.tables_BN.shape[1] - 1
        page_B1 = self.rows.tables_BN.gather(1, (own_B // self.pool.page).clamp(max=last)[:, None])
        return page_B1[:, 0] * self.pool.page + own_B % self.pool.page

    def advance(self) -> None:
        """One token more for each row; all in place, so that a recorded step does it again."""
        self.rows.advance()
        self.positions_T += 1
        self.write_T.copy_(self._places())

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, Hq, B, D], key and value [1, Hkv, B, D] -> [1, B, Hq, D]; a window sees that many tokens back."""
        keys, values = self.pool.write(layer, self.write_T, key, value)
        return self.look(query[0].transpose(0, 1), keys, values, scaling, window)[None]

    def look(self, query_BHD, keys, values, scaling: float, window: int | None) -> torch.Tensor:
        return paged_attention(query_BHD, keys, values, self.rows, scaling=scaling, window=window, backend=self.backend)


class StepPlan:
    """Attention of a step in which some rows have several new tokens: prompts, tool results. Those go one by one."""

    def __init__(self, pool: PagePool, prefix: int, spans: list[Span], *, backend: str | None = None):
        device = pool.keys.device
        self.pool, self.prefix = pool, prefix
        places = [(s, p - s.shared) for s in spans for p in range(s.cached, s.end)]
        self.positions_T = torch.tensor([s.shared + i for s, i in places], device=device)
        page = pool.page
        self.write_T = torch.tensor([s.pages[i // page] * page + i % page for s, i in places], device=device)
        starts = torch.tensor([0, *(s.end - s.cached for s in spans)]).cumsum(0)
        self.last_R = (starts[1:] - 1).to(device)
        single = [r for r, s in enumerate(spans) if s.end - s.cached == 1]
        self.single_B = starts[single].to(device)
        self.decode = DecodePlan(pool, prefix, [spans[r] for r in single], backend=backend)
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        self.multiple = [
            (int(starts[r]), s, torch.tensor(s.pages[: pool.pages_for(s.end - s.shared)], device=device))
            for r, s in enumerate(spans)
            if s.end - s.cached > 1
        ]

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]; a window sees that many tokens back."""
        keys, values = self.pool.write(layer, self.write_T, key, value)
        out_THD = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        if len(self.single_B):
            single_BHD = query[0, :, self.single_B].transpose(0, 1)
            out_THD[self.single_B] = self.decode.look(single_BHD, keys, values, scaling, window)
        for start, span, pages_N in self.multiple:
            new = span.end - span.cached
            k, v = (
                torch.cat([cache.flatten(0, 1)[: span.shared], cache.index_select(0, pages_N).flatten(0, 1)])
                [: span.end].transpose(0, 1).unsqueeze(0)
                for cache in (keys, values)
            )  # fmt: skip
            got = self._look(query[:, :, start : start + new], k, v, start, span.cached, scaling, window)
            out_THD[start : start + new] = got[0].transpose(0, 1)
        return out_THD[None]

    def _look(self, query, key, value, start: int, cached: int, scaling: float, window: int | None) -> torch.Tensor:
        """The new tokens of one row see its `cached` ones and, causally, themselves; masks serve every layer."""
        if (start, window) not in self._masks:
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(cached)
            seen = seen if window is None else seen.triu(cached - window + 1)
            self._masks[start, window] = as_bias(seen, query.dtype) if query.is_cuda else seen
        mask = self._masks[start, window]
        if query.is_cuda:
            return under_bias(query, key, value, mask, scaling)
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
