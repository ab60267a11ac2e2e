"""The plugin that compiles what the GPU tests launch: where all compiles, and where a kernel does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BROKEN = """
import pytest, torch, triton
import triton.language as tl

@triton.jit
def _reads_what_is_not_there(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + absent)

@triton.jit
def _takes_too_much(x_ptr, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    for i in range(count):
        tile = x_ptr + i * SIZE * SIZE + at
        sums += tl.dot(tl.load(tile), tl.load(tile + SIZE))
    tl.store(x_ptr + at, sums.to(tl.float16))

@triton.jit
def _is_sound(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1)

@pytest.mark.gpu
def test_sound():
    x = torch.zeros(16, device="cuda")
    _is_sound[(1,)](x)
    assert x[0] == 1, "must not be judged: nothing was launched"

@pytest.mark.gpu
def test_broken():
    _reads_what_is_not_there[(1,)](torch.zeros(16, device="cuda"))

@pytest.mark.gpu
def test_large():
    x = torch.zeros(128 * 128, device="cuda", dtype=torch.float16)
    _takes_too_much[(1,)](x, 100, SIZE=128, num_stages=16)
"""


def compile_only(*arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    """Exit status and output of a run for sm_90."""
    # The interpreter, which the tests around this one run in, compiles nothing; and their own options are theirs.
    theirs = ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in theirs}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "pytest", "-p", "tests.compile_only", "--compile-for", "90", "-m", "gpu"]
    found = subprocess.run(
        [*command, "-p", "no:cacheprovider", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    return found.returncode, found.stdout + found.stderr


@pytest.mark.slow
def test_a_few_of_the_gpu_tests_compile():
    """One of each operator, as the tests launch them: AOT's list has the sizes that training uses; and the engine."""
    files, names = ("tests/test_no_sync.py", "tests/test_exactness.py"), "no_operator_waits or draw_the_same"
    status, said = compile_only(*files, "-k", names)
    assert status == 0, said
    assert ", 0 failed; nothing was launched" in said
    assert "broke off" not in said


def test_only_what_does_not_compile_fails(tmp_path):
    (tmp_path / "test_kernels.py").write_text(BROKEN)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    status, said = compile_only("test_kernels.py", cwd=tmp_path)
    assert status == 1
    assert "sm_90" in said
    assert "kernels compiled in 3 tests, 2 failed" in said
    assert "failed: test_kernels.py::test_broken: _reads_what_is_not_there: " in said
    assert "failed: test_kernels.py::test_large: _takes_too_much: " in said
    assert "test_sound" not in said


def test_where_nothing_was_compiled_nothing_was_shown(tmp_path):
    (tmp_path / "test_none.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_none(): pass\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    status, said = compile_only("test_none.py", cwd=tmp_path)
    assert status == 1
    assert "0 kernels compiled in 1 tests, 0 failed" in said
