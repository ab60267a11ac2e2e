"""What runs in a worker process: it answers requests, one JSON line each, under limits that it sets for itself.

As a program it runs tools by their import path, in three kinds of processes, each forked from the one before it:

    supervisor      holds the pipes to the trainer, and runs no code but ours; ends everything once the trainer is gone
    a module each   imports the tools' module, once, and forks for every call
    a call each     runs the function, tells the result, and is killed, with its threads

So no call can read or write what is between the trainer and another call: a tool cannot answer for another one, nothing
that a call changes in memory is there in the next one, and what it leaves running ends the worker, whose successor is
fresh. Where there is no fork (Windows) all happens in one process. `serve` is for others that need such a process.
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
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NoReturn

try:
    import resource
except ImportError:  # Windows
    resource = None

from lite_mentor.calculators import ToolError
from lite_mentor.errors import UserError
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
    """Answer requests for tools (see `answer_for_tool`), each by its module's process, until the trainer is gone."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _silence()
    _limit(memory_bytes)
    _hide()
    modules: dict[str, _Module] = {}
    for line in requests:
        name, request = json.loads(line)
        reply: dict[str, Any] = {}
        if request:
            module = request["path"].partition(":")[0]
            if module not in modules or modules[module].has_ended():
                modules[module] = _Module((requests, replies, *(other.pipe for other in modules.values())))
            reply = modules[module].ask(request, requests.fileno())
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
    """A process that serves the tools of one module, as its parent sees it."""

    def __init__(self, private: tuple[Any, ...]) -> None:
        """`private`: the files that the new process must not have."""
        self.pipe, its = socket.socketpair()
        self._pid = os.fork()
        if not self._pid:
            for file in (*private, self.pipe):
                os.close(file.fileno())
            _serve_module(its)
        its.close()

    def has_ended(self) -> bool:
        """Whatever ended it: the system may be short of memory."""
        return os.waitpid(self._pid, os.WNOHANG)[0] != 0

    def ask(self, request: Request, trainer: int) -> dict[str, Any]:
        """Its answer. Ends all when it gives none, and when the trainer, whose pipe this is, goes away meanwhile."""
        line = b""
        with contextlib.suppress(OSError):
            self.pipe.sendall(json.dumps(request).encode() + b"\n")
            while not line.endswith(b"\n") and len(line) < MAX_REPLY_BYTES:
                ready, _, _ = select.select([self.pipe, trainer], [], [])
                part = self.pipe.recv(1 << 16) if trainer not in ready else b""  # it says no more until it is answered
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
                _limit_cpu(START_SECONDS)
                if "arguments" not in request:
                    reply = answer_for_tool(request)
                else:
                    reply = _answer_in_child(request, pipe.fileno())
                _write_line(replies, reply)
    finally:
        os._exit(1)


def _answer_in_child(request: Request, pipe: int) -> Mapping[str, Any]:
    answer_for_tool({"path": request["path"]})  # where the process is another one than that which has loaded it
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
        if "numpy" in sys.modules:  # Python's own `random` is seeded anew by a fork, and NumPy's is not
            sys.modules["numpy"].random.seed()
        with os.fdopen(writing, "wb") as told:
            _write_line(told, answer_for_tool(request))
    finally:
        os._exit(1)


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
    if hasattr(os, "fork"):
        supervise(MEMORY_BYTES)
    else:
        serve(answer_for_tool, MEMORY_BYTES)
