"""The processor that a run computes on: which one it is, why it is no GPU, and how much memory a GPU has left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from lite_mentor.config import PRESETS
from lite_mentor.errors import UserError

CARDS = {name: int(name.removesuffix("gb")) for name in PRESETS if name.endswith("gb")}
"""The presets that are named after the memory of a card, and its GB."""


_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""A CPU's instructions for products in bf16, x86's and Arm's, as PyTorch names them."""


def compute_device(requested: str = "auto") -> str:
    """What `auto` means on this machine; any other name stands for itself.

    Raises UserError for a GPU that is not there, and for one that is there and cannot compute.
    """
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return "cpu"
    device = "cuda" if requested == "auto" else requested
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {requested}: PyTorch sees no GPU here ({_reason()}); put that right, or use --device cpu."
        )
    count, (_, _, index) = torch.cuda.device_count(), device.partition(":")
    if index and int(index) >= count:
        here = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UserError(f"--device {requested}: there is no such GPU; here is {here}.")
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:  # no code for a card so old, or one that another process keeps for itself
        raise UserError(
            f"--device {requested}: PyTorch sees {device}, but cannot compute there ({_first_line(error)}); put that "
            "right, or use --device cpu."
        ) from error
    return device


def why_cpu(requested: str) -> str:
    """A sentence when `auto` took the CPU of a machine that seems to have a GPU; "" otherwise."""
    has_one = shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*"))
    if requested != "auto" or torch.cuda.is_available() or not has_one:
        return ""
    return f"on the CPU, although this machine seems to have a GPU: PyTorch does not see it ({_reason()})"


def _reason() -> str:
    """Why CUDA is not available, in PyTorch's own words."""
    if torch.version.cuda is None:
        return "it was built without CUDA; install its CUDA build"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all of them"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _first_line(error)
    return "it counts none"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def compute_dtype(device: str, requested: str = "auto") -> torch.dtype:
    """The dtype to compute in; `auto` is bf16 where the processor has instructions for products in it.

    Raises UserError for bf16 on a GPU that has no instructions for it.
    """
    on_cuda = device.startswith("cuda")
    if on_cuda and requested != "fp32":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16
        if requested == "bf16":
            raise UserError(
                f"--dtype bf16 needs a GPU of compute capability 8.0 or more, and {torch.cuda.get_device_name(device)} "
                f"has {major}.{minor}; use --dtype fp32, or auto, which takes fp32 there."
            )
        return torch.float32
    if requested != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[requested]
    # Everything else in a layer gains nothing from bf16, so only instructions for its products make it worth while.
    here = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
    return torch.bfloat16 if any(here.get(name) for name in _BF16) else torch.float32


def memory_left(device: torch.device | str) -> str:
    """A sentence: how much of the GPU's memory this process can have, and the largest preset made for that; "" on CPUs.

    A card of N GB shows less than N GiB, and the context takes about a half more.
    """
    if torch.device(device).type != "cuda":
        return ""
    room, total = _room(device)
    fitting = [name for name, size in CARDS.items() if size <= room + 1]
    made = (
        f"--preset {max(fitting, key=CARDS.__getitem__)} is made for that"
        if fitting
        else f"--preset {min(CARDS, key=CARDS.__getitem__)} is made for more, --preset quick for less"
    )
    name = torch.cuda.get_device_name(device)
    return f"{name} has {room:.1f} of {total:.1f} GiB free for this process; {made}."


def too_small(preset: str, device: str) -> str:
    """Before anything is loaded: a sentence when the GPU has less free than the preset is made for; "" otherwise."""
    if preset not in CARDS or torch.device(device).type != "cuda" or CARDS[preset] <= _room(device)[0] + 1:
        return ""
    return f"--preset {preset} may not fit: {memory_left(device)}"


def _room(device: torch.device | str) -> tuple[float, float]:
    """GiB that are free or already held by this process, and of the whole GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / 2**30, total / 2**30
