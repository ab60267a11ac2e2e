"""Attention through a plan: the model hands its queries, keys and values over, and the plan knows who may see whom.

One attention function is registered with transformers under the name `lite_mentor`. It calls the plan that was passed
to the model's forward (`plan=...`): `PackedPlan` here for training, the engine's own plan for decoding. A registered
attention without a registered mask gets no mask from transformers; that is what we want.

Attention of many short segments is `varlen`, for training and decoding alike: one launch on CUDA, without a mask.

    T packed tokens   S segments   Q queries and K keys, of all segments or of one   G KV heads   D head dimension
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from mentor_kernels import RowCopies, gather_rows
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from lite_mentor.errors import UserError

NAME = "lite_mentor"


class Plan(Protocol):
    """Who may see whom, in one forward."""

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, heads, T, D], key and value [1, KV heads, T, D] -> [1, T, heads, D].

        A token sees itself and the `window - 1` tokens before it in its own sequence; all of them without a window.
        """
        ...


def plan_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    plan: Plan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer. Dropout is ignored: a policy gradient needs the policy that sampled.

    Raises UserError for attention that differs from softmax(scaling q k) v.
    """
    what = "caps its attention scores" if softcap is not None else "has attention sinks" if s_aux is not None else ""
    if plan is None:
        what = "does not pass arguments on to its attention"
    if what:
        raise UserError(f"The student {what} ({type(module).__name__}), which is not supported; use another student.")
    window = {} if sliding_window is None else {"window": sliding_window}
    return plan.attend(module.layer_idx, query, key, value, scaling=scaling, **window).contiguous(), None


AttentionInterface.register(NAME, plan_attention)


class CacheShape(NamedTuple):
    """What a token leaves behind for those that follow: in each layer, keys and values [kv_heads, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int


class Survey:
    """A plan that attends as another does, and notes the shapes that it is given, in one forward."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._kept: dict[int, tuple[int, int, int]] = {}

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """The plan's own. Raises UserError for a layer that comes a second time: the cache keeps one set for each."""
        if layer in self._kept:
            raise UserError(
                f"The student attends twice under one layer index ({layer}), and the cache of keys and values has one "
                "place for each layer; use another student."
            )
        self._kept[layer] = (key.shape[1], key.shape[3], value.shape[3])
        window = {} if window is None else {"window": window}
        return self._plan.attend(layer, query, key, value, scaling=scaling, **window)

    def shape(self) -> CacheShape:
        """What the cache must hold. Raises UserError where layers, or keys and values, differ in it."""
        if not self._kept:
            raise UserError("The student has no attention that can be taken over; use another student.")
        if len({*self._kept.values()}) > 1 or any(key != value for _, key, value in self._kept.values()):
            found = ", ".join(f"{heads} of {key} and {value}" for heads, key, value in sorted({*self._kept.values()}))
            raise UserError(
                f"The student's layers differ in their heads of keys and values, or these in their size ({found}), "
                "and the cache has one shape for all; use another student."
            )
        return CacheShape(max(self._kept) + 1, *next(iter(self._kept.values()))[:2])


def as_bias(seen_QK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a query may see a key and -inf where not, in rows that begin at multiples of 16 numbers.

    So PyTorch's memory-efficient kernel takes it as it is; from a bool it would make one like this in every layer.
    """
    Q, K = seen_QK.shape
    bias_QK = torch.full((Q, -(-K // 16) * 16), -torch.inf, dtype=dtype, device=seen_QK.device)[:, :K]
    return bias_QK.masked_fill_(seen_QK, 0)


def under_bias(query, key, value, bias_QK: torch.Tensor, scaling: float) -> torch.Tensor:
    """query [1, heads, Q, D], key and value [1, KV heads, K, D] -> [1, heads, Q, D], on CUDA.

    KV heads are repeated first. Of PyTorch's fused kernels only the memory-efficient one takes a mask, and before 2.14
    it takes no grouped heads: asked for both, most GPUs would get all scores in float32 instead.
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, bias_QK, scale=scaling)


# --- segments of queries, each over its own keys --------------------------------------------------------------------

FLASH_ATTN = importlib.util.find_spec("flash_attn") is not None
GROUPED = FLASH_ATTN or "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Does the kernel take fewer KV heads than query heads? PyTorch's does from 2.13 on; before, KV heads are repeated."""


class Segments:
    """S segments of `queries[s]` queries, each over `keys[s]` keys of its own: causal, and aligned at their ends.

    A segment's last query sees its last key and what lies before, the query before it one key less, and so on. All of
    it is made once and serves every layer.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[int], device: torch.device | str = "cpu"):
        self.queries, self.keys, self.device = list(queries), list(keys), torch.device(device)
        self._masks: dict[tuple[int, int | None, int], torch.Tensor | None] = {}

    @cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Where segments start, and the last ends, among queries and among keys (int32); the most of either."""
        starts = (
            F.pad(torch.tensor(n).cumsum(0), (1, 0)).to(self.device, torch.int32) for n in (self.queries, self.keys)
        )
        return *starts, max(self.queries), max(self.keys)

    def mask(self, s: int, window: int | None, repeats: int) -> torch.Tensor | None:
        """Which of its keys [K] each query of segment s sees, bool [repeats * Q, K]; None where simply causal."""
        if (s, window, repeats) not in self._masks:
            own, total = self.queries[s], self.keys[s]
            seen = None
            if own != total or (window is not None and window < total):
                seen = torch.ones(own, total, dtype=torch.bool, device=self.device).tril(total - own)
                seen = (seen if window is None else seen.triu(total - own - window + 1)).repeat(repeats, 1)
            self._masks[s, window, repeats] = seen
        return self._masks[s, window, repeats]


def takes_varlen(query: torch.Tensor) -> bool:
    """Does a varlen kernel take queries like these?

    On a GPU from sm_80 on, in bf16 or float16, heads of a multiple of 8 up to 256 numbers; those of 200 to 224 have no
    backward on consumer cards.
    """
    D = query.shape[-1]
    fits = query.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and (D <= 192 or 224 < D <= 256)
    return query.is_cuda and fits and _has_flash(query.device)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    built = FLASH_ATTN or torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache
def _flash_attn() -> Callable[..., torch.Tensor]:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            f"flash-attn is installed but cannot be imported ({error}); install the build for this PyTorch, or remove "
            "it: PyTorch has a kernel of its own."
        ) from error
    return flash_attn_varlen_func


def repeats_wanted(query: torch.Tensor, key: torch.Tensor) -> int:
    """How often `varlen` wants each KV head, side by side; query [1, heads, T, D], key [1, G, T, D]."""
    return query.shape[1] // key.shape[1] if takes_varlen(query) and not GROUPED else 1


def varlen(query_QHD, key_KGD, value_KGD, segments: Segments, *, scaling: float, window: int | None) -> torch.Tensor:
    """Attention of each segment's queries over its own keys, [Q, H, D], where `takes_varlen` in one launch.

    The kernel is flash-attn's where that is installed, else PyTorch's; neither has yet been run on a GPU. H is G times
    what `repeats_wanted` leaves. flash-attn is always asked for its deterministic backward; PyTorch's is deterministic
    under torch's deterministic algorithms (`loss.backward`).
    """
    if not takes_varlen(query_QHD):
        return _one_by_one(query_QHD, key_KGD, value_KGD, segments, scaling, window)
    reach = (-1 if window is None else window - 1, 0)
    if FLASH_ATTN:
        return _flash_attn()(
            query_QHD, key_KGD, value_KGD, *segments.bounds,
            softmax_scale=scaling, causal=True, window_size=reach, deterministic=True,
        )  # fmt: skip
    grouped = {"enable_gqa": True} if GROUPED else {}
    return varlen_attn(
        query_QHD, key_KGD, value_KGD, *segments.bounds, scale=scaling, window_size=reach, **grouped
    )  # fmt: skip


def _one_by_one(query_QHD, key_KGD, value_KGD, segments: Segments, scaling: float, window: int | None) -> torch.Tensor:
    """Each segment an attention of its own."""
    heads, kv_heads = query_QHD.shape[1], key_KGD.shape[1]
    queries = query_QHD.transpose(0, 1)[None].split(segments.queries, 2)
    keys, values = (x.transpose(0, 1)[None].split(segments.keys, 2) for x in (key_KGD, value_KGD))
    out = []
    for s, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):
        mask = segments.mask(s, window, 1 if q.is_cuda else heads // kv_heads)
        if mask is None:
            got = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        elif q.is_cuda:
            got = under_bias(q, k, v, as_bias(mask, q.dtype), scaling)
        else:
            # The query heads that share a KV head become rows of one head: fewer and fuller blocks.
            rows = q.reshape(1, kv_heads, -1, q.shape[3])
            got = F.scaled_dot_product_attention(rows, k, v, mask, scale=scaling).view(q.shape)
        out.append(got)
    return torch.cat(out, 2)[0].transpose(0, 1)


class PackedPlan:
    """Attention over a packed row: a forest of segments, each seeing itself causally and its ancestors entirely.

    Segment s is tokens `starts[s]` to `starts[s + 1]` (or `tokens`) and continues segment `parents[s] < s`, or is a
    root (-1). Keys and values are gathered path by path, the ancestors' from the root and then its own, so that every
    segment is a stretch of queries at the end of a stretch of keys. A prefix that many segments share is computed once
    and collects all their gradients, added up in a fixed order by `gather_rows`, whose `backend` may be given.

    On CUDA `varlen` takes all segments in one launch, and only pairs of tokens that see each other cost anything. What
    its kernels cannot take (float32, head sizes that are not multiples of 8 or above 256, GPUs before sm_80) is one
    attention under a dense [T, T] mask there: nothing is skipped, most of the work is masked. On the CPU every segment
    is a small attention of its own; this was measured to take a sixth of the time of the dense mask (a root of 250
    tokens, 3 children of 60, 24 leaves of 90).
    """

    def __init__(
        self, starts: Sequence[int], parents: Sequence[int], tokens: int, device: torch.device | str = "cpu",
        backend: str | None = None,
    ):  # fmt: skip
        self.starts, ends = list(starts), [*starts[1:], tokens]
        self.lengths = [end - start for start, end in zip(starts, ends, strict=False)]
        well_formed = starts and starts[0] == 0 and len(parents) == len(starts) and min(self.lengths) > 0
        if not well_formed or any(not -1 <= parent < s for s, parent in enumerate(parents)):
            raise ValueError(f"not a forest of segments over {tokens} tokens: starts {starts}, parents {parents}")
        self.device, self.backend = torch.device(device), backend
        self.paths: list[list[int]] = []
        """For each segment, its ancestors from the root down, and itself."""
        for s, parent in enumerate(parents):
            self.paths.append([*(self.paths[parent] if parent >= 0 else []), s])
        self._biases: dict[int | None, torch.Tensor] = {}

    @cached_property
    def segments(self) -> Segments:
        return Segments(self.lengths, [sum(self.lengths[a] for a in path) for path in self.paths], self.device)

    @cached_property
    def copies(self) -> RowCopies:
        """Of each segment in turn, the tokens of its path."""
        tokens = [torch.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return RowCopies.of(torch.cat([tokens[a] for path in self.paths for a in path]), sum(self.lengths), self.device)

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, heads, T, D], key and value [1, KV heads, T, D] -> [1, T, heads, D]."""
        if query.is_cuda and not takes_varlen(query):
            if window not in self._biases:
                self._biases[window] = as_bias(self._dense_mask(window), query.dtype)
            return under_bias(query, key, value, self._biases[window], scaling).transpose(1, 2)
        how = dict(repeats=repeats_wanted(query, key), backend=self.backend)
        key_KGD, value_KGD = (gather_rows(x[0].transpose(0, 1), self.copies, **how) for x in (key, value))
        query_THD = query[0].transpose(0, 1)
        return varlen(query_THD, key_KGD, value_KGD, self.segments, scaling=scaling, window=window)[None]

    def _dense_mask(self, window: int | None) -> torch.Tensor:
        """bool [T, T]: may the row's token see the column's?"""
        related = torch.zeros(len(self.paths), len(self.paths), dtype=torch.bool)
        for s, path in enumerate(self.paths):
            related[s, path] = True
        lengths = torch.tensor(self.lengths)
        segment_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(self.device)
        offsets = torch.tensor([sum(self.lengths[a] for a in path[:-1]) for path in self.paths])
        within_T = torch.cat([torch.arange(n) for n in self.lengths])
        position_T = (torch.repeat_interleave(offsets, lengths) + within_T).int().to(self.device)
        back_TT = position_T[:, None] - position_T
        seen = related.to(self.device)[segment_T[:, None], segment_T] & (back_TT >= 0)
        return seen if window is None else seen & (back_TT < window)
