"""What runs in a worker process: it answers requests, one JSON line each, under limits that it sets for itself.

As a program it runs the tools of one module by their import path, in three processes, each forked from the one before:

    supervisor   holds the pipes to the trainer, and runs no code but ours; ends everything once the trainer is gone
    module       imports the tools' module, once, and forks for every call
    call         runs the function, tells the result, and is killed, with its threads

So no call can read or write what is between the trainer and another call: nothing that a call changes in memory is
there in the next one, and what it leaves running ends the worker, whose successor is fresh. Threads do not survive a
fork, so a module that has some runs its calls itself; and if it has started processes, those of its calls live on.
Where there is no fork (Windows) all happens in one process. `serve` is for others that need such a process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NoReturn

try:
    import resource
except ImportError:  # Windows
    resource = None

from lite_mentor.calculators import ToolError
from lite_mentor.errors import UserError
from lite_mentor.isolation import go_first
from lite_mentor.results import finished, result_text

START_SECONDS = 60.0
"""For what happens once in a worker, importing: a slow disk must not look like a slow tool."""
MEMORY_BYTES = 4 << 30
FILE_BYTES = 64 << 20
OPEN_FILES = 128
PROCESSES = 4096
"""Of all processes and threads of the user, for that is how systems count: far above what a desktop needs."""
GRACE_SECONDS = 0.2
"""For the end of what a call has started, once the call itself has ended."""
MAX_REPLY_BYTES = 1 << 20
ENDED = "Error: the tool ended its process or broke a limit."

Request = Mapping[str, Any]
Answer = Callable[[Request], Mapping[str, Any]]


def serve(answer: Answer, memory_bytes: int) -> None:
    """Answer JSON lines on stdin until it ends, under limits.

    Requests and replies move to private pipes, so that nothing that `answer` prints or reads can get between them.
    The empty request asks whether the worker has started. What `answer` raises ends the worker.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _limit(memory_bytes)
    for line in requests:
        name, request = json.loads(line)
        _silence()
        _limit_cpu(request.get("seconds", START_SECONDS))
        _write_line(replies, [name, answer(request) if request else {}])


def _silence() -> None:
    """Every time anew, for the call before may have closed them."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    if nothing > 2:
        os.close(nothing)


def _write_line(file: BinaryIO, content: Any) -> None:
    file.write(json.dumps(content).encode() + b"\n")
    file.flush()


def _limit(memory_bytes: int) -> None:
    if resource is None:
        return
    sizes = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_NPROC": PROCESSES,
        "RLIMIT_CORE": 0,
    }
    for name, size in sizes.items():
        _set_limit(getattr(resource, name), size, hard=True)


def _limit_cpu(seconds: float) -> None:
    """For one request: what spins on after it, in a thread or because the trainer is gone, ends by itself."""
    if resource is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        _set_limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1, hard=False)


def _set_limit(which: int, size: int, *, hard: bool) -> None:
    ceiling = resource.getrlimit(which)[1]
    size = size if ceiling == resource.RLIM_INFINITY else min(size, ceiling)
    with contextlib.suppress(OSError, ValueError):  # macOS refuses to limit memory
        resource.setrlimit(which, (size, size if hard else ceiling))


# --- the supervisor --------------------------------------------------------------------------------------------


def supervise(memory_bytes: int) -> None:
    """Answer requests for the tools of a module (see `answer_for_tool`) until the trainer is gone."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _silence()
    _limit(memory_bytes)
    go_first()
    _hide()
    module: _Module | None = None
    for line in requests:
        name, request = json.loads(line)
        reply: dict[str, Any] = {}
        if request:
            if module is None or module.has_ended():
                module = _Module(requests, replies)
            reply = module.ask(request)
        left_behind = reply.pop("left", False)
        _write_line(replies, [name, reply])
        if left_behind:
            break
    _end_all()


def _end_all() -> NoReturn:
    """This process, and all that it has started: those of its namespace, or at least of its group."""
    if os.getpid() != 1:
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


class _Module:
    """The process of a module, as its parent sees it."""

    def __init__(self, *trainer: BinaryIO) -> None:
        """`trainer`: the pipes from and to it, which the new process must not have."""
        self._trainer = trainer[0].fileno()
        self._pipe, its = socket.socketpair()
        self._pipe.settimeout(START_SECONDS)
        self._pid = os.fork()
        if not self._pid:
            for file in (*trainer, self._pipe):
                os.close(file.fileno())
            _serve_module(its)
        its.close()

    def has_ended(self) -> bool:
        """Whatever ended it: the system may be short of memory."""
        return os.waitpid(self._pid, os.WNOHANG)[0] != 0

    def ask(self, request: Request) -> dict[str, Any]:
        """Its answer. Ends all when it gives none, and when the trainer goes away meanwhile."""
        line = b""
        with contextlib.suppress(OSError):
            self._pipe.sendall(json.dumps(request).encode() + b"\n")
            while not line.endswith(b"\n") and len(line) < MAX_REPLY_BYTES:
                ready, _, _ = select.select([self._pipe, self._trainer], [], [])
                # The trainer says no more until it is answered: if it can be read, it has gone.
                part = b"" if self._trainer in ready else self._pipe.recv(1 << 16)
                if not part:
                    break
                line += part
        with contextlib.suppress(ValueError, RecursionError):
            reply = json.loads(line)
            if isinstance(reply, dict):
                return reply
        _end_all()


def _hide() -> None:
    """Let no process of the same user look into this one or those forked from it: their memory, their open files."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE


# --- the process of a module -----------------------------------------------------------------------------------


def _serve_module(pipe: socket.socket) -> NoReturn:
    """Never returns, for what lies above on the stack is the supervisor's."""
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a call leaves becomes our child
        with pipe.makefile("rb") as requests, pipe.makefile("wb") as replies:
            for line in requests:
                request = json.loads(line)
                if "arguments" in request:
                    answer_for_tool({"path": request["path"]})  # where another process than this has loaded it
                if "arguments" in request and not _has_threads():
                    _limit_cpu(START_SECONDS)
                    reply = _answer_in_child(request, pipe.fileno())
                else:
                    _silence()
                    _limit_cpu(request.get("seconds", START_SECONDS))
                    reply = answer_for_tool(request)
                _write_line(replies, reply)
    finally:
        os._exit(1)


def _answer_in_child(request: Request, pipe: int) -> Mapping[str, Any]:
    resident = _has_children()  # of the module itself, such as an engine that it has started
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.close(pipe)
        _call(request, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        line = told.readline(MAX_REPLY_BYTES)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # a module may have its children buried unseen
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    reply = {"status": "error", "text": ENDED}
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(line)
        reply = said if isinstance(said, dict) else reply
    return reply | {"left": not resident and _stays()}


def _call(request: Request, writing: int) -> NoReturn:
    """In the process of a call: run it, write what it gives, and never return."""
    try:
        _silence()
        _set_limit(resource.RLIMIT_CPU, math.ceil(request["seconds"]) + 1, hard=True)
        if "numpy.random" in sys.modules:  # Python's own `random` is seeded anew by a fork, and NumPy's is not
            sys.modules["numpy.random"].seed()
        with os.fdopen(writing, "wb") as told:
            _write_line(told, answer_for_tool(request))
    finally:
        os._exit(1)


def _has_threads() -> bool:
    try:
        return len(os.listdir("/proc/self/task")) > 1
    except OSError:  # without a /proc, only those of Python are known
        return threading.active_count() > 1


def _stays() -> bool:
    """Does what a call has started outlive it for longer than an end takes?"""
    deadline = time.monotonic() + GRACE_SECONDS
    while (alive := _has_children()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return alive


def _has_children() -> bool:
    """Is any child alive? Those that have ended are buried."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


# --- tools -----------------------------------------------------------------------------------------------------


def answer_for_tool(request: Request) -> dict[str, Any]:
    """With arguments, what a call gives: {"status", "text"}; else {"problem"} when the tool cannot be loaded, or {}.

    With "describe" the latter is what a ToolSpec says, {"name", "description", "parameters"}, or {"refused"}: why none.
    """
    if "arguments" in request:
        return _answer_to_call(request)
    try:
        function = _function(request["path"])
    except (Exception, SystemExit) as error:
        return {"problem": result_text(_words(error))}
    return _described(function, request["path"]) if request.get("describe") else {}


def _answer_to_call(request: Request) -> dict[str, str]:
    try:
        return {"status": "ok", "text": result_text(finished(_function(request["path"])(**request["arguments"])))}
    except Exception as error:
        return {"status": "error", "text": result_text(f"Error: {_words(error)}")}


def _described(function: Callable[..., Any], path: str) -> dict[str, Any]:
    from lite_mentor.tools import tool_spec  # here, for a worker that only runs calls starts faster without

    try:
        spec = tool_spec(function, path=path)
    except UserError as error:
        return {"refused": str(error)}
    return {"name": spec.name, "description": spec.description, "parameters": spec.parameters}


@functools.cache
def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


def _words(error: BaseException) -> str:
    if isinstance(error, ToolError):
        return f"{error}."
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    del sys.path[0]  # the current folder, in which a call may write files that are named like modules
    if hasattr(os, "fork"):
        supervise(MEMORY_BYTES)
    else:
        serve(answer_for_tool, MEMORY_BYTES)
