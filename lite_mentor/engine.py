"""The rollout engine: many sequences, one KV cache, one forward a step. It knows nothing of tools or rewards.

A sequence alternates between *speaking* (a token is sampled every step) and *paused* (its turn ended; whoever drives
the engine may `resume` it with more tokens, or `release` it). Every step is ONE forward over whatever tokens are
pending: a whole prompt, a tool's result, or the single token that was just sampled. So prompts enter while others
decode, a tool's result costs only its own tokens, and earlier turns are never computed again.

Sequences submitted together with the same prompt share one prefill: the first computes it, the others copy its keys
and values. The prefix that ALL prompts have in common (the text that describes the tools) is held once, outside the
slots: every decode step reads it once for the whole batch, and it outlives the sequences while the weights stay.

Sampling is counter-based: the caller gives each sequence its own row of uniforms, and the token at position t
is the inverse-CDF of uniform t. Batch order, batch size and scheduling cannot change what a sequence draws.
"""

from __future__ import annotations

import collections.abc as abc
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from lite_mentor.student import Student


@dataclass(eq=False)
class Sequence:
    """One sequence in the engine. Its three lists grow together, a token at a time."""

    prompt_length: int
    uniforms: abc.Sequence[float]
    """One uniform in [0, 1) for each token that may be sampled; its length is the most tokens after the prompt."""
    ids: list[int]
    sampled: list[bool]
    logp: list[float]
    turn_start: int
    """Where the turn being sampled starts in `ids`."""
    slot: int = -1
    shared: int = 0
    """Leading tokens whose keys and values are in the engine's shared prefix and not in the slot."""
    cached: int = 0
    """Tokens of `ids` whose keys and values are in the prefix or the slot."""
    ended: bool = field(default=False)
    """Did the last turn end with an end-of-turn token (and not at the length limit)?"""

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.prompt_length + len(self.uniforms) - len(self.ids)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy, and then logprobs are those of temperature 1."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Engine:
    """Decodes up to `slots` sequences at once, each of up to `context` tokens; the rest wait their turn.

    `forward(ids_1T, positions_1T, plan) -> hidden_TH` runs the student's backbone with our attention plan;
    `head(hidden_RH) -> logits_RV` float32.
    """

    def __init__(
        self,
        forward: abc.Callable[..., torch.Tensor],
        head: abc.Callable[[torch.Tensor], torch.Tensor],
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        eos_ids: abc.Sequence[int],
        slots: int,
        context: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        chunk: int = 2048,
    ):
        self.forward, self.head = forward, head
        self.eos_ids = frozenset(eos_ids)
        self.context, self.chunk, self.device = context, chunk, torch.device(device)
        shape = (layers, slots, context, kv_heads, head_dim)
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.free = list(range(slots))[::-1]
        self.waiting: deque[Sequence] = deque()
        self.speaking: list[Sequence] = []
        self.prefix_ids: list[int] = []
        self.prefix_kv = self._no_prefix = (self.keys[:, 0, :0], self.values[:, 0, :0])  # [L, P, Hkv, D]
        self.sampling = Sampling()

    @classmethod
    def of(cls, student: Student, *, slots: int, context: int) -> Engine:
        """An engine that samples from the student's rollout weights."""
        config = student.config
        heads = config.num_attention_heads
        return cls(
            student.rollout_hidden,
            student.rollout_logits,
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eos_ids=student.eos_ids,
            slots=slots,
            context=context,
            device=student.device,
            dtype=student.dtype,
        )

    @property
    def busy(self) -> bool:
        """Is any sequence speaking or waiting to?"""
        return bool(self.speaking or self.waiting)

    def weights_changed(self) -> None:
        """Forget what was computed with older weights. Only between episodes: live sequences would mix two policies."""
        if self.busy:
            raise RuntimeError("the weights changed while sequences were being sampled")
        self.prefix_ids, self.prefix_kv = [], self._no_prefix

    def submit(self, ids: abc.Sequence[int], uniforms: abc.Sequence[float]) -> Sequence:
        """Queue a prompt. Raises ValueError when prompt and limit together exceed the context."""
        if not ids or len(ids) + len(uniforms) > self.context:
            raise ValueError(f"{len(ids)} prompt + {len(uniforms)} new tokens do not fit in {self.context}")
        sequence = Sequence(len(ids), uniforms, list(ids), [False] * len(ids), [0.0] * len(ids), len(ids))
        self.waiting.append(sequence)
        return sequence

    def resume(self, sequence: Sequence, ids: abc.Sequence[int]) -> None:
        """Append injected tokens after a finished turn and let the sequence speak again."""
        if sequence.room <= len(ids):
            raise ValueError(f"{len(ids)} injected tokens leave no room to speak ({sequence.room} left)")
        sequence.ids += ids
        sequence.sampled += [False] * len(ids)
        sequence.logp += [0.0] * len(ids)
        sequence.turn_start = len(sequence.ids)
        sequence.ended = False
        self.speaking.append(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give the sequence's slot back."""
        self.free.append(sequence.slot)
        sequence.slot = -1

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Sample one token for every speaking sequence; return those whose turn ended with it (now paused)."""
        self._admit()
        rows = self._chunk_of_rows()
        hidden_RH = self._forward_rows(rows)
        row_of = {id(leader): r for r, followers in enumerate(rows) for leader in followers}
        drawing = [s for s in self.speaking if id(s) in row_of]
        logits_BV = self.head(hidden_RH)[[row_of[id(s)] for s in drawing]]
        uniforms = [s.uniforms[len(s.ids) - s.prompt_length] for s in drawing]
        uniform_B = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
        ids_B, logp_B = sample(logits_BV, uniform_B, self.sampling)
        for s, token, logp in zip(drawing, ids_B.tolist(), logp_B.tolist(), strict=True):
            s.ids.append(token)
            s.sampled.append(True)
            s.logp.append(logp)
            s.ended = token in self.eos_ids
        done = [s for s in drawing if s.ended or s.room == 0]
        finished = {id(s) for s in done}
        self.speaking = [s for s in self.speaking if id(s) not in finished]
        return done

    def _admit(self) -> None:
        """Move waiting sequences into free slots; those whose prompt starts with the shared prefix start behind it."""
        if self.waiting and not self.speaking and len(self.free) == self.keys.shape[1]:
            self._renew_prefix()
        while self.waiting and self.free:
            sequence = self.waiting.popleft()
            sequence.slot = self.free.pop()
            length = len(self.prefix_ids)
            if len(sequence.ids) > length and sequence.ids[:length] == self.prefix_ids:
                sequence.shared = sequence.cached = length
            self.speaking.append(sequence)

    def _renew_prefix(self) -> None:
        """With no sequence alive, make the prefix what all waiting prompts share, unless they share the present one."""
        shared = common_prefix([s.ids[:-1] for s in self.waiting])
        if self.prefix_ids and self.prefix_ids == shared[: len(self.prefix_ids)]:
            return
        self.prefix_ids, self.prefix_kv = [], self._no_prefix
        if shared:
            borrowed = Sequence(len(shared), (), shared, [], [], 0, slot=self.free[-1])
            self._run([borrowed])
            self.prefix_kv = tuple(cache[:, borrowed.slot, : len(shared)].clone() for cache in (self.keys, self.values))
            self.prefix_ids = shared

    def _chunk_of_rows(self) -> list[list[Sequence]]:
        """Speaking sequences to run now, those with the same uncomputed prompt in one row, up to `chunk` tokens."""
        rows: dict[object, list[Sequence]] = {}
        tokens = 0
        for s in self.speaking:
            untouched = len(s.ids) == s.prompt_length and s.cached == s.shared
            key = tuple(s.ids) if untouched else id(s)
            if key not in rows:
                pending = len(s.ids) - s.cached
                if rows and tokens + pending > self.chunk:
                    continue
                tokens += pending
            rows.setdefault(key, []).append(s)
        return list(rows.values())

    def _forward_rows(self, rows: list[list[Sequence]]) -> torch.Tensor:
        """One forward over the pending tokens of each row's leader -> the last hidden state of each row [R, H]."""
        hidden_TH, last_R = self._run([row[0] for row in rows])
        for leader, *followers in rows:
            leader.cached = len(leader.ids)
            if followers:
                slots = torch.tensor([s.slot for s in followers], device=self.device)
                own = leader.cached - leader.shared
                for cache in (self.keys, self.values):
                    cache[:, slots, :own] = cache[:, leader.slot, :own].unsqueeze(1)
                for s in followers:
                    s.cached = leader.cached
        return hidden_TH[last_R]

    def _run(self, leaders: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        spans = [Span(s.slot, s.shared, s.cached, len(s.ids)) for s in leaders]
        plan = DecodePlan(self.keys, self.values, self.prefix_kv, spans)
        ids_1T = torch.tensor([[i for s in leaders for i in s.ids[s.cached :]]], device=self.device)
        return self.forward(ids_1T, plan.positions_T[None], plan), plan.last_R


class Span(NamedTuple):
    """One row of an engine step: positions [cached, end) are new, those before `shared` live in the shared prefix."""

    slot: int
    shared: int
    cached: int
    end: int


class DecodePlan:
    """Attention of one engine step: writes new keys and values into the slots, attends over prefix and slot.

    Rows with a single new token decode as one batch: their scores against the shared prefix are ONE product for the
    whole batch, so its keys and values are read once a step instead of once a sequence. Longer rows (prompts, tool
    results) go one by one.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, prefix_kv, spans: list[Span]):
        device = keys.device
        self.keys, self.values, self.prefix_kv = keys, values, prefix_kv
        context = keys.shape[2]
        positions = [torch.arange(s.cached, s.end) for s in spans]
        self.positions_T = torch.cat(positions).to(device)
        flat = [s.slot * context + p - s.shared for s, p in zip(spans, positions, strict=True)]
        self.write_T = torch.cat(flat).to(device)
        starts = torch.tensor([0, *(s.end - s.cached for s in spans)]).cumsum(0)
        self.last_R = (starts[1:] - 1).to(device)
        single = [r for r, s in enumerate(spans) if s.end - s.cached == 1]
        self.multiple = [(int(starts[r]), s) for r, s in enumerate(spans) if s.end - s.cached > 1]
        self.rows_B = starts[single].to(device)
        self.slots_B = torch.tensor([spans[r].slot for r in single], device=device)
        own = torch.tensor([spans[r].end - spans[r].shared for r in single])
        self.longest = int(own.max()) if single else 0
        behind_prefix = torch.tensor([spans[r].shared > 0 for r in single], dtype=torch.bool)
        prefix = prefix_kv[0].shape[1]
        # [B, P + S]: which of the prefix's and the slot's positions a row may see, and how far back each of them lies.
        sees = torch.cat(
            [behind_prefix[:, None].expand(-1, prefix), torch.arange(self.longest)[None] < own[:, None]], 1
        )
        last = torch.tensor([spans[r].end - 1 for r in single])[:, None]
        first_own = torch.tensor([spans[r].shared for r in single])[:, None]
        places = [torch.arange(prefix).expand(len(single), -1), first_own + torch.arange(self.longest)]
        self.back_BS = (last - torch.cat(places, 1)).to(device)
        self.sees_BS = sees.to(device)

    def attend(self, layer: int, query, key, value, *, scaling: float, window: int | None = None) -> torch.Tensor:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]; a window sees that many tokens back."""
        keys, values = self.keys[layer], self.values[layer]  # [slots, context, Hkv, D]
        keys.flatten(0, 1)[self.write_T] = key[0].transpose(0, 1).to(keys.dtype)
        values.flatten(0, 1)[self.write_T] = value[0].transpose(0, 1).to(values.dtype)
        prefix_k, prefix_v = (x[layer] for x in self.prefix_kv)  # [P, Hkv, D]
        out_THD = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        if self.longest:
            out_THD[self.rows_B] = self._decode(query[0], keys, values, prefix_k, prefix_v, scaling, window).to(
                out_THD.dtype
            )
        for start, span in self.multiple:
            new, own = span.end - span.cached, span.end - span.shared
            k, v = (
                torch.cat([prefix[: span.shared], cache[span.slot, :own]]).transpose(0, 1)[None]
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
            x[self.slots_B, : self.longest].float().transpose(1, 2) for x in (keys, values)
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


def sample(logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling: ids int64 [B], and float32 [B] logprobs under the distribution that was sampled from."""
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return ids_B, logits_BV.log_softmax(-1).gather(-1, ids_B[:, None])[:, 0]
    logits_BV = _truncate(logits_BV.float() / sampling.temperature, sampling)
    logp_BV = logits_BV.log_softmax(-1)
    # The cdf in two levels, blocks and then tokens: one pass over the vocabulary instead of a float64 scan of it.
    vocabulary = logits_BV.shape[-1]
    p_BKJ = F.pad(logp_BV.exp(), (0, -vocabulary % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    mass_BK = p_BKJ.sum(-1, dtype=torch.float64)
    cdf_BK = mass_BK.cumsum(-1)
    # A rounded cdf may end a little off 1: scale the draw to it. `right` skips what has probability zero.
    draw_B1 = uniform_B[:, None] * cdf_BK[:, -1:]
    block_B1 = torch.searchsorted(cdf_BK, draw_B1, right=True).clamp_(max=cdf_BK.shape[-1] - 1)
    inside_BJ = p_BKJ.gather(1, block_B1[..., None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(-1)
    rest_B1 = draw_B1 - (cdf_BK - mass_BK).gather(-1, block_B1)
    rest_B1 = torch.minimum(rest_B1, inside_BJ[:, -1:] * (1 - 2**-50))  # rounding must not leave the block
    ids_B1 = block_B1 * _BLOCK + torch.searchsorted(inside_BJ, rest_B1, right=True)
    return ids_B1[:, 0], logp_BV.gather(-1, ids_B1)[:, 0]


_BLOCK = 256


def _truncate(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Keep the top_k tokens, then the smallest set with probability top_p; the rest become -inf."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        smallest_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    if sampling.top_p < 1:
        ordered_BV, order_BV = logits_BV.sort(descending=True)
        before_BV = ordered_BV.softmax(-1).cumsum(-1) - ordered_BV.softmax(-1)
        drop_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= sampling.top_p)
        logits_BV = logits_BV.masked_fill(drop_BV, float("-inf"))
    return logits_BV


def common_prefix(rows: abc.Sequence[abc.Sequence[int]]) -> list[int]:
    """The longest list that all rows start with."""
    low, high = min(rows), max(rows)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:length])
