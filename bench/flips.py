"""Damage one file at a time, one random byte or length, and see whether its reader refuses it and names it."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import train
from bench.kills import FLAGS
from lite_mentor import checkpoint, config, teach
from lite_mentor.errors import UserError
from lite_mentor.log import LINES, RunLog
from lite_mentor.teacher import open_cache

Place = tuple[Path, int]
"""A file, and how many of its first bytes count."""


def soak(out: Path, *, tries: int, seed: int, flags: Sequence[str]) -> list[dict]:
    """Train a tiny run, fill a cache, and damage both: a row for each kind of damage to each kind of folder."""
    generator = random.Random(seed)
    run, cache = out / "to-flip", out / "cache"
    with contextlib.redirect_stdout(io.StringIO()):
        done = train.main([*FLAGS, *flags, "--out", str(run)])
        done = done or teach.main(["--suite", "tiny", "--size", "60", "--levels", "1", "--out", str(cache)])
    if done:
        raise UserError(f"The run or the cache that were to be damaged could not be made in {out}.")
    for older in sorted((run / "checkpoints").iterdir())[:-1]:
        shutil.rmtree(older)  # else a damaged newest one would be passed over with a note
    found, _ = checkpoint.load(run)
    log = found.state["log"]

    def read_lines() -> None:
        with RunLog(run, config.load(str(run / "config.json")).asdict(), 1, quiet=True, resume=True) as lines:
            if lines.damaged(log):
                raise UserError(", ".join(lines.damaged(log)))

    lines = [(run / name, log[name]["bytes"]) for name in LINES]
    return [
        *_attack("checkpoint", _whole(found.path), lambda: checkpoint.load(run), tries, generator),
        *_attack("a run's lines", lines, read_lines, tries, generator),
        *_attack("teacher's cache", _whole(cache), lambda: open_cache(cache), tries, generator),
    ]


def _whole(folder: Path) -> list[Place]:
    return [(file, file.stat().st_size) for file in sorted(folder.iterdir())]


@dataclass(frozen=True)
class Tally:
    """How one kind of damage to one kind of folder went."""

    what: str
    damage: str
    files: int
    tried: int
    found: int
    """Refused by the reader."""
    named: int
    """And the sentence names the file."""
    missed: tuple[str, ...]
    """The first few that were not found, or not named."""


def _attack(
    what: str, places: list[Place], read: Callable[[], object], tries: int, generator: random.Random
) -> list[dict]:
    """Flip a random bit of a random byte `tries` times, cut a random file as often, and remove each file once.

    `read` must raise UserError. Every file is put back; at the end `read` must succeed, as it did before.
    """
    read()
    by_bytes = [size for _, size in places]

    def flip(content: bytes, size: int) -> bytes:
        offset = generator.randrange(size)
        return content[:offset] + bytes([content[offset] ^ 1 << generator.randrange(8)]) + content[offset + 1 :]

    def cut(content: bytes, size: int) -> bytes:
        return content[: generator.randrange(size)]

    # By bytes alone, a manifest of 1 kB beside tensors of 1 MB would hardly ever be hit.
    half = tries // 2
    chosen = generator.choices(places, by_bytes, k=tries - half) + generator.choices(places, k=half)
    rows = [
        _tally(what, "a flipped bit", chosen, flip, read),
        _tally(what, "cut short", generator.choices(places, k=tries), cut, read),
        _tally(what, "removed", places, None, read),
    ]
    read()
    return rows


def _tally(what: str, damage: str, chosen: list[Place], change: Callable | None, read: Callable[[], object]) -> dict:
    found, named, missed = 0, 0, []
    for file, size in chosen:
        content = file.read_bytes()
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(content, size))
        try:
            read()
        except UserError as error:
            found += 1
            named += file.name in str(error)
            if file.name not in str(error):
                missed.append(f"{file.name} is not named: {error}")
        else:
            missed.append(f"{file.name} was read: {file.read_bytes()[:size]!r}"[:400])
        file.write_bytes(content)
    return asdict(Tally(what, damage, len(set(chosen)), len(chosen), found, named, tuple(missed[:5])))
