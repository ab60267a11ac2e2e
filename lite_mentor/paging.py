"""Where keys and values live while the engine decodes: a fixed pool of pages, and the attention that reads them.

A page holds `page` consecutive tokens of one sequence, in every layer. A sequence names its pages in order (its block
table); a page may have several holders, and goes back to the pool when the last one drops it. Nobody writes to a page
that others hold: a sequence shares full pages and copies the last, partly filled one before it writes on.

    L layers   B rows that decode one token   N pages of a row's table
    K steps of a burst   P tokens of the shared prefix   T new tokens of the step   D head dimension
"""

from __future__ import annotations

import collections.abc as abc
import math
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from mentor_kernels import PagedRows, paged_attention

from lite_mentor.attention import Segments, repeats_wanted, varlen


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


class Fields(NamedTuple):
    """What the decoding steps of a burst read; int64, but for the uniforms, which are float64."""

    k: Any
    """[1], the step that comes next: 0."""
    ids_B: Any
    shared_B: Any
    end_B: Any
    positions_B: Any
    write_B: Any
    """Where in the pool, counted in tokens, each row's new token goes."""
    uniform_KB: Any
    tables_BN: Any

    @classmethod
    def of(cls, flat: torch.Tensor, rows: int, steps: int, width: int) -> Fields:
        """Views of one block of int64. Each begins at a multiple of 128 bytes, whatever the sizes: a kernel that was
        compiled for aligned addresses serves them all.
        """
        shapes = [(1,), *[(rows,)] * 5, (steps, rows), (rows, width)]
        parts = flat.split([_aligned(math.prod(shape)) for shape in shapes])
        fields = cls(*(part[: math.prod(shape)].view(shape) for part, shape in zip(parts, shapes, strict=True)))
        return fields._replace(uniform_KB=fields.uniform_KB.view(torch.float64))

    @staticmethod
    def numbers(rows: int, steps: int, width: int) -> int:
        """Length of the block."""
        return _aligned(1) + 5 * _aligned(rows) + _aligned(steps * rows) + _aligned(rows * width)


def _aligned(numbers: int) -> int:
    return -(-numbers // 16) * 16


class RowBlock:
    """`rows` rows that decode, with tables of `width` pages and `steps` uniforms each: on the host, and on the device.

    A burst writes the host's block and sends it in one copy. A table is long, and from burst to burst it mostly stays
    or grows at its end, so of the tables only what changed is written. Rows beyond the spans, and what a table has
    beyond its row's pages, name the spare page. Nobody may `fill` before the device has read what was sent.
    """

    def __init__(self, pool: PagePool, rows: int, steps: int, width: int):
        self.pool, self.rows, self.steps, self.width = pool, rows, steps, width
        device, count = pool.keys.device, Fields.numbers(rows, steps, width)
        self._flat = torch.zeros(count, dtype=torch.long, pin_memory=device.type == "cuda")
        self._host = Fields(*(view.numpy() for view in Fields.of(self._flat, rows, steps, width)))
        self._host.tables_BN[:] = pool.spare
        self._held: list[list[int]] = [[] for _ in range(rows)]
        """The pages that each row's table names now: copies, since the engine changes its own in place."""
        self._sent = torch.empty(count, dtype=torch.long, device=device)
        self.fields = Fields.of(self._sent, rows, steps, width)
        """The device's."""

    def fill(self, spans: abc.Sequence[Span], ids: abc.Sequence[int] = (), uniforms: abc.Sequence = ()) -> None:
        """Write the host's block: of each span, the row's last token and its uniforms [rows][steps], and send it."""
        host, page, count = self._host, self.pool.page, len(spans)
        for r in range(self.rows):
            self._write_table(r, spans[r].pages if r < count else [])
        host.ids_B[: len(ids)], host.ids_B[len(ids) :] = ids, 0
        if len(uniforms):
            host.uniform_KB[: len(uniforms[0]), :count] = np.asarray(uniforms, dtype=np.float64).T
        host.shared_B[:count], host.shared_B[count:] = [s.shared for s in spans], 0
        host.end_B[:count], host.end_B[count:] = [s.end for s in spans], 1
        host.positions_B[:] = host.end_B - 1
        own_B = host.positions_B - host.shared_B
        host.write_B[:] = host.tables_BN[np.arange(self.rows), own_B // page] * page + own_B % page
        self._sent.copy_(self._flat, non_blocking=True)

    def _write_table(self, r: int, pages: list[int]) -> None:
        held = self._held[r]
        if held == pages:
            return
        kept = len(held) if pages[: len(held)] == held else 0
        row_N = self._host.tables_BN[r]
        row_N[kept : len(pages)] = pages[kept:]
        row_N[len(pages) : len(held)] = self.pool.spare
        held[kept:] = pages[kept:]


class DecodePlan:
    """Attention of rows with one new token each. It lives on the device, and `advance` moves it on to the next token.

    A table may name more pages than its row fills now, so that the row can advance onto them.
    """

    def __init__(self, block: RowBlock, prefix: int, *, backend: str | None = None):
        self.pool, self.backend, fields = block.pool, backend, block.fields
        self.rows = PagedRows(fields.tables_BN, fields.shared_B, fields.end_B, prefix, self.pool.page)
        self.positions_T, self.write_T = fields.positions_B, fields.write_B

    @classmethod
    def of(cls, pool: PagePool, prefix: int, spans: list[Span], *, backend: str | None = None) -> DecodePlan:
        """Of these rows alone, for one step."""
        block = RowBlock(pool, len(spans), 0, max((len(s.pages) for s in spans), default=0))
        block.fill(spans)
        return cls(block, prefix, backend=backend)

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
    """Attention of a step in which some rows have several new tokens: prompts, tool results.

    Those rows are segments of one `varlen` attention, or of a few when together they see more than GATHERED tokens. The
    keys and values are gathered from the prefix and the pages, by an index that is made once and serves every layer.
    """

    def __init__(self, pool: PagePool, prefix: int, spans: list[Span], *, backend: str | None = None):
        device = pool.keys.device
        self.pool, self.prefix = pool, prefix
        places = [(s, p - s.shared) for s in spans for p in range(s.cached, s.end)]
        self.positions_T = torch.tensor([s.shared + i for s, i in places], device=device)
        page = pool.page
        self.write_T = torch.tensor([s.pages[i // page] * page + i % page for s, i in places], device=device)
        ends = list(accumulate(s.end - s.cached for s in spans))
        self.last_R = torch.tensor(ends, device=device) - 1
        single = [r for r, s in enumerate(spans) if s.end - s.cached == 1]
        self.single_B = self.last_R[single]
        self.decode = DecodePlan.of(pool, prefix, [spans[r] for r in single], backend=backend)
        self.several = [_Several.of(pool, ends, rows) for rows in _in_calls(spans)]

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]; a window sees that many tokens back."""
        keys, values = self.pool.write(layer, self.write_T, key, value)
        repeats = repeats_wanted(query, key)
        query_THD = query[0].transpose(0, 1)
        out_THD = query.new_empty(query_THD.shape)
        if len(self.single_B):
            out_THD[self.single_B] = self.decode.look(query_THD[self.single_B], keys, values, scaling, window)
        for rows in self.several:
            key_KGD, value_KGD = (rows.seen(cache, repeats) for cache in (keys, values))
            how = dict(scaling=scaling, window=window)
            out_THD[rows.new_Q] = varlen(query_THD[rows.new_Q], key_KGD, value_KGD, rows.segments, **how)
        return out_THD[None]


GATHERED = 8192
"""Tokens whose keys and values are copied at once, unless one row sees more: 134 MB in bf16, at 32 heads of 128."""


def _in_calls(spans: list[Span]) -> list[dict[int, Span]]:
    """The rows with several new tokens, by their number, in parts of at most GATHERED tokens seen."""
    calls: list[dict[int, Span]] = []
    room = 0
    for r, span in enumerate(spans):
        if span.end - span.cached > 1:
            if not calls or span.end > room:
                calls.append({})
                room = GATHERED
            calls[-1][r] = span
            room -= span.end
    return calls


class _Several(NamedTuple):
    """Rows with several new tokens each: which tokens of the step those are, and where in the pool they look."""

    new_Q: torch.Tensor
    places_K: torch.Tensor
    segments: Segments

    @classmethod
    def of(cls, pool: PagePool, ends: list[int], rows: dict[int, Span]) -> _Several:
        """`ends`: where each row of the step ends among its new tokens."""
        device, within = pool.keys.device, torch.arange(pool.page)
        new, places = [], []
        for r, span in rows.items():
            new.append(torch.arange(ends[r] - (span.end - span.cached), ends[r]))
            own = torch.tensor(span.pages)[:, None] * pool.page + within
            places += [torch.arange(span.shared), own.flatten()[: span.end - span.shared]]
        segments = Segments([len(n) for n in new], [span.end for span in rows.values()], device)
        return cls(torch.cat(new).to(device), torch.cat(places).to(device), segments)

    def seen(self, cache: torch.Tensor, repeats: int) -> torch.Tensor:
        """What they see of a layer's keys or values, each KV head `repeats` times, [K, G repeats, D]."""
        places_PGRD = cache.flatten(0, 1)[:, :, None].expand(-1, -1, repeats, -1)
        return places_PGRD.index_select(0, self.places_K).flatten(1, 2)
