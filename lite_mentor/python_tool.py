"""The tool `python`: code that a student wrote, run by pydantic-monty, an interpreter of a part of Python in Rust.

Monty runs code in a process of its own, which knows no files, network or other modules of ours, and kills it at its
limits; here that process is a child of a tool's worker (sandbox.py), and dies with it. Every call gets a fresh one,
within milliseconds, so nothing is remembered. Random numbers and the clock are the same in every call, so that a run
can be repeated.

This module is imported only where a task names the tool, for pydantic-monty is an extra.
"""

from __future__ import annotations

import datetime

from pydantic_monty import Monty, MontyCrashedError, MontyError

from lite_mentor.calculators import ToolError
from lite_mentor.results import MAX_RESULT_CHARS, result_text

SECONDS = 4.0
"""Less than a worker has for a call, so that the student is told which limit it was."""
MEMORY_BYTES = 64 << 20
PRINTED_CHARS = MAX_RESULT_CHARS // 2
VALUE_CHARS = MAX_RESULT_CHARS // 2 - 80
"""What remains for the last line's value, after the notes on what was cut."""
_LIMITS = dict(max_feed_duration_secs=SECONDS, max_memory=MEMORY_BYTES, max_recursion_depth=500)
_FIXED = dict(sleep="zero", random_start={"seed": 0}, datetime=datetime.datetime(2026, 1, 1))
_WORDS = {
    "TimeoutError: feed time limit": f"the code ran longer than {SECONDS:g} s",
    "MemoryError: memory limit": f"the code used more than {MEMORY_BYTES >> 20} MB",
}
"""Monty's own words about these name figures that differ from run to run."""


def python(code: str) -> str:
    """Run Python; returns what it prints and its last line's value. Has math, re, json, datetime, random, itertools,
    collections, decimal, functools; no files, network, numpy, fractions, statistics. 4 s, 64 MB. Remembers nothing.
    """
    output = _Output()
    try:
        with (
            Monty(min_processes=1, max_processes=1, max_checkouts_per_worker=1) as interpreter,
            interpreter.checkout(limits=_LIMITS, os_policy=_FIXED) as session,
        ):
            value = session.feed_run(code, print_callback=output)
    except MontyCrashedError as error:
        raise ToolError("the code broke the interpreter") from error
    except MontyError as error:
        message = error.display(format="type-msg")
        raise ToolError(next((w for start, w in _WORDS.items() if message.startswith(start)), message)) from error
    said = [output.text(), "" if value is None else result_text(value, VALUE_CHARS)]
    return "\n".join(filter(None, said)) or "(nothing printed)"


class _Output:
    """What the code prints: its beginning, and how much more there was."""

    def __init__(self) -> None:
        self.kept, self.more = "", 0

    def __call__(self, stream: str, text: str) -> None:
        room = max(0, PRINTED_CHARS - len(self.kept))
        self.kept += text[:room]
        self.more += len(text[room:])

    def text(self) -> str:
        return self.kept.rstrip("\n") + (f"... [{self.more} more characters]" if self.more else "")
