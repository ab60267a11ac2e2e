"""Attention through a plan: the model hands its queries, keys and values over, and the plan knows who may see whom.

One attention function is registered with transformers under the name `lite_mentor`. It calls the plan that was passed
to the model's forward (`plan=...`): `PackedPlan` here for training, the engine's own plan for decoding. A registered
attention without a registered mask gets no mask from transformers; that is what we want.

    T packed tokens   Q queries and K keys of one segment   D head dimension   S segments
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
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
    return plan.attend(module.layer_idx, query, key, value, scaling=scaling, **window), None


AttentionInterface.register(NAME, plan_attention)


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


class PackedPlan:
    """Attention over a packed row: a forest of segments, each seeing itself causally and its ancestors entirely.

    Segment s is tokens `starts[s]` to `starts[s + 1]` (or `tokens`) and continues segment `parents[s] < s`, or is a
    root (-1). Its tokens' keys are gathered, so a prefix that many segments share is computed once and collects all
    their gradients. On the CPU every segment is a small attention of its own; this was measured to take a sixth of
    the time of one attention under a dense [T, T] mask (a root of 250 tokens, 3 children of 60, 24 leaves of 90).
    On CUDA, where a launch for every segment costs more than masked work, one attention has all segments under a mask,
    or flash-attn does it when it is installed and nothing is shared (neither was run on a GPU).
    """

    def __init__(self, starts: Sequence[int], parents: Sequence[int], tokens: int, device: torch.device | str = "cpu"):
        ends = [*starts[1:], tokens]
        self.lengths = [end - start for start, end in zip(starts, ends, strict=False)]
        well_formed = starts and starts[0] == 0 and len(parents) == len(starts) and min(self.lengths) > 0
        if not well_formed or any(not -1 <= parent < s for s, parent in enumerate(parents)):
            raise ValueError(f"not a forest of segments over {tokens} tokens: starts {starts}, parents {parents}")
        self.device = torch.device(device)
        self.paths: list[list[int]] = []
        """For each segment, its ancestors from the root down, and itself."""
        for s, parent in enumerate(parents):
            self.paths.append([*(self.paths[parent] if parent >= 0 else []), s])
        self._masks: dict[int | None, list[torch.Tensor | None]] = {}
        self._biases: dict[int | None, torch.Tensor] = {}

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, heads, T, D], key and value [1, KV heads, T, D] -> [1, T, heads, D]."""
        if self.device.type == "cpu":
            out = self._by_segment(query, key, value, scaling, window)
        elif self._flash and query.dtype is not torch.float32:
            return self._varlen(query, key, value, scaling, window)
        else:
            if window not in self._biases:
                self._biases[window] = as_bias(self._dense_mask(window), query.dtype)
            out = under_bias(query, key, value, self._biases[window], scaling)
        return out.transpose(1, 2)

    def _by_segment(self, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        queries, keys, values = (x.split(self.lengths, dim=2) for x in (query, key, value))
        heads, kv_heads, how = query.shape[1], key.shape[1], dict(scale=scaling)
        out = []
        for s, (path, mask) in enumerate(zip(self.paths, self._segment_masks(window, heads // kv_heads), strict=True)):
            k, v = (x[s] if len(path) == 1 else torch.cat([x[a] for a in path], 2) for x in (keys, values))
            if mask is None:
                got = F.scaled_dot_product_attention(queries[s], k, v, is_causal=True, enable_gqa=True, **how)
            else:
                # The query heads that share a KV head become rows of one head: fewer and fuller blocks.
                rows = queries[s].reshape(1, kv_heads, -1, query.shape[3])
                got = F.scaled_dot_product_attention(rows, k, v, mask, **how).view(queries[s].shape)
            out.append(got)
        return torch.cat(out, 2)

    def _segment_masks(self, window: int | None, repeats: int) -> list[torch.Tensor | None]:
        """A bool [repeats * Q, K] for each segment; None where plain causal attention says the same."""
        if window not in self._masks:
            masks = [self._segment_mask(path, window) for path in self.paths]
            self._masks[window] = [None if mask is None else mask.repeat(repeats, 1) for mask in masks]
        return self._masks[window]

    def _segment_mask(self, path: list[int], window: int | None) -> torch.Tensor | None:
        own, total = self.lengths[path[-1]], sum(self.lengths[s] for s in path)
        if own == total and (window is None or window >= total):
            return None
        causal = torch.ones(own, total, dtype=torch.bool).tril(total - own)
        return causal if window is None else causal.triu(total - own - window + 1)

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

    @cached_property
    def _flash(self) -> bool:
        alone = all(len(path) == 1 for path in self.paths)
        return alone and self.device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None

    @cached_property
    def _boundaries(self) -> torch.Tensor:
        return F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(self.device, torch.int32)

    def _varlen(self, query, key, value, scaling: float, window: int | None) -> torch.Tensor:
        from flash_attn import flash_attn_varlen_func

        longest = max(self.lengths)
        out = flash_attn_varlen_func(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seqlens_q=self._boundaries,
            cu_seqlens_k=self._boundaries,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return out[None]
