"""A pytest plugin that compiles, without a GPU, every kernel that the chosen tests would launch on one.

    python -m pytest -p tests.compile_only --compile-for 90 -m gpu

The tests marked `gpu` run with their tensors on the CPU and a driver that names an architecture of the user's choice.
Where a test launches a kernel, Triton compiles it for that architecture, for exactly those types, sizes and
constants, and nothing is launched. So a test's numbers are wrong and are not judged: a test counts as `compiled`
unless a kernel does not compile or takes more shared memory than a block of that architecture has. The end of the
output says how many kernels were compiled and which failed where, and which tests broke off at something other than an
assertion, as what they would have launched after it was not seen. The exit status is 1 when a kernel failed or none
was compiled. Works with pytest-xdist.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from dataclasses import dataclass, field

import pytest
import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# tests/conftest.py comes later: where there is no GPU, it takes the interpreter and skips the tests.
_is_available = torch.cuda.is_available
torch.cuda.is_available = lambda: True
os.environ.pop("TRITON_INTERPRET", None)

ARCHITECTURES = (80, 86, 89, 90, 120)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--compile-for."""
    about = "the architecture to compile for, as 90 for sm_90"
    parser.addoption("--compile-for", type=int, choices=ARCHITECTURES, default=90, help=about)


@dataclass
class Test:
    """What one test launched."""

    kernels: set[str] = field(default_factory=set)
    """Hashes of those that were compiled."""
    failures: list[str] = field(default_factory=list)
    """A sentence for each that was not."""
    broke_off: str = ""
    """The exception that ended it, where it was no assertion."""


RUNNING = Test()
"""The test that runs in this process."""


class Driver:
    """As much of a driver as Triton asks of it to compile."""

    def __init__(self, architecture: int):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        """The architecture that was asked for."""
        return self.target

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by the device's index."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Only a launch would use it."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


class OnTheCPU(TorchFunctionMode):
    """Tensors that are asked for on a GPU come on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:  # a name is a name; what is made there is what counts
            return function(*args, **(kwargs or {}))
        kwargs = {name: _on_the_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_the_cpu, args), **kwargs)


def _on_the_cpu(value):
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return "cpu"
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def pytest_configure(config: pytest.Config) -> None:
    """Stand-ins for the driver, for launches, and for what would wait for a GPU."""
    from mentor_kernels import backend
    from mentor_kernels.aot import SHARED_BYTES

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        patch.setattr(torch.cuda, "is_available", _is_available)
        import bitsandbytes  # noqa: F401  - it loads other code where there is a GPU, and PyTorch for CPUs lacks that

    architecture = config.getoption("--compile-for")
    driver.set_active(Driver(architecture))
    JITFunction.run = _compiling(JITFunction.run, SHARED_BYTES[architecture])
    # These were imported by name all over, so it is their code that is replaced.
    backend.resolve_backend.__code__ = backend.resolve_head_backend.__code__ = _backend_of_a_gpu.__code__
    torch.cuda.synchronize = torch.cuda.set_sync_debug_mode = lambda *_: None
    # What a kernel would have written is 0: a token of that number exists, one of arbitrary bits does not.
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _zeroed(getattr(owner, name)))
    config.pluginmanager.register(Summary(config), "compile-only-summary")


def pytest_collection_finish() -> None:
    """The tests are chosen; what they run finds no GPU to ask."""
    torch.cuda.is_available = _is_available
    if "transformers" in sys.modules:  # its loader hands the device on to code that no mode of torch reaches
        loader = sys.modules["transformers"].AutoModelForCausalLM
        load = loader.from_pretrained
        loader.from_pretrained = lambda *args, **options: load(*args, **options | {"device_map": {"": "cpu"}})


def _backend_of_a_gpu(backend, device):
    return backend or "triton"


def _zeroed(make):
    return lambda *args, **options: make(*args, **options).zero_()


def _compiling(run, most_shared: int):
    """JITFunction.run without the launch."""

    def compile_it(self, *args, grid, warmup, **options):
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            last = traceback.format_exception_only(error)[-1].strip()
            RUNNING.failures.append(f"{self.__name__}: {type(error).__name__}: {last[:300]}")
            raise
        RUNNING.kernels.add(kernel.hash)
        shared = kernel.metadata.shared
        if shared > most_shared:
            RUNNING.failures.append(
                f"{self.__name__}: {shared} bytes of shared memory, of which a block has {most_shared}"
            )
        return kernel

    return compile_it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Each test by itself."""
    global RUNNING
    RUNNING = Test()
    with OnTheCPU():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A test fails by its kernels alone; what it launched travels with its last report."""
    report = yield
    if report.failed:
        if not isinstance(call.excinfo.value, (AssertionError, pytest.fail.Exception)):
            where = call.excinfo.traceback[-1]
            first = next(iter(str(call.excinfo.value).splitlines()), "")[:120]
            RUNNING.broke_off = f"{where.path.name}:{where.lineno + 1}: {call.excinfo.typename}: {first}"
        if RUNNING.failures:
            report.longrepr = "\n".join(RUNNING.failures)
        elif report.when != "setup":  # after a failed setup, a test cannot run
            report.outcome, report.longrepr = "passed", None
    if report.when == "teardown":
        found = dict(kernels=sorted(RUNNING.kernels), failures=RUNNING.failures, broke_off=RUNNING.broke_off)
        report.user_properties.append(("compiled", found))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport):
    """`passed` would say too much."""
    return ("compiled", "c", "COMPILED") if report.when == "call" and report.passed else None


class Summary:
    """Adds up what the tests launched, wherever they ran."""

    def __init__(self, config: pytest.Config):
        self.architecture = config.getoption("--compile-for")
        self.tests: dict[str, Test] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Runs in the process that prints."""
        for name, found in report.user_properties:
            if name == "compiled":
                self.tests[report.nodeid] = Test(set(found["kernels"]), found["failures"], found["broke_off"])

    @property
    def kernels(self) -> int:
        """How many different ones were compiled."""
        return len(set().union(*(test.kernels for test in self.tests.values())))

    @property
    def failures(self) -> list[str]:
        """Each with its test."""
        return [f"{name}: {sentence}" for name, test in self.tests.items() for sentence in test.failures]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """1 where a kernel failed or none was compiled; a run that broke off keeps its own status."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not hasattr(
            session.config, "workerinput"
        ):
            session.exitstatus = int(bool(self.failures) or not self.kernels)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Last, the one line that counts."""
        say = terminalreporter.write_line
        for name, test in self.tests.items():
            if test.broke_off:
                say(f"broke off: {name}: {test.broke_off}")
        for sentence in self.failures:
            say(f"failed: {sentence}")
        say(
            f"sm_{self.architecture}, triton {triton.__version__}: {self.kernels} kernels compiled in "
            f"{len(self.tests)} tests, {len(self.failures)} failed; nothing was launched and no number was judged"
        )
