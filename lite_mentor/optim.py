"""The optimizer, its schedule, and the guard that lets no non-finite number into the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from lite_mentor.config import Config
from lite_mentor.errors import UserError
from lite_mentor.files import replace_file
from lite_mentor.loss import backward
from lite_mentor.types import Scored


@dataclass(frozen=True)
class Update:
    """What happened to one optimizer step."""

    grad_norm: float
    applied: bool
    """False when the loss or the gradient was not finite: the weights and the optimizer are then as they were."""


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW with float32 moments; on CUDA in one fused launch."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=parameters[0].is_cuda
    )


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


class Diverged(UserError):
    """Three updates in a row were refused; the weights are finite, and those before them."""


class Guard:
    """Refuses updates that are not finite: keeps what caused one, names it, and ends the run at the third in a row."""

    def __init__(self, out: Path, say: Callable[[str], None]):
        self.out, self.say, self.in_a_row = out, say, 0

    def passed(self) -> None:
        """An update was applied."""
        self.in_a_row = 0

    def refused(self, where: str, share: Sequence[Scored], why: str) -> None:
        """Say so, and write the rollouts to refused-<where>.safetensors. Raises Diverged after three in a row."""
        self.in_a_row += 1
        path = self.out / f"refused-{where.replace(' ', '-')}.safetensors"
        rows = [
            {"example_key": s.rollout.example_key, "group": s.rollout.group, "index": s.rollout.index,
             "prompt_length": s.rollout.prompt_length, "reward": s.reward, "advantage": s.advantage}
            for s in share
        ]  # fmt: skip
        names = ("ids", "sampled", "behaviour_logp")
        tensors = {f"{i}.{name}": getattr(s.rollout, name) for i, s in enumerate(share) for name in names}
        try:
            replace_file(path, save(tensors, metadata={"why": why, "rollouts": json.dumps(rows)}))
            kept = f"its rollouts are in {path}"
        except OSError as error:
            kept = f"its rollouts could not be kept in {path} ({error.strerror or error})"
        self.say(f"the update of {where} was not applied: {why}; {kept}")
        if self.in_a_row == 3:
            raise Diverged(
                f"Three updates in a row were refused, the last at {where}: {why}; the weights are those before them, "
                f"and {kept}. Lower --lr, or look at those rollouts."
            )


def unsound(scored: Sequence[Scored]) -> str:
    """Which numbers that the update starts from are not finite, and whose; "" when all are sound.

    A reward that is not finite spoils its whole group's advantages, so rewards come first.
    """
    numbers: dict[str, Callable[[Scored], float]] = {
        "reward": lambda s: s.reward,
        "logprob under the sampler": lambda s: s.rollout.behaviour_logp[s.rollout.sampled].sum().item(),
        "advantage": lambda s: s.advantage,
    }
    for name, number in numbers.items():
        found = [s for s in scored if not math.isfinite(number(s))]
        if found:
            return f"the {name} is not finite ({number(found[0])}) of {_names(found)}"
    return ""


def blame(
    share: Sequence[Scored], loss_of: Callable[[Scored], Tensor], parameters: Sequence[Tensor], config: Config
) -> str:
    """Whose loss or gradient is not finite on its own: a forward and a backward for each. Gradients are cleared."""
    found = []
    for s in share:
        loss = loss_of(s)
        backward(loss, config)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not all(bool(x.isfinite().all()) for x in [loss.detach(), *gradients]):
            found.append(s)
        for parameter in parameters:
            parameter.grad = None
    return f"on its own it is that of {_names(found)}" if found else "no rollout alone does that, only all together"


def _names(scored: Sequence[Scored]) -> str:
    first = [
        f"example {s.rollout.example_key} (group {s.rollout.group}, rollout {s.rollout.index})" for s in scored[:3]
    ]
    return ", ".join(first) + (f" and {len(scored) - 3} more" if len(scored) > 3 else "")
