"""What every test shares: one thread each, and Triton kernels that run on the CPU where there is no GPU."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from hypothesis import settings

# A busy machine is slow, and no example wrong for that.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Several test processes on a small machine would otherwise wait on each other's threads; what they start, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# Where memory is poisoned, torch insists on deterministic algorithms; cuBLAS has them with this.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Before anything imports the kernels: their decorator reads it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure():
    """One sentence where every kernel's test would fail."""
    from mentor_kernels.backend import INTERPRETER_PROBLEM

    if INTERPRETER_PROBLEM:
        raise pytest.UsageError(f"{INTERPRETER_PROBLEM}.")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def kernel_device(request) -> str:
    """Where Triton kernels run: on the GPU, and without one in the interpreter."""
    return request.param


def pytest_collection_modifyitems(items):
    """A test marked `gpu` is the twin of one that runs the same checks in the interpreter."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def hears_interrupts():
    """Also where the tests run in a job that a shell started with `&`, which is deaf to SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def soon():
    """A test that would wait for ever fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
