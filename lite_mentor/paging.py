"""Where keys and values live while the engine decodes: a fixed pool of pages, and the attention that reads them.

A page holds `page` consecutive tokens of one sequence, in every layer. A sequence names its pages in order (its block
table); a page may have several holders, and goes back to the pool when the last one drops it. Nobody writes to a page
that others hold: a sequence shares full pages and copies the last, partly filled one before it writes on.

    L layers   B rows that decode one token   N pages of the longest of them   S = N * page
    P tokens of the shared prefix   T new tokens of the step   D head dimension
"""

from __future__ import annotations

import collections.abc as abc
from typing import NamedTuple

import torch
import torch.nn.functional as F


class PagePool:
    """`pages` pages of `page` tokens, all allocated at once. `keys` and `values` are [L, pages, page, Hkv, D]."""

    def __init__(self, *, layers: int, pages: int, page: int, kv_heads: int, head_dim: int, device, dtype):
        shape = (layers, pages, page, kv_heads, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.page = page
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

    def first(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and values of the pool's first tokens, [L, tokens, Hkv, D]."""
        pages = self.pages_for(tokens)
        return tuple(cache[:, :pages].flatten(1, 2)[:, :tokens] for cache in (self.keys, self.values))


class Span(NamedTuple):
    """One row of an engine step: positions [cached, end) are new, those before `shared` live in the shared prefix."""

    pages: list[int]
    """The block table: where positions from `shared` on live."""
    shared: int
    cached: int
    end: int


class DecodePlan:
    """Attention of one engine step: writes new keys and values into their pages, attends over prefix and pages.

    Rows with a single new token decode as one batch: their scores against the shared prefix are ONE product for the
    whole batch, so its keys and values are read once a step instead of once a sequence. Longer rows (prompts, tool
    results) go one by one.
    """

    def __init__(self, pool: PagePool, prefix_kv: tuple[torch.Tensor, torch.Tensor], spans: list[Span]):
        device = pool.keys.device
        self.pool, self.prefix_kv = pool, prefix_kv
        places = [(s, p - s.shared) for s in spans for p in range(s.cached, s.end)]
        self.positions_T = torch.tensor([s.shared + i for s, i in places], device=device)
        page = pool.page
        self.write_T = torch.tensor([s.pages[i // page] * page + i % page for s, i in places], device=device)
        starts = torch.tensor([0, *(s.end - s.cached for s in spans)]).cumsum(0)
        self.last_R = (starts[1:] - 1).to(device)
        single = [r for r, s in enumerate(spans) if s.end - s.cached == 1]
        self.rows_B = starts[single].to(device)
        self.multiple = [
            (int(starts[r]), s, torch.tensor(s.pages[: pool.pages_for(s.end - s.shared)], device=device))
            for r, s in enumerate(spans)
            if s.end - s.cached > 1
        ]
        self._batch([spans[r] for r in single], prefix_kv[0].shape[1], device)

    def _batch(self, spans: list[Span], prefix: int, device: torch.device) -> None:
        """The block tables of the rows that decode, and which of the P + S places a row sees, and how far back."""
        own = [s.end - s.shared for s in spans]
        count = self.pool.pages_for(max(own, default=0))
        # Short tables are filled up with page 0: any page does, for the row sees nothing there.
        tables = [s.pages[:count] + [0] * (count - len(s.pages)) for s in spans]
        self.tables_BN = torch.tensor(tables, device=device, dtype=torch.long).view(len(spans), count)
        columns = torch.arange(count * self.pool.page)[None]
        behind_prefix = torch.tensor([s.shared > 0 for s in spans], dtype=torch.bool)[:, None]
        sees = torch.cat([behind_prefix.expand(-1, prefix), columns < torch.tensor(own)[:, None]], 1)
        last, first_own = (torch.tensor(x)[:, None] for x in ([s.end - 1 for s in spans], [s.shared for s in spans]))
        places = torch.cat([torch.arange(prefix).expand(len(spans), -1), first_own + columns], 1)
        self.sees_BS, self.back_BS = sees.to(device), (last - places).to(device)

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]; a window sees that many tokens back."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]  # [pages, page, Hkv, D]
        keys.flatten(0, 1)[self.write_T] = key[0].transpose(0, 1).to(keys.dtype)
        values.flatten(0, 1)[self.write_T] = value[0].transpose(0, 1).to(values.dtype)
        prefix_k, prefix_v = (x[layer] for x in self.prefix_kv)  # [P, Hkv, D]
        out_THD = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        if len(self.rows_B):
            out_THD[self.rows_B] = self._decode(query[0], keys, values, prefix_k, prefix_v, scaling, window).to(
                out_THD.dtype
            )
        for start, span, pages_N in self.multiple:
            new = span.end - span.cached
            k, v = (
                torch.cat([prefix[: span.shared], cache.index_select(0, pages_N).flatten(0, 1)])[: span.end]
                .transpose(0, 1)
                .unsqueeze(0)
                for prefix, cache in ((prefix_k, keys), (prefix_v, values))
            )
            mask = torch.ones(new, span.end, dtype=torch.bool, device=query.device).tril(span.cached)
            if window is not None:
                mask = mask.triu(span.cached - window + 1)
            got = F.scaled_dot_product_attention(
                query[:, :, start : start + new], k, v, attn_mask=mask, scale=scaling, enable_gqa=True
            )
            out_THD[start : start + new] = got[0].transpose(0, 1)
        return out_THD[None]

    def _decode(self, query_HTD, keys, values, prefix_k, prefix_v, scaling: float, window: int | None) -> torch.Tensor:
        """[B, Hq, D] in float32; the query heads that share a KV head are rows of one product."""
        kv_heads, dim = keys.shape[2], keys.shape[3]
        rows, length = len(self.rows_B), prefix_k.shape[0]
        q = (query_HTD[:, self.rows_B].float() * scaling).unflatten(0, (kv_heads, -1))  # [Hkv, rep, B, D]
        q_flat = q.flatten(1, 2)  # [Hkv, rep * B, D]
        prefix_k, prefix_v = (x.float().transpose(0, 1) for x in (prefix_k, prefix_v))  # [Hkv, P, D]
        own_k, own_v = (
            x.index_select(0, self.tables_BN.flatten()).view(rows, -1, kv_heads, dim).float().transpose(1, 2)
            for x in (keys, values)
        )  # [B, Hkv, S, D]
        q_rows = q.permute(2, 0, 1, 3)  # [B, Hkv, rep, D]
        scores_prefix = (q_flat @ prefix_k.mT).unflatten(1, (-1, rows)).permute(2, 0, 1, 3)  # [B, Hkv, rep, P]
        sees_BS = self.sees_BS if window is None else self.sees_BS & (self.back_BS < window)
        blind_B11S = ~sees_BS[:, None, None]
        scores = torch.cat([scores_prefix, q_rows @ own_k.mT], -1).masked_fill_(blind_B11S, float("-inf"))
        weights = scores.softmax(-1)
        from_prefix = weights[..., :length].permute(1, 2, 0, 3).flatten(1, 2) @ prefix_v  # [Hkv, rep * B, D]
        out = from_prefix.unflatten(1, (-1, rows)).permute(2, 0, 1, 3) + weights[..., length:] @ own_v
        return out.reshape(rows, -1, dim)
