"""Which launches the loss head's kernels should have on this GPU: the sweep behind `python -m bench kernels --choose`.

Each candidate of head_launches.py takes turns with the table's launch on the same chunk of rows. It must first say what
the table's says; then the ratio of their times counts. A launch serves several modes of its kernel, so its ratio is the
geometric mean of them over all problems.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from mentor_kernels.head_launches import HeadLaunches, Launch
from mentor_kernels.linear_logprob import Head, chunks, gradient_chunk, new_rows, score_chunk

from bench.measure import CACHE_BYTES, relative_error
from bench.peers import Inputs

ORDER = ("statistics", "jacobian", "gradient", "small_statistics")
"""Fields of HeadLaunches by their worth to a run: a sweep that runs out of time has the first of them."""
GAIN = 0.98
"""A candidate replaces the table's launch below this ratio of their times: less is noise."""
EXACT, ROUNDED = 1e-4, 1e-2
"""Two launches may add in another order; where float32 results, or those rounded to 16 bits, differ by more than this
(relative RMS), one of them is wrong."""
SOME = 61
"""One of so many columns of e is compared."""
Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Trial:
    """One mode of a kernel on one problem."""

    name: str
    run: Callable[[Launch | None], object]
    """The kernel under a launch; None is the table's."""
    said: Callable[[], torch.Tensor]
    """What it found, in memory of its own."""
    prepare: Callable[[], object] = lambda: None
    """What must be there before it runs."""
    same: float = EXACT


@dataclass(frozen=True)
class Result:
    """A candidate's time over the table's, or its problem."""

    launch: Launch
    ratio: float = inf
    problem: str = ""


def trials(inputs: Inputs) -> dict[str, list[Trial]]:
    """The modes of K1 and K3 that a field of HeadLaunches is for, on one chunk of rows. K2 and K3's end count too."""
    plain = Head(inputs.weight_VH, 1.0, None, 1.0)
    part, space = next(chunks(inputs.hidden_NH, plain, True, reference=True))
    _, score_space = next(chunks(inputs.hidden_NH[part], plain, False))
    hidden_RH, targets_R = inputs.hidden_NH[part], inputs.targets_N[part]
    ref_hidden_RH = hidden_RH.roll(1, 1)
    by_logprob_R, by_entropy_R = inputs.grad_logprob_N[part], inputs.grad_entropy_N[part]
    rows, out_RH = new_rows(hidden_RH, reference=True), torch.empty_like(hidden_RH)

    def score(head=plain, where=space, ref_RH=None, launch=None) -> None:
        with torch.cuda.device_of(hidden_RH):
            score_chunk(hidden_RH, targets_R, head, where, rows, ref_RH, launch=launch)

    def scored(where=space, ref_RH=None, **_) -> torch.Tensor:
        found = [rows.logprob_R, rows.entropy_R, *([] if ref_RH is None else [rows.kl_R])]
        return torch.cat([*found, where.e_RV[:, ::SOME].flatten().float()])

    def gradient(*by, launch=None) -> None:
        with torch.cuda.device_of(hidden_RH):
            gradient_chunk(targets_R, plain, space, rows, out_RH, *by, launch=launch)

    def k1(name, same=ROUNDED, **how) -> Trial:
        return Trial(name, lambda launch: score(**how, launch=launch), lambda: scored(**how), same=same)

    def k3(name, *by) -> Trial:
        prepare = partial(score, ref_RH=ref_hidden_RH)
        return Trial(name, lambda launch: gradient(*by, launch=launch), out_RH.clone, prepare, ROUNDED)

    return {
        "statistics": [k1("score", EXACT, where=score_space), k1("store")],
        "small_statistics": [k1("reference", ref_RH=ref_hidden_RH), k1("softcap", head=plain._replace(softcap=30.0))],
        "jacobian": [k3("loss", by_logprob_R)],
        "gradient": [k3("entropy", by_logprob_R, by_entropy_R), k3("kl", by_logprob_R, None, by_entropy_R)],
    }


def compared(trial: Trial, launch: Launch, timer: Timer, repeats: int) -> tuple[float, float]:
    """(difference from what the table's launch says, time over its time); the time is inf where they disagree."""
    trial.prepare()
    trial.run(None)
    wanted = trial.said().double()
    trial.run(launch)
    difference = relative_error(trial.said(), wanted)
    if not difference <= trial.same:
        return difference, inf
    flood = torch.empty(CACHE_BYTES if wanted.is_cuda else 0, dtype=torch.uint8, device=wanted.device)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for ours in (False, True):
            flood.zero_()
            taken[ours].append(timer(lambda ours=ours: trial.run(launch if ours else None)))
    return difference, statistics.median(taken[True]) / statistics.median(taken[False])


def measured(launch: Launch, found: Iterable[Trial], timer: Timer, repeats: int) -> tuple[Result, str]:
    """A candidate in all its trials, and the words for it."""
    ratios, words = [], []
    for trial in found:
        try:
            difference, ratio = compared(trial, launch, timer, repeats)
        except Exception as error:  # the compiler's, the driver's or the memory's; the table says it
            first = (str(error).splitlines() or [""])[0][:120]
            return Result(launch, problem=f"failed: {type(error).__name__}: {first}"), f"{trial.name} failed: {first}"
        if ratio == inf:
            return Result(launch, problem="wrong"), f"{trial.name} is off by {difference:.0e}, so it is not timed"
        ratios.append(ratio)
        words.append(f"{trial.name} {ratio:.2f}" + (f" (off by {difference:.0e})" if difference else " (same bits)"))
    mean = statistics.geometric_mean(ratios)
    return Result(launch, mean), f"{mean:.2f} of the table's time: {', '.join(words)}"


def text(launch: Launch) -> str:
    """As head_launches.py writes it."""
    sizes = ", ".join(map(str, launch.blocks.values()))
    return f"{'k3' if 'BLOCK_V' in launch.blocks else 'k1'}({sizes}, warps={launch.warps}, stages={launch.stages})"


def sweep(
    candidates: dict[str, list[Launch]],
    problems: list[dict[str, list[Trial]]],
    timer: Timer,
    until: float,
    say: Callable[[str], None],
    repeats: int = 7,
) -> dict[str, list[Result]]:
    """Every candidate of every field until the clock (time.monotonic) shows `until`; `say` gets a line for each."""
    found: dict[str, list[Result]] = {}
    for field in ORDER:
        found[field] = []
        for i, launch in enumerate(candidates[field]):
            if time.monotonic() > until:
                say(f"{field}: no time for {len(candidates[field]) - i} of {len(candidates[field])} candidates")
                break
            of_field = (trial for problem in problems for trial in problem[field])
            result, words = measured(launch, of_field, timer, repeats)
            found[field].append(result)
            say(f"{field} {text(launch)}: {words}")
    return found


def chosen(found: dict[str, list[Result]], table: HeadLaunches) -> HeadLaunches:
    """Of each field the fastest candidate that is right, if it gains enough."""
    best = {field: min(results, key=lambda r: r.ratio) for field, results in found.items() if results}
    return table._replace(**{field: r.launch for field, r in best.items() if r.ratio <= GAIN})


def lines(found: dict[str, list[Result]], table: HeadLaunches, capability: tuple[int, int], about: dict) -> str:
    """The entry for LAUNCHES in head_launches.py: what was chosen, and on which machine."""
    entry = chosen(found, table)
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton"))
    out = [f"    {capability}: HeadLaunches(  # {about['device']}, {versions}, {about['date']}, {about['commit']}"]
    for field in HeadLaunches._fields:
        launch, before = getattr(entry, field), getattr(table, field)
        right = [r for r in found.get(field, []) if not r.problem]
        why = f"stays: none of {len(right)} gains {1 - GAIN:.0%}" if right else "not measured"
        if launch is not before:
            ratio = min(r.ratio for r in right)
            why = f"{ratio:.2f} of the time of {text(before)}"
        out.append(f"        {field}={text(launch)},  # {why}")
    return "\n".join([*out, "    ),"])
