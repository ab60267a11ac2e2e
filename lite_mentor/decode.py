"""Decoding several tokens a row without the host: forward, head, draw, and on to the next token.

One step is a function of buffers on the device: it reads the tokens that were drawn last, and writes the next ones and
their logprobs into row k of two tables. So steps follow each other without a look at what was drawn, and a step can be
recorded once as a CUDA graph and played again for other rows, in the same buffers: a launch for a step, instead of some
twenty for each layer. A graph has a fixed number of rows, so a batch is filled up to a power of two with rows that read
and write the pool's spare page.

    B rows that decode   K steps at most
"""

from __future__ import annotations

import collections.abc as abc
from dataclasses import dataclass

import torch
from mentor_kernels import sample

from lite_mentor.paging import DecodePlan, PagePool, Span


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy, and then logprobs are those of temperature 1."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class Buffers:
    """What a step reads and writes."""

    def __init__(self, ids_B: torch.Tensor, uniform_KB: torch.Tensor, plan: DecodePlan):
        self.ids_B, self.uniform_KB, self.plan = ids_B, uniform_KB, plan
        self.token_KB = torch.zeros(uniform_KB.shape, dtype=torch.long, device=ids_B.device)
        self.logp_KB = torch.zeros(uniform_KB.shape, device=ids_B.device)
        self.k = torch.zeros(1, dtype=torch.long, device=ids_B.device)

    def tensors(self) -> list[torch.Tensor]:
        """All that distinguishes one call's buffers from another's; what is written is not among them, but for k."""
        rows = self.plan.rows
        return [
            self.ids_B, self.uniform_KB, self.k, rows.tables_BN, rows.shared_B, rows.end_B, self.plan.positions_T,
            self.plan.write_T,
        ]  # fmt: skip


class Decoder:
    """The model and its sampler; runs steps of rows that have one new token each. With `graphs`, from CUDA graphs.

    A graph must not know how long the shared prefix is, so only Triton's attention, which asks each row, is recorded.
    `width` is the most pages a row may have; `forward`, `head` and `backend` are as the engine gets them.
    """

    def __init__(
        self,
        forward: abc.Callable[..., torch.Tensor],
        head: abc.Callable[[torch.Tensor], torch.Tensor],
        pool: PagePool,
        *,
        width: int,
        most_steps: int,
        graphs: bool,
        backend: str | None,
    ):
        self.forward, self.head, self.pool, self.backend = forward, head, pool, backend
        self.width, self.most_steps, self.graphs = width, most_steps, graphs
        self._recorded: dict[tuple[int, Sampling], tuple[torch.cuda.CUDAGraph, Buffers]] = {}
        self._memory = torch.cuda.graph_pool_handle() if graphs else None

    def run(
        self,
        ids: list[int],
        uniforms: list[list[float]],
        spans: list[Span],
        *,
        prefix: int,
        sampling: Sampling,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """The next tokens of each row and their logprobs; as many as `uniforms` has for each.

        Every span has the pages that its last new token needs.
        """
        count, steps = len(ids), len(uniforms[0])
        buffers = self._buffers(ids, uniforms, spans, prefix)
        if self.graphs:
            graph, recorded = self._graph(len(buffers.ids_B), sampling)
            for ours, theirs in zip(recorded.tensors(), buffers.tensors(), strict=True):
                ours.copy_(theirs)
            for _ in range(steps):
                graph.replay()
            buffers = recorded
        else:
            for _ in range(steps):
                self._step(buffers, sampling)
        return buffers.token_KB[:steps, :count].T.tolist(), buffers.logp_KB[:steps, :count].T.tolist()

    def draw(
        self, logits_BV: torch.Tensor, uniform_B: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token of each row and its logprob."""
        how = dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        return sample(logits_BV, uniform_B, **how, backend=self.backend)

    def _buffers(self, ids: list[int], uniforms: list[list[float]], spans: list[Span], prefix: int) -> Buffers:
        """On the device. For a graph, filled up to its fixed sizes."""
        device = self.pool.keys.device
        rows, steps, width = len(ids), len(uniforms[0]), 0
        if self.graphs:
            rows, steps, width = 1 << (rows - 1).bit_length(), self.most_steps, self.width
        ids_B, uniform_KB = torch.zeros(rows, dtype=torch.long), torch.zeros(steps, rows, dtype=torch.float64)
        ids_B[: len(ids)] = torch.tensor(ids)
        uniform_KB[: len(uniforms[0]), : len(ids)] = torch.tensor(uniforms, dtype=torch.float64).T
        plan = DecodePlan(self.pool, prefix, spans, rows=rows, width=width, backend=self.backend)
        return Buffers(ids_B.to(device), uniform_KB.to(device), plan)

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

    def _graph(self, rows: int, sampling: Sampling) -> tuple[torch.cuda.CUDAGraph, Buffers]:
        """The graph for so many rows; recorded at first use, on rows of the spare page alone."""
        key = rows, sampling
        if key not in self._recorded:
            buffers = self._buffers([0] * rows, [[0.0]] * rows, [Span([self.pool.spare], 0, 0, 1)] * rows, 0)
            self._recorded[key] = self._record(buffers, sampling), buffers
        return self._recorded[key]

    def _record(self, buffers: Buffers, sampling: Sampling) -> torch.cuda.CUDAGraph:
        """A graph of one step; the step runs, so what the buffers hold afterwards is not what they held before."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is compiled or allocated only once must not be part of the recording
            self._step(buffers, sampling)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._step(buffers, sampling)
        return graph
