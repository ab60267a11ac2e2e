"""Decoding several tokens a row without the host: forward, head, draw, and on to the next token.

One step is a function of buffers on the device: it reads the tokens that were drawn last, and writes the next ones and
their logprobs into row k of two tables. So steps follow each other without a look at what was drawn, and a step can be
recorded once as a CUDA graph and played again for other rows, in the same buffers: a launch for a step, instead of some
fifty for each layer. A graph has a fixed number of rows, so a batch is filled up to a power of two with rows that read
and write the pool's spare page.

Where no graph can be recorded, the steps run one by one as they would have without any, and the reason is said once.

    B rows that decode   K steps at most
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from mentor_kernels import sample
from mentor_kernels.backend import resolve_backend

from lite_mentor.errors import UserError
from lite_mentor.paging import DecodePlan, PagePool, RowBlock, Span

GraphMode = Literal["auto", "on", "off"]


def without_graphs(mode: GraphMode, device: torch.device, backend: str | None) -> str:
    """Why steps are not played from CUDA graphs there; "" where they are.

    A graph must not know how long the shared prefix is, so only Triton's attention, which asks each row, is recorded.
    Raises UserError when graphs are asked for ("on") and cannot be.
    """
    if mode == "off":
        return "--cuda-graphs off"
    why = "they need a GPU" if device.type != "cuda" else ""
    if not why and resolve_backend(backend, device) != "triton":
        why = "they record Triton's attention, not torch's"
    if why and mode == "on":
        raise UserError(f"--cuda-graphs on: {why}; leave it out.")
    return why


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy, and then logprobs are those of temperature 1."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Buffers:
    """What a step reads and writes."""

    def __init__(self, block: RowBlock, prefix: int, backend: str | None):
        self.block, self.plan = block, DecodePlan(block, prefix, backend=backend)
        self.ids_B, self.uniform_KB, self.k = block.fields.ids_B, block.fields.uniform_KB, block.fields.k
        self.token_KB = torch.zeros(self.uniform_KB.shape, dtype=torch.long, device=self.ids_B.device)
        self.logp_KB = torch.zeros(self.uniform_KB.shape, device=self.ids_B.device)


class Decoder:
    """The model and its sampler; runs steps of rows that have one new token each, from CUDA graphs where it can.

    `width` is the most pages a row may have; `forward`, `head` and `backend` are as the engine gets them. With `graphs`
    "auto", `note` is told once if recording fails, and from then on steps run one by one; "on" makes that a UserError.
    """

    def __init__(
        self,
        forward: abc.Callable[..., torch.Tensor],
        head: abc.Callable[[torch.Tensor], torch.Tensor],
        pool: PagePool,
        *,
        width: int,
        most_steps: int,
        graphs: GraphMode,
        backend: str | None,
        note: abc.Callable[[str], None],
    ):
        self.forward, self.head, self.pool, self.backend, self.note = forward, head, pool, backend, note
        self.width, self.most_steps, self.mode = width, most_steps, graphs
        self.device = pool.keys.device
        self.why_not = without_graphs(graphs, self.device, backend)
        self._block: RowBlock | None = None
        """Of the last burst that was not played from a graph."""
        self._buffers: dict[int, Buffers] = {}
        """Of the graphs, by their number of rows."""
        self._recorded: dict[tuple[int, Sampling], torch.cuda.CUDAGraph] = {}

    @property
    def graphs(self) -> bool:
        """Are steps played from CUDA graphs?"""
        return not self.why_not

    def describe(self) -> str:
        """One line: graphs or not, and why not."""
        return "decoding from CUDA graphs" if self.graphs else f"decoding without CUDA graphs: {self.why_not}"

    def run(
        self,
        ids: list[int],
        uniforms: list[abc.Sequence[float]],
        spans: list[Span],
        *,
        prefix: int,
        sampling: Sampling,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The next tokens of each row and their logprobs; as many as `uniforms` has for each.

        Every span has the pages that its last new token needs.
        """
        count, steps = len(ids), len(uniforms[0])
        graph, buffers = self._graph(1 << (count - 1).bit_length(), sampling) if self.graphs else (None, None)
        if buffers is None:
            buffers = Buffers(self._fitting_block(count, steps, max(len(s.pages) for s in spans)), prefix, self.backend)
        buffers.block.fill(spans, ids, uniforms)
        for _ in range(steps):
            if graph is not None:
                graph.replay()
            else:
                self._step(buffers, sampling)
        return buffers.token_KB[:steps, :count].T.tolist(), buffers.logp_KB[:steps, :count].T.tolist()

    def draw(
        self, logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of each row and its logprob."""
        how = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        return sample(logits_BV, uniform_B, **how, backend=self.backend)

    def _fitting_block(self, rows: int, steps: int, width: int) -> RowBlock:
        """The last one, if it has these sizes: then most of its tables are as they should be."""
        steps = max(steps, self.most_steps)
        last = self._block
        if last is None or (last.rows, last.steps, last.width) != (rows, steps, width):
            self._block = RowBlock(self.pool, rows, steps, width)
        return self._block

    def _step(self, buffers: Buffers, sampling: Sampling) -> None:
        plan, k = buffers.plan, buffers.k
        hidden_BH = self.forward(buffers.ids_B[None], plan.positions_T[None], plan)
        uniform_B = buffers.uniform_KB.index_select(0, k)[0]
        token_B, logp_B = self.draw(self.head(hidden_BH), uniform_B, sampling)
        buffers.token_KB.index_copy_(0, k, token_B[None])
        buffers.logp_KB.index_copy_(0, k, logp_B[None])
        buffers.ids_B.copy_(token_B)
        plan.advance()
        k.add_(1)

    def _graph(self, rows: int, sampling: Sampling) -> tuple[torch.cuda.CUDAGraph | None, Buffers | None]:
        """The graph for so many rows, recorded at first use on rows of the spare page alone, and its buffers.

        Without either when it could not be recorded: then there are no more graphs.
        """
        if (rows, sampling) not in self._recorded:
            try:
                if rows not in self._buffers:
                    block = RowBlock(self.pool, rows, self.most_steps, self.width)
                    self._buffers[rows] = Buffers(block, 0, self.backend)
                self._buffers[rows].block.fill([])
                self._recorded[rows, sampling] = self._record(self._buffers[rows], sampling)
            except RuntimeError as error:  # what CUDA and torch raise, memory that is missing included
                self._give_up(error)
                return None, None
        return self._recorded[rows, sampling], self._buffers[rows]

    def _record(self, buffers: Buffers, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """A graph of one step; a step runs, so what the buffers hold afterwards is not what they held before.

        All graphs have their memory in one pool, as they may: they were recorded on one stream, none plays beside
        another, and what they return lies in buffers outside of it.
        """
        with torch.cuda.device(self.device):
            side, pool = self._stream_and_memory
            side.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(side):  # a recording that fails leaves its own stream current; this does not
                    # What is compiled or allocated only once must not be part of the recording.
                    self._step(buffers, sampling)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool, stream=side):
                        self._step(buffers, sampling)
            finally:  # whatever becomes of it, nobody may reuse the buffers while that stream is busy with them
                torch.cuda.current_stream().wait_stream(side)
        return graph

    @cached_property
    def _stream_and_memory(self) -> tuple[torch.cuda.Stream, tuple[int, int]]:
        return torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def _give_up(self, error: RuntimeError) -> None:
        """Steps run one by one from now on."""
        first: BaseException = error  # what ends a broken recording complains of what broke it
        while first.__context__ is not None:
            first = first.__context__
        reason = (str(first).strip().splitlines() or [type(first).__name__])[0].rstrip(".")
        if self.mode == "on":
            raise UserError(
                f"--cuda-graphs on: a decoding step cannot be recorded here ({reason}); leave it out, and it will run "
                "without."
            ) from error
        self.why_not = f"a step could not be recorded ({reason})"
        self._recorded.clear()
        self._buffers.clear()
        self.note(self.describe())
