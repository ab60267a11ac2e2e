"""How other libraries are asked for what `linear_logprob` does. None is a dependency; each may be missing.

Each is a head, (hidden, weight, targets) -> (logprobs, entropy or None). "Seen" says how an adapter was checked without
a GPU, on small problems in float32 against float64: with the library's own code for CPUs, or with its kernels in
Triton's interpreter. "Not run" says what it says. Not here: Unsloth's `fused_linear_logprobs`, whose import changes
torch and transformers for the whole process and so for the other candidates; QuACK's linear cross entropy, which has no
gradient for each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Peer:
    """One way in which a library computes logprobs."""

    head: Head
    bonus: Head | None = None
    """With a differentiable entropy, where that costs extra; None: `head`."""
    cpu: bool = False
    """Has it code of its own for CPUs?"""


def _trl() -> dict[str, Peer]:
    """TRL 1.16: chunks of logits in bf16, made again in the backward. Seen on the CPU."""
    from trl.kernels import ChunkedLogProbFunction

    def head(*outputs: str) -> Head:
        # 32,768 columns at a time, no bias and no softcap, as TRL's own trainer calls it.
        return lambda h, w, y: ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32_768, None, 1.0, outputs)[:2]

    return {"TRL, chunked": Peer(head(), head("entropy"), cpu=True)}


def _liger() -> dict[str, Peer]:
    """Liger 0.8.5: the cross entropy of its trainers, and the one for PPO. Seen in the interpreter and on the CPU."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def plain(h, w, y):
        return -liger_fused_linear_cross_entropy(h, w, y, reduction="none"), None

    def scaled(h, w, y):
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y), None

    def with_entropy(h, w, y):
        loss_N, entropy_N = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y, return_entropy=True)
        return -loss_N, entropy_N

    return {"Liger, linear CE": Peer(plain), "Liger, scaled linear CE": Peer(scaled, with_entropy, cpu=True)}


def _cce() -> dict[str, Peer]:
    """Apple's Cut Cross-Entropy 25.1.1; with its default filter of gradients, and exact. Fails in the interpreter."""
    from cut_cross_entropy import linear_cross_entropy

    def head(eps: str | None) -> Head:
        return lambda h, w, y: (-linear_cross_entropy(h, w, y, reduction="none", filter_eps=eps), None)

    return {"CCE": Peer(head("high")), "CCE, exact": Peer(head(None))}


def _verl() -> dict[str, Peer]:
    """verl 0.9.1's Triton kernel; it makes the head's gradient as well. Not run."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return {"verl": Peer(lambda h, w, y: linear_cross_entropy(h, w, y, 1.0, "none"))}


LIBRARIES = {"trl": _trl, "liger-kernel": _liger, "cut-cross-entropy": _cce, "verl": _verl}
"""By their names on PyPI."""
