"""The kernels compiled for real GPUs, on a machine without one; in a process of its own, without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def aot(*flags: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mentor_kernels.aot", *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment}, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 90, 120])
def test_the_kernels_that_train_keep_their_budgets(arch):
    """bf16, the sampler's float32, and what has no dtype, on three of five; `python -m mentor_kernels.aot` has all."""
    kinds = ["K1 bf16", "K2", "K3 bf16", "policy", "advantage", "sample fp32", "attention bf16", "copies bf16"]
    done = aot("--arch", str(arch), "--only", *kinds)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 over budget" in done.stdout
    assert all(f"| {kind}" in done.stdout for kind in kinds)


def test_a_broken_budget_is_an_error():
    """Tiles of 256 columns spill, and take more shared memory than a consumer card has."""
    script = """
import sys
from mentor_kernels import aot, head_launches
large = head_launches.k3(128, 256, 128, warps=8, stages=3)
head_launches.LAUNCHES[8, 6] = head_launches.LAUNCHES[8, 6]._replace(jacobian=large)
sys.exit(aot.main(["--arch", "86", "--only", "K3 bf16"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 1, done.stderr
    assert "bytes spilled" in done.stdout
    assert "bytes of shared memory, over 101376" in done.stdout


def test_what_is_compared_for_equality_is_computed_exactly():
    """Rewards and advantages, and the same check on a kernel that divides approximately."""
    done = aot("--arch", "90", "--only", "advantage flex gdpo", "advantage, whole step")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 compiled, 0 over budget" in done.stdout
    script = """
import dataclasses, sys
from mentor_kernels import aot
(merge,) = [v for v in aot.variants(90) if v.name == "attention merge fp32 64"]
aot.variants = lambda arch: [dataclasses.replace(merge, exact=True)]
sys.exit(aot.main(["--arch", "90"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 1, done.stderr
    assert "inexact operations" in done.stdout


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        ((), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set, so there is nothing to compile; unset it."),
        (("--only", "K9"), {}, "no variant's name starts with 'K9'"),
        (("--arch", "75"), {}, "invalid choice: 75"),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(flags, environment, sentence):
    done = aot(*flags, **environment)
    assert done.returncode == 2
    assert sentence in done.stderr
