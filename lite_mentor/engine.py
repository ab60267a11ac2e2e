"""The rollout engine: many sequences, one KV cache, one forward a step. It knows nothing of tools or rewards.

A sequence alternates between *speaking* (a token is sampled every step) and *paused* (its turn ended; whoever drives
the engine may `resume` it with more tokens, or `release` it). Every step is ONE forward over whatever tokens are
pending: a whole prompt, a tool's result, or the single token that was just sampled. So prompts enter while others
decode, a tool's result costs only its own tokens, and earlier turns are never computed again.

Sequences submitted together with the same prompt share one prefill: the first computes it, the others copy its keys
and values. The prefix that ALL prompts of a run have in common (the text that describes the tools) is kept between
submissions, for as long as the weights stay the same.

Sampling is counter-based: the caller gives each sequence its own row of uniforms, and the token at position t
is the inverse-CDF of uniform t. Batch order, batch size and scheduling cannot change what a sequence draws.
"""

from __future__ import annotations

import collections.abc as abc
from collections import deque
from dataclasses import dataclass, field

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
    cached: int = 0
    """Tokens of `ids` whose keys and values are in the cache."""
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
        self.prefix_kv: tuple[torch.Tensor, torch.Tensor] | None = None
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
        self.prefix_ids, self.prefix_kv = [], None

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
        """Move waiting sequences into free slots and give them the prefix that all prompts share."""
        fresh = []
        while self.waiting and self.free:
            sequence = self.waiting.popleft()
            sequence.slot = self.free.pop()
            fresh.append(sequence)
        if not fresh:
            return
        self.speaking += fresh
        shared = common_prefix([s.ids[:-1] for s in (*fresh, *self.waiting)])
        known = len(self.prefix_ids)
        if not known or self.prefix_ids != shared[:known]:
            self._prefill_prefix(fresh[0], shared)
        if self.prefix_ids:
            slots = torch.tensor([s.slot for s in fresh], device=self.device)
            for cache, prefix in zip((self.keys, self.values), self.prefix_kv, strict=True):
                cache[:, slots, : len(self.prefix_ids)] = prefix[:, None]
            for s in fresh:
                s.cached = len(self.prefix_ids)

    def _prefill_prefix(self, sequence: Sequence, shared: list[int]) -> None:
        self.prefix_ids = shared
        if shared:
            self._run([(sequence, shared)])
        length, slot = len(shared), sequence.slot
        self.prefix_kv = (self.keys[:, slot, :length].clone(), self.values[:, slot, :length].clone())

    def _chunk_of_rows(self) -> list[list[Sequence]]:
        """Speaking sequences to run now, those with the same uncomputed prompt in one row, up to `chunk` tokens."""
        rows: dict[object, list[Sequence]] = {}
        tokens = 0
        for s in self.speaking:
            untouched = len(s.ids) == s.prompt_length and s.cached == len(self.prefix_ids)
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
        hidden_TH, last_R = self._run([(row[0], row[0].ids[row[0].cached :]) for row in rows])
        for leader, *followers in rows:
            leader.cached = len(leader.ids)
            if followers:
                slots = torch.tensor([s.slot for s in followers], device=self.device)
                start, end = len(self.prefix_ids), leader.cached
                for cache in (self.keys, self.values):
                    cache[:, slots, start:end] = cache[:, leader.slot, start:end].unsqueeze(1)
                for s in followers:
                    s.cached = leader.cached
        return hidden_TH[last_R]

    def _run(self, work: list[tuple[Sequence, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        plan = DecodePlan(self.keys, self.values, [(s.slot, s.cached, len(ids)) for s, ids in work])
        ids_1T = torch.tensor([[i for _, ids in work for i in ids]], device=self.device)
        return self.forward(ids_1T, plan.positions_T[None], plan), plan.last_R


class DecodePlan:
    """Attention of one engine step: writes new keys and values into the cache, attends over each slot's past.

    `spans` lists (slot, tokens already cached, new tokens) in the order of the packed row.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, spans: list[tuple[int, int, int]]):
        device = keys.device
        self.keys, self.values, self.context = keys, values, keys.shape[2]
        positions = [torch.arange(past, past + new) for _, past, new in spans]
        self.positions_T = torch.cat(positions).to(device)
        flat = [slot * self.context + p for (slot, _, _), p in zip(spans, positions, strict=True)]
        self.write_T = torch.cat(flat).to(device)
        starts = torch.tensor([0, *(new for _, _, new in spans)]).cumsum(0)
        self.last_R = (starts[1:] - 1).to(device)
        # Rows of a single new token decode as one batch; longer rows (prompts, tool results) go one by one.
        self.single = [r for r, (_, _, new) in enumerate(spans) if new == 1]
        self.multiple = [
            (int(starts[r]), int(starts[r + 1]), slot, past + new)
            for r, (slot, past, new) in enumerate(spans)
            if new > 1
        ]
        if self.single:
            past = torch.tensor([spans[r][1] + 1 for r in self.single], device=device)
            self.longest = int(past.max())
            self.single_rows = starts[self.single].to(device)
            self.single_slots = torch.tensor([spans[r][0] for r in self.single], device=device)
            # [B, 1, 1, S]: broadcasts over heads and over the query heads of a KV head.
            self.single_mask = (torch.arange(self.longest, device=device)[None] < past[:, None])[:, None, None]

    def attend(self, layer: int, query, key, value, *, scaling: float) -> torch.Tensor:
        """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
        _, heads, tokens, dim = query.shape
        keys, values = self.keys[layer], self.values[layer]  # [slots, context, Hkv, D]
        keys.view(-1, *keys.shape[2:])[self.write_T] = key[0].transpose(0, 1).to(keys.dtype)
        values.view(-1, *values.shape[2:])[self.write_T] = value[0].transpose(0, 1).to(values.dtype)
        out = query.new_empty(tokens, heads, dim)
        if self.single:
            # The query heads that share a KV head become the rows of one small attention: [B, Hkv, Hq / Hkv, D].
            grouped = query[0, :, self.single_rows].transpose(0, 1).unflatten(1, (keys.shape[2], -1))
            k = keys[self.single_slots, : self.longest].transpose(1, 2)
            v = values[self.single_slots, : self.longest].transpose(1, 2)
            got = F.scaled_dot_product_attention(grouped, k, v, attn_mask=self.single_mask, scale=scaling)
            out[self.single_rows] = got.flatten(1, 2)
        for start, end, slot, length in self.multiple:
            q = query[:, :, start:end]
            k, v = (x[slot, :length].transpose(0, 1)[None] for x in (keys, values))
            mask = torch.ones(end - start, length, dtype=torch.bool, device=q.device).tril(length - (end - start))
            got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
            out[start:end] = got[0].transpose(0, 1)
        return out[None]


def sample(logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF sampling: ids int64 [B], and float32 [B] logprobs under the distribution that was sampled from."""
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
        return ids_B, logits_BV.log_softmax(-1).gather(-1, ids_B[:, None])[:, 0]
    logits_BV = _truncate(logits_BV.float() / sampling.temperature, sampling)
    logp_BV = logits_BV.log_softmax(-1)
    cdf_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    # A rounded cdf may end a little off 1: scale the draw to it. `right` skips tokens of probability zero.
    draw_B1 = uniform_B[:, None] * cdf_BV[:, -1:]
    ids_B1 = torch.searchsorted(cdf_BV, draw_B1, right=True).clamp_(max=logits_BV.shape[-1] - 1)
    return ids_B1[:, 0], logp_BV.gather(-1, ids_B1)[:, 0]


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
