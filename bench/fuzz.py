"""Throw generated cases at everything that reads what others wrote: a student, a teacher's file, a task file, a user.

    python -m bench fuzz --cases 100000 --out DIR

What is attacked, and what must hold, stands in attack_text.py and attack_files.py. Case `number` of a target is a
function of (target, seed, number) alone. --cases is the sum over the targets, shared out by what a case costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from bench import attack_files, attack_text
from bench.hostile import Target
from bench.measure import machine
from lite_mentor.errors import UserError

TARGETS = {**attack_text.TARGETS, **attack_files.TARGETS}
HANG_SECONDS = 60
"""Far above what a case takes, math-verify's limits and a new worker for it included."""


class Hang(BaseException):
    """Not an Exception, so that nothing that is attacked can catch it."""


def main(argv: list[str]) -> None:
    """Run, print a Markdown table, write fuzz.json, fuzz.md and every failing case to --out; exit with 1 if any."""
    parser = argparse.ArgumentParser(prog="python -m bench fuzz")
    parser.add_argument("--cases", type=int, default=10_000, help="over all targets")
    parser.add_argument("--only", choices=list(TARGETS), help="give them all to one target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.cases < 1:
        raise UserError(f"--cases is {options.cases}; give a number of at least 1.")
    about = {"command": " ".join(["python -m bench fuzz", *argv]), **machine("cpu")}
    chosen = {options.only: TARGETS[options.only]} if options.only else TARGETS
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, target in chosen.items():
        cases = round(options.cases * target.share / sum(t.share for t in chosen.values()))
        row, failures = attack(name, target, cases, options.seed)
        print(table([row]).splitlines()[-1], flush=True)
        rows.append(row)
        for failure in failures:
            (options.out / f"{name}-{failure['number']}.json").write_text(json.dumps(failure, indent=1))
    (options.out / "fuzz.json").write_text(json.dumps({**about, "results": rows}, indent=1))
    (options.out / "fuzz.md").write_text(json.dumps(about) + "\n\n" + table(rows) + "\n")
    print(table(rows))
    print(json.dumps(about))
    if any(row["crashes"] for row in rows):
        raise SystemExit(1)


def attack(name: str, target: Target, cases: int, seed: int) -> tuple[dict, list[dict]]:
    """At least `cases` cases of one target -> its row of the table, and what failed."""
    failures: list[dict] = []
    slowest = 0.0
    batches = -(-cases // target.holds)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, _without_warnings():
        for number in range(batches):
            case = target.make(Random(f"{name}/{seed}/{number}"))
            start = time.perf_counter()
            try:
                with _alarm():
                    target.check(case, Path(folder))
            except (Exception, Hang) as error:  # whatever is raised is the finding
                about = f"{type(error).__name__}: {error}"[:500]
                failures.append({"target": name, "seed": seed, "number": number, "error": about, "case": case})
            slowest = max(slowest, time.perf_counter() - start)
    seconds = time.perf_counter() - begin
    row = {"target": name, "cases": batches * target.holds, "crashes": len(failures), "slowest_ms": slowest * 1e3}
    return {**row, "seconds": seconds, "seed": seed}, failures


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Each of them is right, and there would be thousands."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Raise Hang in here after HANG_SECONDS, where the system can."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise Hang(f"more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| target | cases | crashes | slowest case ms | seconds | seed |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append("| {target} | {cases} | {crashes} | {slowest_ms:.0f} | {seconds:.0f} | {seed} |".format(**row))
    return "\n".join(lines)
