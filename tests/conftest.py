"""One thread for every test: several test processes on a small machine would otherwise wait on each other's threads."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
