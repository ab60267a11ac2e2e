"""Texts on which a regular expression may take more than linear time, made from the expression itself.

A backtracking matcher is slow where a repeat can share out the same characters in several ways: with its neighbours,
with a repeat around it, or with the next place from which a search begins. So texts are drawn that match a part of the
expression, and one is repeated many times, after a text that leads there and before one that spoils the match.
"""

from __future__ import annotations

import math
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random

try:
    from re import _compiler as compiler
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_compile as compiler
    import sre_parse as parser

LENGTH = 16_000
SECONDS = 0.03
"""Of CPU time. At this length most linear work takes a few milliseconds, and all squared work longer than this."""
CHARACTERS = "aAmMz019 \n.,:;-+'\"!?()[]{}<>/\\^_$%*=°éπ一\x00"
"""At least one of each class that an expression is likely to name."""
SPOILERS = ("", "\x00", "!", " ", "a", "1")

Node = tuple
"""A part of a parsed expression: what it is, and what is said about it."""


def slow_text(pattern: re.Pattern[str], *, searched: bool, length: int = LENGTH, rounds: int = 8) -> str | None:
    """In a few words, a text of `length` characters on which the pattern is slow; None where none was found.

    `searched`: may a match begin anywhere, or only where it is asked for?
    """

    def work(text: str) -> None:
        pattern.match(text)
        pattern.fullmatch(text)
        for _ in pattern.finditer(text) if searched else ():
            pass

    for lead, pump, end in attacks(pattern, rounds):
        long, short = (lead + pump * (n // len(pump)) + end for n in (length, length // 8))
        if is_slow(lambda text=long: work(text)) and _grows(work, short, long):
            return f"{lead!r} + {pump!r} * {length // len(pump)} + {end!r}"
    return None


def is_slow(work: Callable[[], object], seconds: float = SECONDS) -> bool:
    """Does it take more CPU time than this? It is broken off then, also within a match."""
    try:
        with _limit(seconds):
            work()
    except _Slow:
        return True
    return False


def _grows(work: Callable[[str], None], short: str, long: str) -> bool:
    """Does the long one, of eight times the length, take more than 20 times as long? Of each the fastest of three."""
    fastest = math.inf
    for _ in range(3):
        start = time.process_time()
        if not is_slow(lambda: work(short)):
            fastest = min(fastest, time.process_time() - start)
    return fastest == math.inf or all(is_slow(lambda: work(long), SECONDS + 20 * fastest) for _ in range(3))


class _Slow(BaseException):
    """Not an Exception, so that nothing that is tried can catch it."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise _Slow

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def attacks(pattern: re.Pattern[str], rounds: int) -> list[tuple[str, str, str]]:
    """For each repeat so many of (what leads there, what is to be repeated, what spoils it), the same in every run.

    In every second round it is the repeat itself, from where a match has come to it, and else what stands around it.
    """
    drawn, rng, found = _Drawn(pattern), Random(pattern.pattern), []
    for before, part in _sequences([], list(drawn.parsed)):
        for at in (i for i in range(len(part)) if _repeats(part[i : i + 1])):
            for number in range(rounds):
                start, stop = at, at + 1
                lead = drawn.text([*before, *part[:at]])
                if number % 2:
                    start, stop = rng.choice([0, rng.randint(0, at)]), rng.randint(at + 1, len(part))
                    lead = rng.choice(["", drawn.text(drawn.parsed)])
                pump, end = drawn.text(part[start:stop]), rng.choice([*SPOILERS, drawn.text(part[stop:])])
                if pump:
                    found.append((lead, pump, end))
    return list(dict.fromkeys(found))


class _Drawn:
    """Random texts of parts of one pattern."""

    def __init__(self, pattern: re.Pattern[str]):
        self.rng = Random(pattern.pattern)
        self.parsed = parser.parse(pattern.pattern, pattern.flags)

    def text(self, nodes) -> str:
        """A text that these match, but for what they ask of its surroundings."""
        return "".join(map(self._text_of, nodes))

    def _text_of(self, node: Node) -> str:
        kind, about = node
        if str(kind) in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            return self._character(node)
        if str(kind) == "ASSERT_NOT" or not _inside(node):
            return ""
        times = 1
        if "REPEAT" in str(kind):
            times = min(max(about[0], self.rng.randrange(4)), int(about[1]))
        return "".join(self.text(self.rng.choice(_inside(node))) for _ in range(times))

    def _character(self, node: Node) -> str:
        kind, about = node
        if str(kind) == "LITERAL":
            return chr(about)
        one = compiler.compile(parser.SubPattern(self.parsed.state, [node]))
        named = [chr(c if isinstance(c, int) else c[0]) for what, c in about if c] if str(kind) == "IN" else []
        return self.rng.choice([c for c in [*CHARACTERS, *named] if one.match(c)])


def _sequences(before: list[Node], nodes: list[Node]) -> Iterator[tuple[list[Node], list[Node]]]:
    """The expression, and all that stands inside it; of each also what stands before it."""
    yield before, nodes
    for at, node in enumerate(nodes):
        for inner in _inside(node):
            yield from _sequences([*before, *nodes[:at]], list(inner))


def _repeats(nodes) -> bool:
    """Is something in it repeated, or repeated within what it holds, without end?"""
    endless = any("REPEAT" in str(kind) and about[1] == parser.MAXREPEAT for kind, about in nodes)
    return endless or any(_repeats(inner) for node in nodes for inner in _inside(node))


def _inside(node: Node) -> list:
    """What stands inside a node: the alternatives of a branch, else one sequence or none."""
    kind, about = node
    if str(kind) == "BRANCH":
        return about[1]
    parts = about if isinstance(about, (tuple, list)) else [about]
    return [part for part in parts if isinstance(part, parser.SubPattern)]
