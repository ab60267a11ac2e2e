"""Break one write of a run at a time, go on without the fault, and compare the end with that of a run that had none.

A point is a call that changes the run's folder: a file opened for writing, a write, an fsync, a rename, a folder made,
a file cut or deleted. A forked trainer (see `kills`) counts its points, and at the chosen one

    a short write      takes half of the bytes and says so, as the system may
    an I/O error       raises EIO, once
    a full disk        a write takes half of the bytes; this call, or the next, and all that need room raise ENOSPC
    a kill before      is SIGKILL, in place of the call (so after the point before it; an fsync leaves nothing to see)
    a kill within      is SIGKILL after half of the bytes
    a Ctrl-C           is SIGINT: KeyboardInterrupt in place of the call, or a request to stop after this step

What raises must end the run with one sentence, or be survived; adapters are whole or absent; and a resume without the
fault must end as the run that nothing befell: `kills.differences` finds nothing.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from bench.kills import differences, start
from lite_mentor.errors import UserError

FLAGS = [
    "--preset", "tiny", "--device", "cpu", "--sft-steps", "5", "--sft-batch", "8", "--prompts-per-step", "2",
    "--group-size", "4", "--eval-size", "1", "--train-size", "60", "--max-new-tokens", "24", "--max-turns", "2",
    "--lora-rank", "8", "--temperature", "1.5", "--micro-tokens", "320", "--steps", "2", "--save-every", "1",
    "--eval-every", "1", "--eval-suites", "validation",
]  # fmt: skip
KINDS = ("a short write", "an I/O error", "a full disk", "a kill before", "a kill within", "a Ctrl-C")
ADAPTERS = ("cold_start", "adapter", "best")
NEW, OPENED = "a new run", "a killed run is opened"
NEED_ROOM = frozenset({"open", "write", "mkdir"})


@dataclass(frozen=True)
class Point:
    """The n-th call that changes the run's folder."""

    number: int
    call: str
    path: str
    """Relative to the run's folder."""

    def can_meet(self, kind: str) -> bool:
        """Can this kind of fault come at this kind of call?"""
        if kind in ("a short write", "a kill within"):
            return self.call == "write"
        if kind == "a full disk":
            return self.call in NEED_ROOM
        return kind != "a kill before" or self.call != "fsync"


@dataclass(frozen=True)
class Fault:
    """What is to happen, and where; `number` 0: nothing."""

    kind: str = ""
    number: int = 0


@dataclass(frozen=True)
class Outcome:
    """One fault, and what came of it."""

    part: str
    call: str
    path: str
    kind: str
    ended: str
    """The run with the fault: "went on", "one sentence", "killed", "interrupted", or what it must not do."""
    wrong: str
    """What did not hold; "" when all did."""


def soak(out: Path, *, most: int, flags: Sequence[str] = FLAGS) -> dict:
    """Try at most `most` faults, evenly spread from first to last: in a new run, and as a killed one is opened.

    Returns the points by part and call, and every outcome; the folders of runs that failed are kept.
    """
    whole, torn = out / "whole", out / "torn"
    points = {NEW: _points([*flags, "--out", str(whole)], whole, out)}
    last = [p.number for p in points[NEW] if (p.call, p.path) == ("write", "metrics.jsonl")][-1]
    _run([*flags, "--out", str(torn)], torn, out, Fault("a kill within", last))
    opened = shutil.copytree(torn, out / "opened")
    resumed = _points(["--resume", str(opened)], opened, out)
    points[OPENED] = list(takewhile(lambda p: (p.call, p.path) != ("write", "rollouts.jsonl"), resumed))
    faults = [
        (part, point, kind) for part in points for point in points[part] for kind in KINDS if point.can_meet(kind)
    ]
    count = min(most, len(faults))
    chosen = [faults[i * (len(faults) - 1) // max(1, count - 1)] for i in range(count)]
    outcomes: list[Outcome] = []
    for part, point, kind in chosen:
        run = out / f"run-{len(outcomes):03d}"
        if part == OPENED:
            shutil.copytree(torn, run)
        argv = ["--resume", str(run)] if part == OPENED else [*flags, "--out", str(run)]
        outcomes.append(_outcome(part, point, kind, argv, run, whole))
        if outcomes[-1].wrong:
            print(outcomes[-1], flush=True)
        else:
            shutil.rmtree(run)
        print(f"{len(outcomes)} of {len(chosen)} faults, {sum(bool(o.wrong) for o in outcomes)} failed", flush=True)
    return {
        "points": {part: Counter(point.call for point in found) for part, found in points.items()},
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "differences_without_a_fault": differences(whole, opened),
    }


def table(found: dict) -> str:
    """Where a fault came, and how many of each kind held; below it how the runs that met one ended."""
    outcomes = found["outcomes"]
    lines = [f"| | call | points | {' | '.join(KINDS)} |", "|---" * (3 + len(KINDS)) + "|"]
    for part, calls in found["points"].items():
        for call, count in calls.items():
            cells = []
            for kind in KINDS:
                those = [o for o in outcomes if (o["part"], o["call"], o["kind"]) == (part, call, kind)]
                cells.append(f"{sum(not o['wrong'] for o in those)} of {len(those)}" if those else "")
            lines.append(f"| {part} | {call} | {count} | {' | '.join(cells)} |")
    for ended in sorted({o["ended"] for o in outcomes}):
        counts = Counter(o["kind"] for o in outcomes if o["ended"] == ended)
        lines.append(f"| ended: {ended} | | | {' | '.join(str(counts[kind] or '') for kind in KINDS)} |")
    failed = [f"- {o['part']}, {o['kind']} at {o['call']} {o['path']}: {o['wrong']}" for o in outcomes if o["wrong"]]
    return "\n".join([*lines, *([""] if failed else []), *failed])


def _outcome(part: str, point: Point, kind: str, argv: list[str], run: Path, whole: Path) -> Outcome:
    """Meet the fault, then go on without it unless the run did by itself."""
    status, last = _run(argv, run, run.parent, Fault(kind, point.number))
    met = _recorded(run.parent)
    wrong = ""
    if len(met) < point.number or met[point.number - 1].call != point.call:
        wrong = "this call did not come again"
    ends = {0: "went on", 2: "one sentence", -signal.SIGKILL: "killed", 130: "interrupted"}
    ended = ends.get(status, f"exit {status}: {last}")
    may_end = {"a kill before": ["killed"], "a kill within": ["killed"], "a Ctrl-C": ["interrupted"]}
    if ended not in may_end.get(kind, ["went on", "one sentence"]):
        wrong = wrong or f"it ended otherwise: {status} {last}"
    torn = [name for name in ADAPTERS if _sizes(run / name) not in (None, _sizes(whole / name))]
    wrong = wrong or ", ".join(f"{name} was torn" for name in torn)
    if status:
        again = ["--resume", str(run)] if (run / "config.json").exists() else argv
        status, last = _run(again, run, run.parent, Fault())
        wrong = wrong or (f"going on, it ended with exit {status}: {last}" if status else "")
    # What cannot be deleted stays, under a name that the next save or resumption tries again.
    stays = kind == "an I/O error" and point.call in ("unlink", "rmdir")
    wrong = wrong or ", ".join(name for name in differences(whole, run) if not (stays and "/.tmp-" in name))
    return Outcome(part, point.call, point.path, kind, ended, wrong)


def _sizes(folder: Path) -> dict[str, int] | None:
    return {path.name: path.stat().st_size for path in folder.iterdir()} if folder.exists() else None


def _points(argv: list[str], run: Path, out: Path) -> list[Point]:
    """The points of a run that no fault befalls."""
    status, last = _run(argv, run, out, Fault())
    if status:
        raise UserError(f"The run {run} that no fault befell failed: {last}")
    return _recorded(out)


def _recorded(out: Path) -> list[Point]:
    lines = (out / "points.txt").read_text().splitlines()
    return [Point(number, *line.split(" ", 1)) for number, line in enumerate(lines, 1)]


def _run(argv: list[str], run: Path, out: Path, fault: Fault) -> tuple[int, str]:
    """A forked trainer's exit status, and its last line; a traceback is exit 1, whatever the status."""
    text = out / "run.txt"
    text.unlink(missing_ok=True)
    pid = start(argv, text, Injector(run, fault, out / "points.txt").install)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = text.read_text(errors="replace")
    last = (said.strip().splitlines() or ["nothing"])[-1]
    traceback = "Traceback (most recent call last)" in said or (status == 2 and not last.startswith("error: "))
    return (1 if traceback else status), last


class Injector:
    """Counts the calls that change `run`, one line of `record` each, and lets the fault come. Made for a forked child:
    what `install` puts in the place of `open` and of functions of `os` stays there."""

    def __init__(self, run: Path, fault: Fault, record: Path) -> None:
        self.run, self.fault, self.record = os.path.abspath(run), fault, record
        self.number, self.full = 0, False

    def install(self) -> None:
        """Stand between the whole process and the system."""
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background inherits as ignored
        self.lines = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        builtins.open = io.open = self._opened(io.open)

    def _counted(self, name: str, real: Callable) -> Callable:
        def call(path, *arguments, **named):
            place = self._place(path, named.get("dir_fd"))
            if place:
                self.at(name, place)
            return real(path, *arguments, **named)

        return call

    def _opened(self, real: Callable) -> Callable:
        def call(path, mode="r", buffering=-1, *arguments, opener=None, **named):
            place = self._place(path, None) if set(mode) & set("wax+") and not isinstance(path, int) else ""
            if not place:
                return real(path, mode, buffering, *arguments, opener=opener, **named)
            self.at("open", place)
            raw = _File(path, mode, opener=opener)
            raw.injector, raw.place = self, place
            if "b" not in mode:
                return io.TextIOWrapper(io.BufferedWriter(raw), *arguments, **named)
            return raw if buffering == 0 else io.BufferedWriter(raw)

        return call

    def _place(self, path: str | os.PathLike | int, folder: int | None) -> str:
        """Relative to the run's folder; "" elsewhere."""
        if isinstance(path, int) or folder is not None:
            number = path if isinstance(path, int) else folder
            base = os.readlink(f"/proc/self/fd/{number}")
            path = base if isinstance(path, int) else os.path.join(base, path)
        path = os.path.abspath(os.fspath(path))
        inside = path == self.run or path.startswith(self.run + os.sep)
        return os.path.relpath(path, self.run) if inside else ""

    def at(self, call: str, place: str) -> str:
        """One more point. Returns the fault that a write has to carry out by itself, "" for none."""
        if self.full and call in NEED_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.number += 1
        os.write(self.lines, f"{call} {place}\n".encode())
        if self.number != self.fault.number:
            return ""
        if self.fault.kind == "a kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.kind == "a Ctrl-C":
            os.kill(os.getpid(), signal.SIGINT)
            return ""
        if self.fault.kind == "an I/O error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.full = self.fault.kind == "a full disk"
        if self.full and call != "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.fault.kind


class _File(io.FileIO):
    """A file of the run, open for writing."""

    injector: Injector
    place: str

    def write(self, content) -> int:
        kind = self.injector.at("write", self.place)
        taken = super().write(content[: max(1, len(content) // 2)] if kind else content)
        if kind == "a kill within":
            os.kill(os.getpid(), signal.SIGKILL)
        return taken

    def truncate(self, size=None) -> int:
        self.injector.at("truncate", self.place)
        return super().truncate(size)
