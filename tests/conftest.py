"""What every test shares: one thread each, and Triton kernels that run on the CPU where there is no GPU."""

from __future__ import annotations

import os

import torch

# Several test processes on a small machine would otherwise wait on each other's threads.
torch.set_num_threads(1)

# Before anything imports the kernels: their decorator reads it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
