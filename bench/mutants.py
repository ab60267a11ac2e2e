"""Is any protection one that no test would miss? `python -m bench mutants --out DIR [--only AREA-OR-NAME ...]`

bench/mutants.txt lists mutants, changes of a few lines that take one protection away each. Each is made alone, in a
copy of the working tree as it is, and a test that it names must then fail. DIR/mutants.json holds every result as soon
as it is known: the same command goes on where it was stopped, as long as no file of the tree differs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.measure import dirty, machine
from lite_mentor.errors import UserError
from lite_mentor.files import replace_file

ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".txt")
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-o", "addopts=", "-p", "no:cacheprovider",
          "--tb=no", "-rfEs"]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One entry of the list."""

    name: str
    area: str
    lost: str
    """What is no longer so."""
    path: str
    old: str
    """Whole lines of the file at `path`, which hold this text once."""
    new: str
    tests: tuple[str, ...]
    """In the order in which they run, up to the first that fails: ids of pytest, or whole files."""
    equivalent: str
    """Why no test can tell the mutant from the code; "" where one can."""

    def applied(self, content: str) -> str:
        """The file's content with the new lines. Raises UserError unless the old ones occur exactly once."""
        found = f"\n{content}".count(f"\n{self.old}\n")
        if found != 1:
            raise UserError(
                f"The lines of mutant {self.name} occur {found} times in {self.path} and must occur once; bring its "
                f"entry in {LIST} up to date."
            )
        new = f"\n{self.new}\n" if self.new else "\n"
        return f"\n{content}".replace(f"\n{self.old}\n", new)[1:]


def read_list(text: str) -> list[Mutant]:
    """The entries, which blank lines set apart; lines that begin with # are comments. Raises UserError.

    An entry is `NAME AREA: what is lost`, a path, old lines after -, new ones after +, its tests, one a line, and where
    none of them can fail `equivalent: ` and why.
    """
    mutants = []
    for block in text.split("\n\n"):
        lines = [line for line in block.strip("\n").split("\n") if not line.startswith("#")]
        if not any(lines):
            continue
        (name, _, area), (_, _, lost) = lines[0].partition(":")[0].partition(" "), lines[0].partition(": ")
        parts = {sign: [line[len(sign) :] for line in lines[2:] if line.startswith(sign)] for sign in "-+"}
        tests = [line for line in lines[2:] if line.startswith("tests/")]
        reason = [line.removeprefix("equivalent: ") for line in lines[2:] if line.startswith("equivalent: ")]
        known = len(parts["-"]) + len(parts["+"]) + len(tests) + len(reason)
        if not (name and area and lost and parts["-"] and tests and len(reason) < 2 and known == len(lines) - 2):
            raise UserError(f"{LIST} has an entry that cannot be read; it begins with {lines[0][:80]!r}.")
        old, new = "\n".join(parts["-"]), "\n".join(parts["+"])
        mutants.append(Mutant(name, area, lost, lines[1], old, new, tuple(tests), "".join(reason)))
    twice = [name for name, count in Counter(m.name for m in mutants).items() if count > 1]
    if twice:
        raise UserError(f"{LIST} has more than one entry of the name {twice[0]}.")
    return mutants


def main(argv: list[str]) -> None:
    """Test the mutants that were asked for and write the table; exit with 1 if one of them was not found as it must."""
    parser = argparse.ArgumentParser(prog="python -m bench mutants")
    parser.add_argument("--out", type=Path, required=True, help="folder for mutants.json and mutants.md")
    parser.add_argument("--only", nargs="+", default=[], metavar="AREA-OR-NAME", help="of the list; default: all of it")
    parser.add_argument("--seconds", type=float, default=300, help="after which a mutant's tests are ended")
    options = parser.parse_args(argv)
    chosen = choose(read_list(LIST.read_text(encoding="utf-8")), options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, leaving_nothing_behind():
        copy = Path(folder)
        tree = copy_tree(copy)
        for mutant in chosen:  # before hours are spent
            mutant.applied((copy / mutant.path).read_text(encoding="utf-8"))
        about = {
            "command": " ".join(["python -m bench mutants", *argv]), **machine("cpu"), "dirty": dirty(),
            "python": platform.python_version(), "pytest": version("pytest"), "tree": tree,
        }  # fmt: skip
        results = earlier(options.out / "mutants.json", tree)
        left = [mutant for mutant in chosen if mutant.name not in results]
        check_unchanged(left, copy)
        for mutant in left:
            results[mutant.name] = examine(mutant, copy, options.seconds)
            print(table([mutant], results).splitlines()[-1], flush=True)
            content = json.dumps({**about, "results": results}, indent=1)
            replace_file(options.out / "mutants.json", content.encode())
    shown = [mutant for mutant in read_list(LIST.read_text(encoding="utf-8")) if mutant.name in results]
    text = f"{json.dumps(about)}\n\n{table(shown, results)}\n"
    replace_file(options.out / "mutants.md", text.encode())
    print(text)
    wrong = [m.name for m in chosen if results[m.name]["result"] != ("survived" if m.equivalent else "killed")]
    if wrong:
        print(f"not as they must be: {', '.join(wrong)}", file=sys.stderr)
        raise SystemExit(1)


def choose(mutants: Sequence[Mutant], only: Sequence[str]) -> list[Mutant]:
    """Those whose name or area is in `only`, or all. Raises UserError for a word that is neither."""
    known = {word for m in mutants for word in (m.name, m.area)}
    if not known.issuperset(only):
        areas = ", ".join(dict.fromkeys(m.area for m in mutants))
        raise UserError(f"--only {' '.join(only)}: give names of {LIST}, or its areas: {areas}.")
    return [m for m in mutants if not only or m.name in only or m.area in only]


def copy_tree(target: Path) -> str:
    """Copy the files that git does not ignore, as they now are -> a hash of their names and contents."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        raise UserError(f"The mutants need git and its repository: {listed.stderr.decode().strip()}")
    digest = hashlib.sha256()
    for name in sorted({*listed.stdout.decode().split("\0")} - {""}):
        if (ROOT / name).is_file():
            content = (ROOT / name).read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return digest.hexdigest()


def earlier(path: Path, tree: str) -> dict[str, dict]:
    """The results that are there already. Raises UserError when they are of other files."""
    if not path.exists():
        return {}
    found = json.loads(path.read_bytes())
    if found["tree"] != tree:
        raise UserError(f"{path} is of other code, of {found['date']}; name a new --out.")
    return found["results"]


def check_unchanged(mutants: Iterable[Mutant], copy: Path) -> None:
    """Raise UserError when a test that should find a mutant fails without it, or is skipped."""
    named = dict.fromkeys(test for m in mutants for test in m.tests if "::" in test)
    if not named:
        return
    code, output = pytest(named, copy, seconds=3600)
    if code != 0 or "\nSKIPPED " in f"\n{output}":
        reasons = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
        raise UserError(
            f"Tests that must find mutants do not pass here, where nothing was changed yet: "
            f"{(reasons or output.strip().splitlines() or ['they hang'])[-1]}"
        )


def examine(mutant: Mutant, copy: Path, seconds: float) -> dict:
    """Make the change, run its tests, and undo it."""
    path = copy / mutant.path
    content = path.read_text(encoding="utf-8")
    begin = time.monotonic()
    path.write_text(mutant.applied(content), encoding="utf-8")
    try:
        code, output = pytest(mutant.tests, copy, seconds)
    finally:
        path.write_text(content, encoding="utf-8")
    marks = ("FAILED ", "ERROR ")
    failed = [line.split(" ", 1)[1].split(" - ")[0] for line in output.splitlines() if line.startswith(marks)]
    if code not in (None, 0, 1) or (code == 1 and "::" not in "".join(failed)):
        last = (output.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"The tests of mutant {mutant.name} could not be run; they end with: {last}")
    result = {None: "timed out", 0: "survived", 1: "killed"}[code]
    return {"result": result, "by": failed[0] if failed else "", "seconds": round(time.monotonic() - begin, 1)}


def pytest(tests: Iterable[str], folder: Path, seconds: float) -> tuple[int | None, str]:
    """Run tests -> pytest's exit status, None when their time was up; and what it printed."""
    return run([*PYTEST, *tests], folder, seconds)


def run(command: Sequence[str], folder: Path, seconds: float) -> tuple[int | None, str]:
    """Run a command of a copy -> its exit status, None when its time was up; and its output. Nothing of it is left."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "kernels")]),
        "PYTHONDONTWRITEBYTECODE": "1",  # two versions of a file may have one size and be of one second
        "OMP_NUM_THREADS": "1",
    }
    others = children()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            while left := children() - others:  # those of the killed come to us in their turn
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        output.seek(0)
        return code, output.read()


def children() -> set[int]:
    """This process's own, where the system tells them."""
    try:
        return {*map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())}
    except FileNotFoundError:
        return set()


@contextlib.contextmanager
def leaving_nothing_behind() -> Iterator[None]:
    """In the block SIGTERM is as Ctrl-C, and what outlives its parent among our descendants is ours (on Linux)."""
    pr_set_child_subreaper = 36
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    prctl(pr_set_child_subreaper, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(pr_set_child_subreaper, 0, 0, 0, 0)
        signal.signal(signal.SIGTERM, before)


def table(mutants: Iterable[Mutant], results: dict[str, dict]) -> str:
    """Markdown."""
    lines = ["| mutant | area | what is lost | result | by | s |", "|---|---|---|---|---|---|"]
    for m in mutants:
        found = results[m.name]
        result = f"{found['result']}, as it must: {m.equivalent}" if m.equivalent else found["result"]
        by = found["by"].replace("|", "\\|")
        lines.append(f"| {m.name} | {m.area} | {m.lost} | {result} | {by} | {found['seconds']:.0f} |")
    return "\n".join(lines)
