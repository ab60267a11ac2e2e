"""Hidden states -> kernels -> loss: where a packed row meets the fused head and the policy loss."""

from __future__ import annotations

import math
import os

import torch
from mentor_kernels import (
    Normaliser,
    PolicyLossConfig,
    PolicyLossOut,
    RowCopies,
    TeacherTopK,
    gather_rows,
    linear_logprob,
    linear_policy_loss,
)
from mentor_kernels.backend import interpreted, resolve_head_backend

from lite_mentor.attention import PackedPlan
from lite_mentor.config import Config
from lite_mentor.decode import without_graphs
from lite_mentor.errors import UserError
from lite_mentor.student import Student
from lite_mentor.types import Batch

REPEATABLE = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG; under any other, and without one, torch's deterministic mode refuses products."""
# cuBLAS reads it when it starts, which is after the imports.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", REPEATABLE[0])


def loss_config(config: Config) -> PolicyLossConfig:
    """The part of the configuration that the policy-loss kernel reads."""
    return PolicyLossConfig(
        loss=config.loss,
        clip_low=config.clip[0],
        clip_high=config.clip[1],
        kl=config.kl,
        beta=config.beta,
        entropy_coef=config.entropy,
        tis_cap=config.tis_cap or None,
        max_new_tokens=config.max_new_tokens,
    )


def check_backend(config: Config) -> None:
    """Raises UserError when `config`, whose device and dtype are decided, asks for kernels that cannot run there."""
    if config.backend == "triton" and config.device == "cpu" and not (interpreted() and config.dtype == "fp32"):
        raise UserError(
            "--backend triton needs a GPU; on a CPU its kernels run only in Triton's interpreter, slowly and in "
            "float32: set TRITON_INTERPRET=1 and give --dtype fp32, or use --backend torch."
        )
    if config.drop_mass and resolve_head_backend(config.kernel_backend, torch.device(config.device)) == "torch":
        raise UserError("--drop-mass is for the head's Triton kernels, and here it takes torch's; leave it out.")
    workspace = os.environ["CUBLAS_WORKSPACE_CONFIG"]
    if config.deterministic and config.device != "cpu" and workspace not in REPEATABLE:
        raise UserError(
            f"CUBLAS_WORKSPACE_CONFIG is {workspace!r}, under which cuBLAS need not repeat its bits; unset it, or give "
            "--no-deterministic."
        )
    without_graphs(config.cuda_graphs, torch.device(config.device), config.kernel_backend)


def logprobs(
    student: Student, batch: Batch, *, temperature: float = 1.0, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprob and entropy [N] of each sampled token, under the student as it is now."""
    hidden_NH = sampled_hidden(student, batch, backend)
    how = _head(student, temperature, backend)
    out = linear_logprob(hidden_NH, student.head_weight_VH, batch.targets_N.to(hidden_NH.device), **how)
    return out.logprob_N, out.entropy_N


def supervised_loss(
    student: Student,
    batch: Batch,
    backend: str | None = None,
    soft: tuple[torch.Tensor, torch.Tensor] | None = None,
    soft_weight: float = 0.0,
) -> torch.Tensor:
    """Mean negative logprob of the sampled tokens, as this row's share of the whole step's.

    That is cispo's loss with an advantage of 1, since without old logprobs every ratio is 1. With `soft`, a teacher's
    likeliest tokens and their logprobs [N, K], soft_weight of it is the KL to those.
    """
    hidden_NH = sampled_hidden(student, batch, backend)
    device = hidden_NH.device
    targets_N, sequence_N = batch.targets_N.to(device), batch.sequence_N.to(device)
    return linear_policy_loss(
        hidden_NH,
        student.head_weight_VH,
        targets_N,
        old_logp_N=None,
        advantage_N=torch.full(targets_N.shape, 1 - soft_weight if soft else 1.0, device=device),
        sequence_N=sequence_N,
        teacher=TeacherTopK(*(x.to(device) for x in soft), soft_weight) if soft else None,
        **_head(student, 1.0, backend),
        config=PolicyLossConfig(loss="cispo"),
        normaliser=Normaliser(tokens=batch.global_tokens, sequences=batch.global_sequences),
    ).loss


def sampled_hidden(student: Student, batch: Batch, backend: str | None = None) -> torch.Tensor:
    """Hidden states [N, H] from which the sampled tokens are predicted."""
    tokens = len(batch.ids_T)
    # A program for each token would take the interpreter minutes; the bits are the torch backend's.
    backend = None if interpreted() else backend
    plan = PackedPlan(batch.segment_starts, batch.segment_parents, tokens, student.device, backend)
    hidden_TH = student.hidden(batch.ids_T[None], batch.positions_T[None], plan)
    # A group's first tokens are all predicted by the last state of their prompt.
    copies = RowCopies.of(batch.row_index_N, tokens, hidden_TH.device)
    return gather_rows(hidden_TH[:, None], copies, backend=backend)[:, 0]


def _head(student: Student, temperature: float, backend: str | None) -> dict:
    return dict(temperature=temperature, softcap=student.softcap, scale=student.logit_scale, backend=backend)


@torch.no_grad()
def old_logprobs(student: Student, batch: Batch, config: Config) -> torch.Tensor:
    """The trainer's own logprobs [N] before the first of several updates on the same rollouts.

    Bit for bit those that `batch_loss` finds for the same row while the weights stay, so each ratio of the first update
    is exactly 1: old logprobs never come from the sampler. This was tested on the CPU, and not yet on a GPU, where with
    the exact KL the order of its sums differs. What the sampler disagrees with is no part of the ratio; it is measured
    (logp_gap) and weighted (tis_cap) apart.
    """
    return logprobs(student, batch, temperature=config.temperature, backend=config.kernel_backend)[0]


def batch_loss(student: Student, batch: Batch, config: Config, old_logp_N: torch.Tensor | None = None) -> PolicyLossOut:
    """This row's share of the optimizer step's loss. Without `old_logp_N` the update is on-policy: every ratio is 1."""
    ref_hidden_NH = None
    if config.beta:
        with torch.no_grad(), student.reference():
            ref_hidden_NH = sampled_hidden(student, batch, config.kernel_backend)
    hidden_NH = sampled_hidden(student, batch, config.kernel_backend)
    device = hidden_NH.device
    return linear_policy_loss(
        hidden_NH,
        student.head_weight_VH,
        batch.targets_N.to(device),
        old_logp_N=old_logp_N,
        advantage_N=batch.advantage_N.to(device),
        sequence_N=batch.sequence_N.to(device),
        ref_hidden_NH=ref_hidden_NH,
        behaviour_logp_N=batch.behaviour_logp_N.to(device),
        **_head(student, config.temperature, config.kernel_backend),
        config=loss_config(config),
        normaliser=Normaliser(tokens=batch.global_tokens, sequences=batch.global_sequences),
        drop_mass=config.drop_mass,
    )


def backward(loss: torch.Tensor, config: Config) -> None:
    """loss.backward(); by default with gradients that are the same, bit for bit, each time that it is done again.

    On the CPU they are so anyway. On CUDA (not yet run there) it takes torch's deterministic algorithms: attention's
    backward follows that mode, though not the one that merely warns. It is on in here alone, since operations elsewhere
    would raise under it; and without its default of filling new memory.
    """
    if not config.deterministic:
        loss.backward()
        return
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        loss.backward()
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class StepMetrics:
    """Gathers what the rows of one step report: maxima by their maximum, everything else by its sum.

    The kernels' sums already carry the global normaliser, so over one optimizer step they add to means.
    """

    def __init__(self, updates: int):
        self._updates, self._values, self._tokens = updates, {}, 0
        self._names: list[str] = []
        self._unread: list[torch.Tensor] = []
        """The values of rows that were not looked at yet, one tensor each, on the device."""

    def add(self, out: PolicyLossOut, batch: Batch) -> None:
        """Take in one row, without a look at its values."""
        self._tokens += len(batch.ids_T)
        values = {"loss": out.loss.detach(), **out.metrics}
        self._names = [_NAMES.get(name, name) for name in values]
        self._unread.append(torch.stack([value.float() for value in values.values()]))

    def not_finite(self) -> list[str]:
        """The names of values that are not finite in the rows since the last call. Waits for the GPU, once."""
        wrong = []
        for numbers in torch.stack(self._unread).tolist() if self._unread else ():
            for name, value in zip(self._names, numbers, strict=True):
                if not math.isfinite(value):
                    wrong.append(name)
                if name.endswith("max"):
                    self._values[name] = max(self._values.get(name, value), value)
                else:
                    self._values[name] = self._values.get(name, 0.0) + value / self._updates
        self._unread = []
        return wrong

    def result(self) -> dict[str, float]:
        """The step's metrics, under the names of metrics.jsonl."""
        self.not_finite()
        return {**self._values, "tokens/trained": self._tokens}


_NAMES = {
    "clip_low": "clip/low", "clip_high": "clip/high", "clip_dual": "clip/dual", "ratio_mean": "ratio/mean",
    "ratio_max": "ratio/max", "tis_mean": "tis/mean", "tis_capped": "tis/capped",
    "logp_gap_mean": "logp_gap/mean", "logp_gap_max": "logp_gap/max",
}  # fmt: skip
