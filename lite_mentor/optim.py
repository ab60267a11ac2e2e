"""The optimizer, its schedule, and the guard that lets no non-finite number into the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from lite_mentor.config import Config
from lite_mentor.errors import UserError
from lite_mentor.types import Batch


@dataclass(frozen=True)
class Update:
    """What happened to one optimizer step."""

    grad_norm: float
    applied: bool
    """False when the loss or the gradient was not finite: the weights and the optimizer are then as they were."""


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW; on CUDA with bitsandbytes' paged 8-bit states, on the CPU torch's own."""
    parameters = list(parameters)
    if parameters[0].is_cuda:
        from bitsandbytes.optim import PagedAdamW8bit

        return PagedAdamW8bit(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)


def learning_rate(step: int, steps: int, *, peak: float, warmup: int, schedule: str) -> float:
    """At step 0 .. steps-1: a linear warm-up that starts above 0, then constant or cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def apply_gradients(optimizer: torch.optim.Optimizer, *, lr: float, max_norm: float, allowed: bool = True) -> Update:
    """Clip to `max_norm` and step, if `allowed` and the gradient is finite. Gradients are cleared either way."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False).item()
    applied = allowed and math.isfinite(norm)
    if applied:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(norm, applied)


class Guard:
    """Refuses updates that are not finite: keeps the batch that caused one, and ends the run at the third in a row."""

    def __init__(self, out: Path):
        self.out, self.in_a_row = out, 0

    def passed(self) -> None:
        """An update was applied."""
        self.in_a_row = 0

    def refused(self, step: int, batches: Sequence[Batch], why: str) -> None:
        """Write the batches to refused-<step>.safetensors. Raises UserError after three in a row."""
        self.in_a_row += 1
        path = self.out / f"refused-{step:06d}.safetensors"
        save_file({f"{i}.{name}": value for i, b in enumerate(batches) for name, value in _tensors(b)}, path)
        if self.in_a_row == 3:
            raise UserError(
                f"Three updates in a row were refused, the last at step {step} because {why}; the weights are those "
                f"before them, and the batch is in {path}. Lower --lr, or look for extreme rewards."
            )


def _tensors(batch: Batch) -> list[tuple[str, torch.Tensor]]:
    values = [(f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)]
    return [(name, value) for name, value in values if isinstance(value, torch.Tensor)]
