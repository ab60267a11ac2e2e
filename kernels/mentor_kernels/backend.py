"""Which implementation of an operator runs."""

from __future__ import annotations

import torch
import triton

_INTERPRETED = triton.knobs.runtime.interpret


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """`backend`, or when it is None the default for `device`: "triton" on CUDA, "torch" elsewhere.

    Raises ValueError for any other name, and for "triton" where it cannot run.
    """
    if backend is None:
        return "triton" if device.type == "cuda" else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton", "torch" or None, not {backend!r}')
    if backend == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(
            f"the Triton backend needs tensors on a CUDA device, not on {device}; "
            "to run its kernels on the CPU, slowly, set TRITON_INTERPRET=1 before mentor_kernels is imported"
        )
    return backend


def interpreted() -> bool:
    """Do Triton kernels run in the interpreter, on the CPU? Decided when they are imported."""
    return _INTERPRETED
