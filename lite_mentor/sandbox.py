"""Runs code that may hang, crash or do harm in worker processes, and kills those that break a limit.

Limited everywhere: wall-clock time (the worker and everything it started are killed), CPU time, memory, the size of a
file, the number of open files and of processes, the length of a result. A worker sees only the environment variables
that importing needs, so no keys or tokens, and what it prints goes nowhere. A worker runs the tools of one module, and
every call has a process of its own, forked from one that has imported it (worker.py): calls cannot answer for each
other, and what they leave behind is files at most. Only calls of a module that has threads share its process.

On Linux, workers also run in namespaces where the machine allows it (isolation.py; `find_way` tries it once, and
`Sandbox.note` says what was found): no network, not even loopback; the folders that importing needs, read-only, and a
private /tmp, which lasts as long as the worker; no home folder; no keys of the session; no process but their own, and
none of theirs outlives the trainer, however that ends.

What is NOT protected: whatever lies in the current folder and in those of sys.path can be read. Memory, CPU time and
file size are limited for each process, and there may be 512 of them. A hole in the kernel is a hole in this. Where a
folder is seen itself and not through an overlay (always under bubblewrap; `Sandbox.note` names them), Unix sockets and
pipes in it can be used, and files be locked. Without namespaces (macOS, Windows, most containers, `--sandbox off`) a
tool reads and writes every file that you can, uses the network, signals your processes, and a child that leaves its
process group outlives it. Windows has no limits but time, and there one call may disturb the next; macOS does not limit
memory, and root may start any number of processes unless plain user namespaces are used on Linux 6.14 or newer.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal

from lite_mentor import isolation
from lite_mentor.errors import UserError
from lite_mentor.isolation import Way
from lite_mentor.tools import read_spec
from lite_mentor.types import ToolSpec
from lite_mentor.worker import ENDED, MAX_REPLY_BYTES, MEMORY_BYTES, START_SECONDS, Request, resource

MAX_WORKERS = 16
"""So many run at the same time; to start one more, that which was not used for the longest time is ended."""

Status = Literal["ok", "error", "timeout"]


class Worker:
    """One process `python -m module` that answers JSON lines; started at the first request, again after a kill.

    Thread-safe: requests wait for each other.
    """

    def __init__(self, module: str, way: Way = "limits only", errors: IO[bytes] | None = None) -> None:
        self.module = module
        self.way = way
        self._errors = errors
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """None while no process runs."""
        return self._process and self._process.pid

    def request(self, payload: Request, timeout_s: float) -> dict[str, Any]:
        """The worker's answer. Raises TimeoutError or EOFError, once the worker is killed, if none comes.

        A process that has ended since the last request, for want of memory perhaps, is replaced.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self._kill()
            if self._process is None:
                self._start()
            return self._exchange(payload, timeout_s)

    def close(self) -> None:
        """Kill the process, whatever it is doing. Later requests raise RuntimeError."""
        self._closed = True
        self._kill()

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError(f"the worker {self.module} is closed")
        self._process = subprocess.Popen(
            isolation.command(self.way, self.module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,  # None: ours
            env=_environment(),
            start_new_session=True,  # a group of its own: killed as a whole, and deaf to ctrl-C
        )
        if self._closed:  # while the process was starting
            self._kill()
            raise RuntimeError(f"the worker {self.module} is closed")
        try:
            self._exchange({}, START_SECONDS)
        except (TimeoutError, EOFError) as error:
            raise RuntimeError(f"`{sys.executable} -m {self.module}` does not start as a worker") from error

    def _exchange(self, payload: Request, timeout_s: float) -> dict[str, Any]:
        """A thread writes and reads, because no file operation on a pipe takes a time limit everywhere."""
        name = secrets.token_hex(8)  # which nobody who is not asked can know
        line = json.dumps([name, payload]).encode() + b"\n"
        received: list[bytes] = []
        thread = threading.Thread(target=_write_and_read, args=(self._process, line, received), daemon=True)
        thread.start()
        self._thread = thread
        try:
            thread.join(timeout_s)
        except KeyboardInterrupt:  # an answer that comes late must not be taken for the next one
            self._kill()
            raise
        reply = received[0] if received else None
        if reply is None:
            self._kill()
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        try:
            answered, answer = json.loads(reply)
        except (ValueError, TypeError, RecursionError):
            answered, answer = None, None
        if answered != name or not isinstance(answer, dict):
            self._kill()
            raise EOFError("the worker ended, or broke the protocol")
        return answer

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # The process has not been waited for, so no other group can have taken its number.
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: a group of the dead
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        if self._thread is not None:
            self._thread.join(1.0)
        if self._thread is None or not self._thread.is_alive():  # else a child outside the group holds the pipe
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()


def _write_and_read(process: subprocess.Popen[bytes], line: bytes, received: list[bytes]) -> None:
    """Appends the answer, or b"" when the worker is gone."""
    try:
        process.stdin.write(line)
        process.stdin.flush()
        reply = process.stdout.readline(MAX_REPLY_BYTES)
    except (OSError, ValueError):
        reply = b""
    received.append(reply)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)]),
        "PYTHONHASHSEED": "0",  # what a tool returns must not depend on the order of a set
        "OMP_NUM_THREADS": "1",  # a pool of threads would not fit the limits, and would slow down decoding
    }


class Sandbox:
    """Runs tools that are named by an import path, `workers` of them side by side. Thread-safe.

    `way` is how workers are started; None: the strongest that works here.
    """

    def __init__(self, workers: int = 2, timeout_s: float = 5.0, way: Way | None = None) -> None:
        self.timeout_s = timeout_s
        self.way, reason = (way, "--sandbox off") if way else find_way()
        self.note = _note(self.way, reason)
        """One line that says what is and what is not enforced."""
        self._at_once = threading.BoundedSemaphore(workers)
        self._lock = threading.Lock()
        self._workers: dict[Worker, str] = {}
        """Each with the module whose tools it runs, the last used at the end."""
        self._busy: set[Worker] = set()
        self._closed = False

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        with self._lock:
            for worker in self._workers:
                worker.close()

    def call(self, path: str, arguments: Mapping[str, Any]) -> tuple[Status, str]:
        """Run the tool at `module:function` -> (status, what the student is told).

        The status is `error` when the tool raises, ends its process or breaks a limit. Importing the tool is not
        timed; a tool that cannot be imported raises UserError, for no student can put that right.
        """
        request = {"path": path, "arguments": dict(arguments), "seconds": self.timeout_s}
        with self._worker_of(path) as worker:
            if problem := loaded(worker, path).get("problem"):
                raise UserError(f"The tool {path} cannot be loaded in the sandbox ({problem}); put its module right.")
            try:
                answer = worker.request(request, self.timeout_s)
            except TimeoutError:
                return "timeout", f"Error: the tool took longer than {self.timeout_s:g} s."
            except EOFError:
                return "error", ENDED
        status, text = answer.get("status"), answer.get("text")
        return (status, text) if status in ("ok", "error") and isinstance(text, str) else ("error", ENDED)

    def describe(self, path: str) -> ToolSpec:
        """The tool at `module:function`, described where it runs: its module is not imported here. Raises UserError."""
        with self._worker_of(path) as worker:
            answer = loaded(worker, path, describe=True)
        if "problem" in answer:
            problem = f"The tool {path} cannot be imported ({answer['problem']}); is its folder on PYTHONPATH?"
            raise UserError(problem)
        if "refused" in answer:
            raise UserError(str(answer["refused"]))
        return read_spec(answer, path)

    @contextlib.contextmanager
    def _worker_of(self, path: str) -> Iterator[Worker]:
        """A worker that runs the tools of this module alone, so that no tool meets those of another."""
        with self._at_once:
            worker = self._take(path.partition(":")[0])
            try:
                yield worker
            finally:
                with self._lock:
                    self._busy.remove(worker)

    def _take(self, module: str) -> Worker:
        with self._lock:
            if self._closed:
                raise RuntimeError("the sandbox is closed")
            free = [worker for worker in self._workers if worker not in self._busy]
            worker = next((w for w in reversed(free) if self._workers[w] == module), None)
            if worker is None and len(self._workers) >= MAX_WORKERS and free:
                free[0].close()
                del self._workers[free[0]]
            worker = worker or Worker("lite_mentor.worker", self.way)
            self._workers.pop(worker, None)
            self._workers[worker] = module
            self._busy.add(worker)
            return worker


def loaded(worker: Worker, path: str, **more: bool) -> dict[str, Any]:
    """The answer to a request that loads the tool, with its "problem" if it cannot be loaded.

    It is asked twice, for the first may meet a worker that is just ending, or that an earlier call has spoilt.
    """
    problem = ""
    for _ in range(2):
        try:
            return worker.request({"path": path, **more}, START_SECONDS)
        except TimeoutError:
            problem = f"importing it took longer than {START_SECONDS:g} s"
        except EOFError:
            problem = "importing it ended the process or broke a limit"
    return {"problem": problem}


def open_sandbox(setting: Literal["on", "off"]) -> Sandbox:
    """What `--sandbox` asks for: workers as isolated as this machine allows, or workers under limits only."""
    return Sandbox(way=None if setting == "on" else "limits only")


@functools.cache
def find_way() -> tuple[Way, str]:
    """The strongest way to start workers that works on this machine, and what is wrong with the stronger ones."""
    problems: list[str] = []
    for way in ("user namespaces", "bubblewrap"):
        problems.append(problem_with(way))
        if not problems[-1]:
            return way, ""
    return "limits only", ", ".join(dict.fromkeys(problems))


def problem_with(way: Way) -> str:
    """What is wrong with starting workers this way; "" when they are isolated."""
    return _examined(way)[0]


def folders_seen_themselves(way: Way) -> str:
    """Of what workers see this way, the folders whose sockets, pipes and locks are within their reach."""
    return _examined(way)[1]


@functools.cache
def _examined(way: Way) -> tuple[str, str]:
    """Start a worker this way, and let it look around -> what is wrong, and folders that it sees themselves."""
    if reason := isolation.unavailable(way):
        return reason, ""
    with (
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX) as listener,
        contextlib.closing(Worker("lite_mentor.worker", way, errors)) as worker,
    ):
        name = os.path.basename(folder)
        listener.bind(f"\0{name}")
        listener.listen()
        namespace = os.readlink("/proc/self/ns/pid")
        arguments = {"namespace": namespace, "folder": folder, "abstract_socket": name}
        try:
            freedom = _look(worker, "look", arguments)
            exposed = _look(worker, "exposed", {"devices": isolation.devices()})
        except (RuntimeError, EOFError, TimeoutError):
            errors.seek(0)
            last = (errors.read().decode(errors="replace").strip() or "no reason given").splitlines()[-1]
            return f"{way} cannot be had ({last})", ""
    return f"with {way} a tool can still {freedom}" if freedom else "", exposed


def _look(worker: Worker, function: str, arguments: Mapping[str, Any]) -> str:
    request = {"path": f"lite_mentor.isolation:{function}", "arguments": arguments, "seconds": START_SECONDS}
    return worker.request(request, START_SECONDS)["text"]


def _note(way: Way, reason: str) -> str:
    limits = f"memory {MEMORY_BYTES >> 30} GiB a process, CPU and wall-clock time limited"
    if resource is None:
        limits = "wall-clock time limited"
    elif not isolation.counts_processes(way):
        limits += ", but not the number of processes, for you are root"
    if way == "limits only":
        return f"sandbox: {reason}: TOOLS CAN READ AND CHANGE YOUR FILES AND USE THE NETWORK; {limits}"
    exposed = folders_seen_themselves(way)
    sockets = f"; Unix sockets, pipes and locks in {exposed} are within reach" if exposed else ""
    return f"sandbox: no network, read-only files, own processes ({way}); {limits}{sockets}"
