"""Runs stages of commands within a budget of seconds, lanes of them side by side, and writes down what came of each.

A stage is a command with a time limit, in a process group of its own: one that fails or hangs costs its own limit and
nothing else. Results are written as they come, so that a run which is cut off loses only what was running:

    log.txt          what every stage printed, in the order in which they ended
    summary.md       a table of the stages, written anew after each, with the last lines of those that failed
    summary.json     the same, for programs
    files.tar.gz     the whole output of each stage, and the files it wrote in its folder; packed again now and then

Four files, because a machine that is lent may give back only a few.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

GRACE = 5.0
"""Seconds between the interrupt, at which a stage may still say how far it came, and the kill."""
LEAST = 5.0
"""A stage is not started for fewer seconds than this, or than its own limit."""
PACK_EVERY = 30.0
"""Seconds between two packings of the files."""
LARGEST = 8 << 20
"""Bytes; larger files and weights are not packed."""
SHOWN = 6
"""Last lines of a stage that failed."""
WIDTH = 600
"""Characters of a line that the summary shows."""


@dataclass(frozen=True)
class Stage:
    """One command and the most seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    """Packages without which it is not started."""
    show: int = 0
    """Last lines that the summary shows although it ended well: its results."""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    stage: str
    status: int | str
    """Its exit status; or `stopped after N s`, `no time`, `needs PACKAGE`, `could not start: WHY`."""
    seconds: float
    lines: tuple[str, ...] = ()
    """The end of what it printed, where that is to be read."""

    @property
    def failed(self) -> bool:
        """Was it started, or should it have been, and did not end well?"""
        return self.status != 0 and not str(self.status).startswith(("no time", "needs "))


class Programme:
    """The stages' results in the folder `out`; while they run, their files are in `work`."""

    def __init__(self, out: Path, work: Path, about: dict, deadline: float):
        """`deadline` is a moment of time.monotonic()."""
        self.out, self.work, self.about, self.deadline = out, work, about, deadline
        self.outcomes: list[Outcome] = []
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen] = set()
        self._stopped = threading.Event()
        for folder in (out, work):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, lanes: Sequence[Sequence[Stage]]) -> None:
        """All lanes side by side, the stages of each one after another."""
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # A shell starts its background jobs deaf to SIGINT, and each stage would inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
        for thread in threads:
            thread.start()
        packed = time.monotonic()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
                    if time.monotonic() - packed > PACK_EVERY:
                        self._pack()
                        packed = time.monotonic()
        finally:  # also where somebody ends the programme itself
            self._stopped.set()
            for process in list(self._running):
                _kill(process, signal.SIGKILL)
            for thread in threads:
                thread.join()
            self._stopped.clear()
            self._pack()

    def _lane(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            if not self._stopped.is_set():
                self._ended(self._run(stage))

    def _run(self, stage: Stage) -> Outcome:
        absent = [name for name in stage.needs if importlib.util.find_spec(name) is None]
        if absent:
            return Outcome(stage.name, f"needs {', '.join(absent)}", 0.0)
        begin = time.monotonic()
        left = self.deadline - begin
        if left < min(LEAST, stage.limit):
            return Outcome(stage.name, "no time", 0.0)
        path = self.work / f"{stage.name}.txt"
        with open(path, "wb") as file:
            status = self._wait(stage, min(stage.limit, left), file)
        shown = SHOWN if status != 0 else 0
        return Outcome(stage.name, status, round(time.monotonic() - begin, 1), _end_of(path, max(shown, stage.show)))

    def _wait(self, stage: Stage, limit: float, file) -> int | str:
        """Start it and wait for its end, or end it; what it started ends with it."""
        try:
            process = subprocess.Popen(stage.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            return f"could not start: {error}"
        self._running.add(process)
        try:
            return process.wait(max(limit - GRACE, limit / 2))
        except subprocess.TimeoutExpired:
            _kill(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, limit / 2))
            return f"stopped after {limit:.0f} s"
        finally:
            _kill(process, signal.SIGKILL)
            process.wait()
            self._running.discard(process)

    def _ended(self, outcome: Outcome) -> None:
        with self._lock:
            self.outcomes.append(outcome)
            path = self.work / f"{outcome.stage}.txt"
            text = path.read_text(errors="replace") if path.exists() else ""
            with open(self.out / "log.txt", "a", encoding="utf-8") as log:
                log.write(f"\n===== {outcome.stage}: {outcome.status}, {outcome.seconds} s\n{text[-1_000_000:]}\n")
            found = {**self.about, "stages": [asdict(o) for o in self.outcomes]}
            _replace(self.out / "summary.json", json.dumps(found, indent=1).encode())
            _replace(self.out / "summary.md", self._table().encode())
            print(f"{outcome.stage}: {outcome.status} ({outcome.seconds} s)", flush=True)
            for line in outcome.lines:
                print(f"    {line}", flush=True)

    def _table(self) -> str:
        lines = [json.dumps(self.about), "", "| stage | exit status | s |", "|---|---|---|"]
        lines += [f"| {o.stage} | {o.status} | {o.seconds} |" for o in self.outcomes]
        for o in self.outcomes:
            if o.lines:
                lines += ["", f"{o.stage}: {o.status}", "", *(f"    {line}" for line in o.lines)]
        return "\n".join(lines) + "\n"

    def _pack(self) -> None:
        """All that the stages wrote and that is not large."""

        def small(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
            return None if member.size > LARGEST or member.name.endswith(".safetensors") else member

        path = self.out / "files.tar.gz.new"
        with tarfile.open(path, "w:gz", compresslevel=3) as tar:
            for found in sorted(self.work.rglob("*")):
                with contextlib.suppress(FileNotFoundError):  # a stage that runs may take it away
                    tar.add(found, str(found.relative_to(self.work)), recursive=False, filter=small)
        os.replace(path, self.out / "files.tar.gz")


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    os.replace(new, path)


def _end_of(path: Path, count: int) -> tuple[str, ...]:
    lines = [line.rstrip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return tuple(line[:WIDTH] for line in lines[-count:]) if count else ()


def _kill(process: subprocess.Popen, how: signal.Signals) -> None:
    """It and all that it started: what lives on would hold memory of the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
