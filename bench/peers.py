"""Who the loss head is compared with: torch's own ways, and other libraries where they import.

A candidate maps the problem and a mode to logprobs (`score`), or to the gradient by the hidden states (`train`; with an
entropy bonus `bonus`). All get the same tensors; none makes a gradient for the head.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mentor_kernels import linear_logprob
from torch.utils.checkpoint import checkpoint

from bench.libraries import LIBRARIES, Head
from lite_mentor.errors import UserError

CHUNK_ROWS = 256


@dataclass(frozen=True)
class Inputs:
    """One problem."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    targets_N: torch.Tensor
    grad_logprob_N: torch.Tensor
    grad_entropy_N: torch.Tensor


Candidate = Callable[[Inputs, str], torch.Tensor]


def from_head(head: Head, bonus: Head | None = None) -> Candidate:
    """Run a head as each mode needs it; the entropy bonus by another one, if given."""

    def run(inputs: Inputs, mode: str) -> torch.Tensor:
        if mode == "score":
            with torch.no_grad():
                return head(inputs.hidden_NH, inputs.weight_VH, inputs.targets_N)[0]
        hidden_NH = inputs.hidden_NH.detach().requires_grad_()
        chosen = bonus if mode == "bonus" and bonus else head
        logprob_N, entropy_N = chosen(hidden_NH, inputs.weight_VH, inputs.targets_N)
        outputs, grads = [logprob_N], [inputs.grad_logprob_N.to(logprob_N.dtype)]
        if mode == "bonus":
            if entropy_N is None:
                raise NotImplementedError("gives no entropy")
            outputs, grads = [*outputs, entropy_N], [*grads, inputs.grad_entropy_N.to(entropy_N.dtype)]
        return torch.autograd.grad(outputs, hidden_NH, grads)[0]

    return run


def all_logits(hidden_NH, weight_VH, targets_N):
    """What most trainers do: logits in the model's dtype, log_softmax in float32."""
    log_p_NV = torch.log_softmax((hidden_NH @ weight_VH.T).float(), -1)
    return log_p_NV.gather(1, targets_N[:, None])[:, 0], _entropy(log_p_NV)


def all_logits_float32(hidden_NH, weight_VH, targets_N):
    """The same with logits as exact as ours."""
    log_p_NV = torch.log_softmax(hidden_NH.float() @ weight_VH.float().T, -1)
    return log_p_NV.gather(1, targets_N[:, None])[:, 0], _entropy(log_p_NV)


class _Entropy(torch.autograd.Function):
    """-sum p log p, made only when its gradient or value is used; as an operator of log p."""

    @staticmethod
    def forward(ctx, log_p_NV):
        ctx.save_for_backward(log_p_NV)
        return log_p_NV.new_zeros(log_p_NV.shape[0])

    @staticmethod
    def backward(ctx, grad_N):
        (log_p_NV,) = ctx.saved_tensors
        return -(log_p_NV.exp() * (log_p_NV + 1)).mul_(grad_N[:, None])


def _entropy(log_p_NV: torch.Tensor) -> torch.Tensor:
    """A placeholder value with the entropy's gradient: no mode looks at the value, so nobody pays for it."""
    return _Entropy.apply(log_p_NV)


def chunks_of_rows(hidden_NH, weight_VH, targets_N):
    """`all_logits` for CHUNK_ROWS rows at a time, made again in the backward."""
    parts = [
        checkpoint(all_logits, hidden, weight_VH, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_NH.split(CHUNK_ROWS), targets_N.split(CHUNK_ROWS), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def torch_linear_cross_entropy(**options) -> Head:
    """torch's own operator: all logits, or with options chunks of rows, made again in the backward."""
    how = torch.nn.LinearCrossEntropyOptions(**options) if options else None

    def head(hidden_NH, weight_VH, targets_N):
        return -F.linear_cross_entropy(hidden_NH, weight_VH, targets_N, reduction="none", options=how), None

    return head


def candidates(device: str, peers: tuple[str, ...]) -> tuple[dict[str, Candidate], dict[str, str]]:
    """(candidates by name, versions of the libraries asked for or why they are not there). "all" asks for all of them.

    Raises UserError for a library that has no adapter here.
    """
    cuda = device.startswith("cuda")
    found: dict[str, Candidate] = {
        "ours, torch": from_head(lambda h, w, y: linear_logprob(h, w, y, backend="torch")),
        "all logits": from_head(all_logits),
        "all logits, float32": from_head(all_logits_float32),
        "chunks of rows": from_head(chunks_of_rows),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = from_head(torch_linear_cross_entropy())
        chunks = torch_linear_cross_entropy(batch_chunk_size=1024, chunking_method=None)
        found["F.linear_cross_entropy, chunks of 1,024 rows"] = from_head(chunks)
    if cuda:
        found = {"ours, triton": from_head(lambda h, w, y: linear_logprob(h, w, y, backend="triton")), **found}
        found["all logits, torch.compile"] = from_head(torch.compile(all_logits))
    unknown = set(peers) - {"all", "none", *LIBRARIES}
    if unknown:
        raise UserError(f"--peers {' '.join(sorted(unknown))}: here are all, none, {', '.join(LIBRARIES)}.")
    versions: dict[str, str] = {}
    for package in LIBRARIES if "all" in peers else [p for p in peers if p != "none"]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
            continue
        try:
            heads = LIBRARIES[package]()
        except Exception as error:  # whatever another's import raises; the table says it
            versions[package] += f" (does not import: {type(error).__name__}: {error})"
            continue
        fit = {name: peer for name, peer in heads.items() if cuda or peer.cpu}
        if not fit:
            versions[package] += " (needs a GPU)"
        found |= {name: from_head(peer.head, peer.bonus) for name, peer in fit.items()}
    return found, versions
