"""bench kernels --choose: the sweep of launches in the interpreter with a clock of its own, and what it chooses."""

from __future__ import annotations

import math
from itertools import cycle

import pytest
import torch
from mentor_kernels.head_launches import CANDIDATES, LAUNCHES, HeadLaunches, head_candidates, k1, k3, launches_of

from bench import choose
from bench.choose import Result, Trial
from bench.kernels import make_inputs

TABLE = LAUNCHES[8, 6]
ABOUT = {"device": "cuda: A Card", "torch": "2.0", "triton": "3.0", "date": "2026-01-02", "commit": "abc1234"}
A, B = k1(64, 64, warps=4, stages=3), k1(64, 64, warps=8, stages=4)


def ticking(*seconds: float):
    """A clock that says these, in turn, without waiting for what it times."""
    times = cycle(seconds)
    return lambda run: next(times)


@pytest.mark.parametrize("field", HeadLaunches._fields)
def test_every_mode_of_every_field_is_swept(field):
    """With real kernels: each candidate runs, and says what the table's launch says."""
    problem = choose.trials(make_inputs(30, 40, 300, torch.float16, "cpu"))
    candidates = {name: [] for name in choose.ORDER} | {field: head_candidates(field, 86)[:2]}
    said = []
    found = choose.sweep(candidates, [problem], ticking(1.0, 0.5), math.inf, said.append, repeats=3)
    assert found[field] == [Result(launch, 0.5) for launch in candidates[field]]
    assert [len(results) for name, results in found.items() if name != field] == [0, 0, 0]
    assert len(said) == len(candidates[field])
    for trial in problem[field]:
        assert f"{trial.name} 0.50 (" in said[0]
        assert trial.said().isfinite().all()


def test_the_clock_times_the_candidate_and_the_table_in_turn():
    ran = []
    trial = Trial("one", ran.append, lambda: torch.ones(2), lambda: ran.append("prepared"))
    result, words = choose.measured(A, [trial], lambda run: run() or len(ran), repeats=2)
    assert ran == ["prepared", None, A, None, A, None, A]
    assert result.ratio == (5 + 7) / (4 + 6)
    assert words == "1.20 of the table's time: one 1.20 (same bits)"


@pytest.mark.parametrize(
    "said", [torch.tensor([1.0, 1.1]), torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0])]
)
def test_a_candidate_that_says_something_else_is_not_timed(said):
    def clock(run):
        raise AssertionError("timed")

    ran = []
    trial = Trial("one", ran.append, lambda: said if ran[-1] else torch.ones(2))
    result, words = choose.measured(A, [trial], clock, repeats=1)
    assert (result.ratio, result.problem) == (math.inf, "wrong")
    assert "one is off by" in words


def test_a_candidate_that_cannot_run_is_named_and_the_rest_goes_on():
    def run(launch):
        if launch == A:
            raise RuntimeError("out of resource: shared memory\nmore")

    problems = [{field: [Trial("one", run, lambda: torch.ones(2))] for field in choose.ORDER}]
    candidates = {field: [] for field in choose.ORDER} | {"statistics": [A, B]}
    said = []
    found = choose.sweep(candidates, problems * 2, ticking(1.0, 0.9), math.inf, said.append)["statistics"]
    assert found[0] == Result(A, problem="failed: RuntimeError: out of resource: shared memory")
    assert found[1].ratio == pytest.approx(0.9)
    assert said[0] == "statistics k1(64, 64, warps=4, stages=3): one failed: out of resource: shared memory"


def test_what_there_is_no_time_for_is_counted():
    said = []
    candidates = {field: head_candidates(field, 90) for field in choose.ORDER}
    found = choose.sweep(candidates, [], ticking(1.0), 0.0, said.append)
    assert said == [f"{f}: no time for {len(c)} of {len(c)} candidates" for f, c in candidates.items()]
    assert choose.chosen(found, TABLE) == TABLE
    assert choose.lines(found, TABLE, (9, 0), ABOUT).count("# not measured") == 4


@pytest.mark.parametrize(
    ("results", "launch"),
    [
        ([Result(A, 0.9), Result(B, 0.8)], B),
        ([Result(A, 0.985), Result(B, 1.2)], TABLE.statistics),  # too little to be more than noise
        ([Result(A, 0.9), Result(B, problem="wrong")], A),
        ([Result(A, problem="wrong")], TABLE.statistics),
        ([], TABLE.statistics),
    ],
)
def test_the_choice(results, launch):
    assert choose.chosen({"statistics": results}, TABLE) == TABLE._replace(statistics=launch)


def test_the_lines_are_an_entry_of_the_table():
    gradient = k3(64, 128, 32, warps=4, stages=4)
    found = {"statistics": [Result(A, 0.9), Result(B, 0.8)], "gradient": [Result(gradient, 1.3)], "jacobian": []}
    text = choose.lines(found, TABLE, (8, 6), ABOUT)
    assert eval("{" + text + "\n}") == {(8, 6): TABLE._replace(statistics=B)}
    first, *rest = text.splitlines()
    assert first == "    (8, 6): HeadLaunches(  # cuda: A Card, torch 2.0, triton 3.0, 2026-01-02, abc1234"
    assert [line.partition("#")[2] for line in rest[:-1]] == [
        " 0.80 of the time of k1(128, 32, warps=8, stages=4)", " not measured", " not measured",
        " stays: none of 1 gains 2%",
    ]  # fmt: skip


def test_the_table_and_its_candidates():
    assert set(LAUNCHES) == {(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)}
    assert launches_of(75) == launches_of("gfx942") == launches_of(121) == LAUNCHES[8, 0]
    assert launches_of(120) == LAUNCHES[12, 0]
    for arch in (80, 86, 89, 90, 120):
        for field, launch in launches_of(arch)._asdict().items():
            others = head_candidates(field, arch)
            assert launch not in others
            assert others
            assert all(others.count(other) == 1 for other in others)
            # What is replaced stays measurable.
            assert launch in [candidate for candidate, archs in CANDIDATES[field] if arch in archs]


def test_what_serves_unknown_cards_fits_every_card():
    """The operands' tiles of all stages, an upper bound of what mma.sync keeps, within the 99 KB of a consumer card."""
    K = dict(statistics="BLOCK_H", small_statistics="BLOCK_H", jacobian="BLOCK_V", gradient="BLOCK_V")
    for field, launch in LAUNCHES[8, 0]._asdict().items():
        sizes = launch.blocks
        rows = sizes["BLOCK_R"] * (2 if field == "small_statistics" else 1)
        columns = sizes["BLOCK_H"] if K[field] == "BLOCK_V" else 128
        assert launch.stages * (rows + columns) * sizes[K[field]] * 2 <= 101_376
