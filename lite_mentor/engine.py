"""The rollout engine: many sequences, one KV cache, one forward a step. It knows nothing of tools or rewards.

A sequence alternates between *speaking* (a token is sampled every step) and *paused* (its turn ended; whoever drives
the engine may `resume` it with more tokens, or `release` it). Every step is ONE forward over whatever tokens are
pending: a whole prompt, a tool's result, or the single token that was just sampled. So prompts enter while others
decode, a tool's result costs only its own tokens, and earlier turns are never computed again.

Keys and values live in pages (paging.py). Sequences with the same prompt share one prefill and its full pages; each
has its own last page of the prompt, on which it writes on. The prefix that ALL prompts have in common (the text that
describes the tools) is held once, in the pool's first pages: every decode step reads it once for the whole batch, and
it outlives the sequences while the weights stay.

A sequence is admitted, in order of submission, when the free pages cover its prompt and one more page for each that
may still grow. Most sequences end long before their limit, so a pool much smaller than everyone's worst case serves;
when it runs out all the same, the youngest sequence gives its pages back and waits to be read again. The oldest never
does, and each fits into the pool alone: so all of them finish, and none is dropped.

When every row has one new token, `burst` steps run without the host: the token that was drawn is the next step's
input where it is, on the GPU, and the tokens of all of them are fetched by one copy (decode.py). What a sequence draws
behind its end of turn is thrown away.

The caller gives each sequence its own row of uniforms; uniform t names the noise with which token t is drawn. Who
decodes beside a sequence cannot change its noise, only the last bits of its logits, and such a change seldom changes
the token (mentor_kernels/sample.py).
"""

from __future__ import annotations

import collections.abc as abc
import math
import sys
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import torch

from lite_mentor.decode import Decoder, GraphMode, Sampling, without_graphs
from lite_mentor.device import memory_left
from lite_mentor.errors import UserError, say
from lite_mentor.paging import PagePool, Span, StepPlan
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
    pages: list[int] = field(default_factory=list)
    """Where the keys and values of the tokens from `shared` on are, in order; empty while it waits."""
    most_pages: int = 0
    """What `pages` can grow to."""
    shared: int = 0
    """Leading tokens whose keys and values are in the engine's shared prefix and not in `pages`."""
    cached: int = 0
    """Tokens of `ids` whose keys and values are in the prefix or the pages."""
    ended: bool = False
    """Did the last turn end with an end-of-turn token (and not at the length limit)?"""

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.prompt_length + len(self.uniforms) - len(self.ids)


class Engine:
    """Decodes up to `slots` sequences at once, each of up to `context` tokens; the rest wait their turn.

    The pool has room for `tokens` tokens in pages of `page` (by default for all slots at their longest).

    `forward(ids_1T, positions_1T, plan) -> hidden_TH` runs the student's backbone with our attention plan;
    `head(hidden_RH) -> logits_RV` float32. `backend` is that of the kernels that attend and sample. `burst` is the most
    tokens that a sequence samples in one step: by default 8 on CUDA, where asking the host costs more than a few
    tokens too many, and 1 elsewhere. `graphs` says whether those steps are played from CUDA graphs; `note`
    (the standard error if it is None) is told when "auto" finds that they cannot be.
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
        tokens: int | None = None,
        page: int = 16,
        chunk: int = 2048,
        burst: int | None = None,
        graphs: GraphMode = "auto",
        backend: str | None = None,
        note: abc.Callable[[str], None] | None = None,
    ):
        self.eos_ids = frozenset(eos_ids)
        self.slots, self.context, self.chunk, self.device = slots, context, chunk, torch.device(device)
        pages = -(-(slots * context if tokens is None else tokens) // page)
        self.pool = PagePool(
            layers=layers, pages=pages, page=page, kv_heads=kv_heads, head_dim=head_dim, device=device, dtype=dtype
        )
        self.burst = burst or (8 if self.device.type == "cuda" else 1)
        self.decoder = Decoder(
            forward, head, self.pool, width=self.pool.pages_for(context), most_steps=self.burst, graphs=graphs,
            backend=backend, note=note or partial(say, file=sys.stderr),
        )  # fmt: skip
        self.waiting: deque[Sequence] = deque()
        self.alive: list[Sequence] = []
        self.speaking: list[Sequence] = []
        self.prefix_ids: list[int] = []
        self.prefix_pages: list[int] = []
        self.evictions = 0
        """How often a sequence had to give its pages back: many mean that the pool is too small."""
        self.sampling = Sampling()

    @classmethod
    def of(
        cls,
        student: Student,
        *,
        slots: int,
        context: int,
        gib: float = 0.0,
        tokens: int | None = None,
        page: int = 16,
        burst: int | None = None,
        graphs: GraphMode = "auto",
        backend: str | None = None,
        note: abc.Callable[[str], None] | None = None,
    ) -> Engine:
        """An engine that samples from the student's rollout weights.

        Its pool takes `gib` GiB; with 0, what all slots need at their longest, but on a GPU at most nine tenths of the
        memory that is free now, less what CUDA graphs may keep. Raises UserError when not even one sequence of full
        length fits in it, or when the student was loaded for shorter ones.
        """
        if student.context and context > student.context:
            raise UserError(
                f"The student {student.name} was loaded for sequences of {student.context} tokens, by which its rotary "
                f"embeddings are scaled, and one may have {context}; load it for as many (`context` of load_student)."
            )
        if tokens is None:
            token_bytes = 2 * math.prod(student.cache) * student.dtype.itemsize
            # One page more: the spare one.
            most = slots * context + page
            kept = 0 if without_graphs(graphs, student.device, backend) else graph_bytes(student, slots)
            tokens = _affordable_tokens(token_bytes, most, gib, student.device, kept) - page
            if tokens < context:
                raise UserError(
                    f"The cache of keys and values can have {tokens * token_bytes / 2**30:.2f} GiB, room for {tokens} "
                    f"tokens, but one rollout may need {context}; raise --cache-gib, or lower --max-new-tokens, "
                    "--max-prompt-tokens or, since the update needs the rest of the memory, --micro-tokens. "
                    + memory_left(student.device)
                )
        return cls(
            student.rollout_hidden,
            student.rollout_logits,
            **student.cache._asdict(),
            eos_ids=student.eos_ids,
            slots=slots,
            context=context,
            tokens=tokens,
            page=page,
            device=student.device,
            dtype=student.dtype,
            burst=burst,
            graphs=graphs,
            backend=backend,
            note=note,
        )

    def describe(self) -> str:
        """One line: how large the cache is."""
        tokens = len(self.pool.holders) * self.pool.page
        size = self.pool.keys.nbytes + self.pool.values.nbytes
        return (
            f"cache of keys and values: {tokens} tokens, {size / 2**30:.2f} GiB; up to {self.slots} rollouts at once, "
            f"{min(self.slots, tokens // self.context)} of them at full length"
        )

    @property
    def busy(self) -> bool:
        """Is any sequence speaking or waiting to?"""
        return bool(self.speaking or self.waiting)

    def weights_changed(self) -> None:
        """Forget what was computed with older weights. Only between episodes: live sequences would mix two policies."""
        if self.waiting or self.alive:
            raise RuntimeError("the weights changed while sequences were being sampled")
        self._forget_prefix()

    def submit(self, ids: abc.Sequence[int], uniforms: abc.Sequence[float]) -> Sequence:
        """Queue a prompt.

        Raises ValueError when prompt and limit together exceed the context, or when there is nothing to read or to
        say; UserError when the whole pool is too small for this sequence alone.
        """
        total = len(ids) + len(uniforms)
        if not ids or not uniforms or total > self.context:
            raise ValueError(f"{len(ids)} prompt + {len(uniforms)} new tokens do not fit in {self.context}")
        if self.pool.pages_for(total - 1) > len(self.pool.holders):
            raise UserError(
                f"A prompt of {len(ids)} tokens with up to {len(uniforms)} new ones does not fit in the cache of "
                f"{len(self.pool.holders) * self.pool.page} tokens; shorten the prompt or lower --max-new-tokens."
            )
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
        if sequence.pages:
            self.speaking.append(sequence)
        else:  # they were taken back while it was paused
            self.waiting.appendleft(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give a paused sequence's pages back."""
        if sequence.pages:
            self.alive.remove(sequence)
            self.pool.drop(sequence.pages)
            sequence.pages, sequence.shared, sequence.cached = [], 0, 0

    def abandon(self) -> None:
        """Give up every sequence, wherever it stands."""
        self.waiting.clear()
        self.speaking.clear()
        for sequence in list(self.alive):
            self.release(sequence)

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Sample a token, or up to `burst`, for every speaking sequence; return those whose turn ended (now paused)."""
        self._admit()
        rows = self._affordable_rows()
        if not rows:  # all that are alive are paused, and hold what those that wait need
            return []
        decoding = all(len(row) == 1 and len(row[0].ids) - row[0].cached == 1 for row in rows)
        drawing, tokens, logps = self._decode([row[0] for row in rows]) if decoding else self._read(rows)
        if any(math.isnan(logp) for row in logps for logp in row):
            raise UserError(
                "The student's logits hold NaN or infinity, so no token can be drawn from them; its weights are broken "
                "or too large for this dtype: try --dtype fp32, or another --student."
            )
        for s, drawn, logp in zip(drawing, tokens, logps, strict=True):
            self._append(s, drawn, logp)
        done = [s for s in drawing if s.ended or s.room == 0]
        finished = {id(s) for s in done}
        self.speaking = [s for s in self.speaking if id(s) not in finished]
        return done

    def _append(self, sequence: Sequence, tokens: list[int], logps: list[float]) -> None:
        """What was drawn, up to the end of the turn; pages that were meant for what came behind it go back."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos_ids), len(tokens))
        sequence.ids += tokens[:end]
        sequence.sampled += [True] * end
        sequence.logp += logps[:end]
        sequence.ended = tokens[end - 1] in self.eos_ids
        sequence.cached = len(sequence.ids) - 1
        filled = self.pool.pages_for(sequence.cached - sequence.shared)
        self.pool.drop(sequence.pages[filled:])
        del sequence.pages[filled:]

    def _decode(self, drawing: list[Sequence]) -> tuple[list[Sequence], list[list[int]], list[list[float]]]:
        """Tokens for sequences that wait for nothing but their next one; as many as all of them have room for."""
        steps = min(self.burst, *(s.room for s in drawing))
        if sum(self._missing(s, steps) for s in drawing) > len(self.pool.free):
            steps = 1
        for s in drawing:
            s.pages += self.pool.take(self._missing(s, steps))
        first = [len(s.ids) - s.prompt_length for s in drawing]
        uniforms = [s.uniforms[a : a + steps] for s, a in zip(drawing, first, strict=True)]
        spans = [Span(s.pages, s.shared, s.cached, len(s.ids)) for s in drawing]
        prefix = len(self.prefix_ids)
        ids = [s.ids[-1] for s in drawing]
        return drawing, *self.decoder.run(ids, uniforms, spans, prefix=prefix, sampling=self.sampling)

    def _missing(self, sequence: Sequence, steps: int = 1) -> int:
        """Pages that it lacks for its tokens and the first `steps - 1` of those that it will draw."""
        return self.pool.pages_for(len(sequence.ids) + steps - 1 - sequence.shared) - len(sequence.pages)

    def _read(self, rows: list[list[Sequence]]) -> tuple[list[Sequence], list[list[int]], list[list[float]]]:
        """One token for each sequence after a forward in which some rows have more to read than their last token."""
        hidden_RH = self._forward_rows(rows)
        row_of = {id(s): r for r, row in enumerate(rows) for s in row}
        drawing = [s for s in self.speaking if id(s) in row_of]
        logits_BV = self.decoder.head(hidden_RH)[[row_of[id(s)] for s in drawing]]
        uniforms = [s.uniforms[len(s.ids) - s.prompt_length] for s in drawing]
        uniform_B = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
        token_B, logp_B = self.decoder.draw(logits_BV, uniform_B, self.sampling)
        return drawing, token_B[:, None].tolist(), logp_B[:, None].tolist()

    def _admit(self) -> None:
        """Let waiting sequences in while there are a slot and pages for the next one."""
        if self.waiting and not self.alive:
            self._renew_prefix()
        while self.waiting and len(self.alive) < self.slots:
            if not self._place(self.waiting[0]):
                if self.alive:
                    return
                self._forget_prefix()  # in a pool this small the prefix is in the way
                continue
            sequence = self.waiting.popleft()
            self.alive.append(sequence)
            self.speaking.append(sequence)

    def _place(self, sequence: Sequence) -> bool:
        """Give the prompt its pages, behind the shared prefix and shared with its group; False when too few are free.

        The page with the prompt's last token is never shared: the sequence computes or copies that one itself.
        """
        pool, length = self.pool, len(self.prefix_ids)
        shared = length if len(sequence.ids) > length and sequence.ids[:length] == self.prefix_ids else 0
        own, fresh = len(sequence.ids) - shared, len(sequence.ids) == sequence.prompt_length
        prompt, computed = _prompt(sequence), sequence.prompt_length - 1
        # Sequences that were put back can share more than their prompt: then the prefix holds all that siblings could.
        sibling = next(
            (
                s
                for s in self.alive
                if s.shared == shared <= computed and _prompt(s) == prompt and (fresh or s.cached >= computed)
            ),
            None,
        )
        lent = (computed - shared) // pool.page if sibling else 0
        longest = sequence.prompt_length + len(sequence.uniforms) - 1  # the very last token is never read
        most = pool.pages_for(longest - shared)
        growing = sum(len(s.pages) < s.most_pages for s in self.alive)
        fits_alone = most <= len(pool.holders) - len(self.prefix_pages)
        if not fits_alone or pool.pages_for(own) - lent + growing > len(pool.free):
            return False
        sequence.most_pages = most
        sequence.shared = sequence.cached = shared
        sequence.pages = pool.share(sibling.pages[:lent]) if sibling else []
        sequence.pages += pool.take(pool.pages_for(own) - lent)
        if sibling and sibling.cached >= computed:
            pool.copy(sibling.pages[lent], [sequence.pages[lent]])
            sequence.cached = computed
        return True

    def _renew_prefix(self) -> None:
        """With no sequence alive, make the prefix what all waiting prompts share, unless they share the present one."""
        shared = common_prefix([s.ids[:-1] for s in self.waiting])
        if self.prefix_ids and self.prefix_ids == shared[: len(self.prefix_ids)]:
            return
        self._forget_prefix()
        if shared:
            # The whole pool is free now, so the prefix gets its first pages: there its readers look for it.
            prefix = Sequence(len(shared), (), shared, [], [], 0)
            self._run([prefix])
            self.prefix_ids, self.prefix_pages = shared, prefix.pages

    def _forget_prefix(self) -> None:
        self.pool.drop(self.prefix_pages)
        self.prefix_ids, self.prefix_pages = [], []

    def _affordable_rows(self) -> list[list[Sequence]]:
        """The rows to run now, for which the pool has pages: the youngest sequences give theirs back until it has."""
        while True:
            rows = self._chunk_of_rows()
            if sum(self._missing(row[0]) for row in rows) <= len(self.pool.free):
                return rows
            youngest = self.alive[-1]
            self.release(youngest)
            self.evictions += 1
            if youngest in self.speaking:
                self.speaking.remove(youngest)
                self.waiting.appendleft(youngest)

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
                last = (leader.cached - 1 - leader.shared) // self.pool.page
                self.pool.copy(leader.pages[last], [s.pages[last] for s in followers])
                for s in followers:
                    s.cached = leader.cached
        return hidden_TH[last_R]

    def _run(self, leaders: list[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        for s in leaders:
            s.pages += self.pool.take(self._missing(s))
        spans = [Span(s.pages, s.shared, s.cached, len(s.ids)) for s in leaders]
        plan = StepPlan(self.pool, len(self.prefix_ids), spans, backend=self.decoder.backend)
        ids_1T = torch.tensor([[i for s in leaders for i in s.ids[s.cached :]]], device=self.device)
        return self.decoder.forward(ids_1T, plan.positions_T[None], plan), plan.last_R


def graph_bytes(student: Student, slots: int) -> int:
    """What the graphs of a decoding step may keep for what they compute in between.

    They share one pool, and the largest of all is what a step makes of its logits: with top_p it sorts them, which
    takes eight times their size. The graphs themselves take some megabytes each. An estimate, not measured on a GPU.
    """
    return 8 * slots * student.head_weight_VH.shape[0] * 4 + (256 << 20)


def _affordable_tokens(token_bytes: int, most: int, gib: float, device: torch.device, kept: int) -> int:
    """As many tokens as are needed at most, or as the memory holds; `kept` bytes of what is free are for others."""
    if gib:
        room = gib * 2**30
    elif device.type == "cuda":
        room = max(0, 0.9 * torch.cuda.mem_get_info(device)[0] - kept)
    else:
        return most
    return min(most, int(room // token_bytes))


def _prompt(sequence: Sequence) -> list[int]:
    return sequence.ids[: sequence.prompt_length]


def common_prefix(rows: abc.Sequence[abc.Sequence[int]]) -> list[int]:
    """The longest list that all rows start with."""
    low, high = min(rows), max(rows)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return list(low[:length])
