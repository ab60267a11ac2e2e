"""What runs in a worker process: it answers requests, one JSON line each, under limits that it sets for itself.

As a program it imports tools by their path and calls them; `serve` is for others that need such a process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

from lite_mentor.calculators import ToolError
from lite_mentor.results import finished, result_text

START_SECONDS = 60.0
"""For what happens once in a worker, importing: a slow disk must not look like a slow tool."""
MEMORY_BYTES = 4 << 30
FILE_BYTES = 64 << 20
OPEN_FILES = 128
PROCESSES = 4096
"""Of all processes and threads of the user, for that is how systems count: far above what a desktop needs."""

Request = Mapping[str, Any]


def serve(answer: Callable[[Request], Mapping[str, Any]], memory_bytes: int) -> None:
    """Answer JSON lines on stdin until it ends, under limits.

    Requests and replies move to private pipes, so that nothing that `answer` prints or reads can get between them.
    The empty request asks whether the worker has started. What `answer` raises ends the worker.
    """
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    _limit(memory_bytes)
    for line in requests:
        number, request = json.loads(line)
        for standard in (0, 1, 2):  # every time, for the call before may have closed them
            os.dup2(nothing, standard)
        _limit_cpu(request.get("seconds", START_SECONDS))
        reply = answer(request) if request else {}
        replies.write(json.dumps([number, reply]).encode() + b"\n")
        replies.flush()


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


def _answer(request: Request) -> dict[str, str]:
    if "arguments" not in request:
        return _load_answer(request["path"])
    try:
        return {"status": "ok", "text": result_text(finished(_function(request["path"])(**request["arguments"])))}
    except Exception as error:
        return {"status": "error", "text": result_text(f"Error: {_words(error)}")}


def _load_answer(path: str) -> dict[str, str]:
    try:
        _function(path)
    except Exception as error:
        return {"problem": result_text(_words(error))}
    return {}


@functools.cache
def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


def _words(error: Exception) -> str:
    if isinstance(error, ToolError):
        return f"{error}."
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    serve(_answer, MEMORY_BYTES)
