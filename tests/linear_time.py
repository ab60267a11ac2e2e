"""Whether work takes time in proportion to the length of its input, told apart from a machine that is busy."""

from __future__ import annotations

import time
from collections.abc import Callable

SHORT, LONG = 25_000, 200_000
"""Eight times as long; work that grows as the square of it takes 64 times as long."""


def is_linear(work: Callable[[str], object], piece: str) -> bool:
    """Compare the fastest of five runs on a short text made of `piece` with the fastest of five on a long one.

    What else the machine does only makes a run slower, and seldom all five of one length.
    """
    fastest = {SHORT: float("inf"), LONG: float("inf")}
    for _ in range(5):
        for length in fastest:
            text = piece * (length // len(piece))
            start = time.process_time()
            work(text)
            fastest[length] = min(fastest[length], time.process_time() - start)
    return fastest[LONG] < 20 * fastest[SHORT] + 0.01
