"""Which implementation of an operator runs."""

from __future__ import annotations

import torch


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """`backend`, or the default for `device` when it is None.

    Only the torch backend exists so far, on every device. Raises NotImplementedError for "triton" and ValueError for
    any other name.
    """
    if backend is None or backend == "torch":
        return "torch"
    if backend == "triton":
        raise NotImplementedError(f'the Triton backend (asked for on {device}) is not there yet; use backend="torch"')
    raise ValueError(f'backend must be "triton", "torch" or None, not {backend!r}')
