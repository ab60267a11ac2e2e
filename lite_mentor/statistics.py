"""The statistics of an evaluation: intervals, comparisons on the same examples, and how tools were used.

Pure functions of counts and rollouts. A share of nothing is None, never 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lite_mentor.types import CALL_STATUSES, Rollout

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
DRAWS = 10_000
"""Resamples of a bootstrap."""


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). Unlike mean +- 1.96 s, it is honest at 0, at n and for small n."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the exact bound is 0 or 1; rounding must not push it past the share itself.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """(difference of accuracy, low, high) of two evaluations of the same examples; None when they are not the same.

    Neither are those that were asked otherwise, had other tools or were judged by another judge.
    """
    same = before["keys"] == after["keys"] and before.get("facts") == after.get("facts")
    if not same or not before["correct"]:
        return None
    return paired_bootstrap(before["correct"], after["correct"])


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c correct: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374, in exact integers.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples with {c} correct")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def bootstrap_mean(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over examples, each of which gave one value."""
    if not values:
        raise ValueError("no values have no mean")
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(np.asarray(values, dtype=float)[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def jsd_similarity(names_a: Mapping[str, int], names_b: Mapping[str, int]) -> float | None:
    """1 - the Jensen-Shannon divergence in bits of two count tables: 1 is the same mix, 0 has nothing in common.

    None when either side has no counts.
    """
    total_a, total_b = sum(names_a.values()), sum(names_b.values())
    if total_a == 0 or total_b == 0:
        return None
    divergence = 0.0
    for name in sorted({*names_a, *names_b}):
        a, b = names_a.get(name, 0) / total_a, names_b.get(name, 0) / total_b
        middle = (a + b) / 2
        divergence += sum(p * math.log2(p / middle) for p in (a, b) if p > 0) / 2
    return min(1.0, max(0.0, 1.0 - divergence))


def paired_bootstrap(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> tuple[float, float, float]:
    """Mean of b - a over the same examples, with its 95 % percentile bootstrap interval: (difference, low, high).

    A pair's difference is -1, 0 or 1, so the sum over a resample of n pairs is multinomial: it is drawn directly,
    which is the same distribution as drawing n indices, without n x DRAWS numbers.
    """
    if len(correct_a) != len(correct_b) or not correct_a:
        raise ValueError(f"{len(correct_a)} and {len(correct_b)} results cannot be paired")
    pairs = Counter(bool(b) - bool(a) for a, b in zip(correct_a, correct_b, strict=True))
    n = len(correct_a)
    shares = [pairs[-1] / n, pairs[0] / n, pairs[1] / n]
    counts = np.random.default_rng(0).multinomial(n, shares, size=DRAWS)
    means = (counts[:, 2] - counts[:, 0]) / n
    low, high = np.quantile(means, [0.025, 0.975])
    return (pairs[1] - pairs[-1]) / n, float(low), float(high)


def tool_statistics(rollouts: Sequence[Rollout], teacher_names: Mapping[str, int] | None) -> dict[str, float | None]:
    """How a set of episodes used tools.

    calls/per_episode, calls/share_with_call, calls/<status> (share of all calls), tool/<name> (share of the calls
    that named an offered tool in well-formed JSON), tools/teacher_similarity (1 - JSD of that mix to the teacher's),
    answered, truncated (the episode was cut off), tokens/mean_sampled.
    """
    n = len(rollouts)
    calls = [call for rollout in rollouts for call in rollout.calls]
    statuses = Counter(call.status for call in calls)
    # What a student invents as a name is hostile text: it counts as unknown_tool and never becomes a key.
    names = Counter(call.name for call in calls if call.status not in ("unknown_tool", "bad_json"))

    def share(count: float, total: int) -> float | None:
        return count / total if total else None

    return {
        "calls/per_episode": share(len(calls), n),
        "calls/share_with_call": share(sum(bool(r.calls) for r in rollouts), n),
        **{f"calls/{status}": share(statuses[status], len(calls)) for status in CALL_STATUSES},
        **{f"tool/{name}": share(names[name], names.total()) for name in sorted(names)},
        "tools/teacher_similarity": jsd_similarity(names, teacher_names or {}),
        "answered": share(sum(bool(r.answer and r.answer.strip()) for r in rollouts), n),
        "truncated": share(sum(not r.finished for r in rollouts), n),
        "tokens/mean_sampled": share(sum(int(r.sampled.sum()) for r in rollouts), n),
    }
