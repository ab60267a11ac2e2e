"""Which implementation of an operator runs."""

from __future__ import annotations

import torch
import triton

_INTERPRETED = triton.knobs.runtime.interpret


def interpreter_problem(triton_version: str, numpy_version: str) -> str:
    """A sentence for versions with which Triton's interpreter cannot run; "" for others. A GPU does not need it."""
    if not _before(triton_version, 3, 7) or _before(numpy_version, 2, 4):
        return ""
    return (
        f"Triton {triton_version}'s interpreter, which runs the kernels on a CPU, fails with NumPy 2.4 and newer (here "
        f"{numpy_version}); install triton 3.7, or numpy below 2.4"
    )


def _before(version: str, major: int, minor: int) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) < (major, minor)


INTERPRETER_PROBLEM = ""
if _INTERPRETED:
    import numpy

    INTERPRETER_PROBLEM = interpreter_problem(triton.__version__, numpy.__version__)

# What the operators of the loss head take on CUDA, by compute capability; "triton" where nothing stands. A line comes
# from `python -m bench kernels --choose`, and is "torch" (cuBLAS) where Triton was measured to reach less than 80 % of
# its speed. None yet: nothing was measured on a GPU.
HEAD_BACKENDS: dict[tuple[int, int], str] = {}


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """`backend`, or when it is None the default for `device`: "triton" on CUDA, "torch" elsewhere.

    Raises ValueError for any other name, and for "triton" where it cannot run.
    """
    if backend is None:
        return "triton" if device.type == "cuda" else "torch"
    if backend not in ("triton", "torch"):
        raise ValueError(f'backend must be "triton", "torch" or None, not {backend!r}')
    if backend == "triton" and INTERPRETER_PROBLEM:
        raise ValueError(INTERPRETER_PROBLEM)
    if backend == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(
            f"the Triton backend needs tensors on a CUDA device, not on {device}; "
            "to run its kernels on the CPU, slowly, set TRITON_INTERPRET=1 before mentor_kernels is imported"
        )
    return backend


def resolve_head_backend(backend: str | None, device: torch.device) -> str:
    """`resolve_backend` for linear_logprob, linear_kl, linear_policy_loss: on CUDA, HEAD_BACKENDS has the default."""
    if backend is None and device.type == "cuda":
        card = torch.cuda.get_device_properties(device)  # torch.compile knows it for a constant
        return HEAD_BACKENDS.get((card.major, card.minor), "triton")
    return resolve_backend(backend, device)


def interpreted() -> bool:
    """Do Triton kernels run in the interpreter, on the CPU? Decided when they are imported."""
    return _INTERPRETED
