"""The measure itself: it tells linear work from squared work, whatever else the machine does."""

from __future__ import annotations

from tests import linear_time
from tests.linear_time import LONG, SHORT, is_linear


def test_linear_work_is_told_from_squared_work_also_on_a_busy_machine(monkeypatch):
    clock, work = [0.0], {"runs": 0}
    monkeypatch.setattr(linear_time.time, "process_time", lambda: clock[0])

    def takes(seconds, busy=()):
        def run(text):
            work["runs"] += 1
            clock[0] += seconds(len(text)) * (4 if work["runs"] in busy else 1)

        work["runs"] = 0
        return run

    assert LONG == 8 * SHORT
    for busy in ((), (1, 3), (2, 4, 6, 8), range(3, 9)):  # odd: a short text; even: a long one
        assert is_linear(takes(lambda n: n / SHORT, busy), "a")
        assert not is_linear(takes(lambda n: (n / SHORT) ** 2, busy), "a")
