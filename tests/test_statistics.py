"""Literal values from hand computation and from published tables; properties where no value is privileged."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_mentor.statistics import bootstrap_mean, jsd_similarity, paired_bootstrap, pass_at_k, tool_statistics, wilson
from lite_mentor.types import Rollout, ToolCall

COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 50))


def rollout(*calls: tuple[str, str], answer: str | None = "7", stop: str = "answer", sampled: int = 3) -> Rollout:
    mask = torch.tensor([False, False] + [True] * sampled)
    return Rollout(
        example_key="k", group=0, index=0, ids=torch.arange(len(mask)), sampled=mask,
        behaviour_logp=torch.zeros(len(mask)), prompt_length=2,
        calls=tuple(ToolCall(name, {}, "", status, "") for name, status in calls),
        turns=1, answer=answer, stop=stop,
    )  # fmt: skip


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (1, 0)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),  # Newcombe 1998, table I, method 3 and the same by hand
        (1, 29, 0.0061, 0.1718),
        (15, 148, 0.0624, 0.1605),
        (81, 263, 0.2553, 0.3662),
        (10, 10, 0.7225, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_published_values(successes, n, low, high):
    assert wilson(successes, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(case):
    successes, n = case
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    assert wilson(n - successes, n) == (pytest.approx(1 - high), pytest.approx(1 - low))


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(n, c, k)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(case):
    n, c, k = case
    subsets = list(itertools.combinations(range(n), k))
    expected = sum(any(i < c for i in subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_at_sizes_where_binomials_overflow_floats():
    assert pass_at_k(4000, 1, 2000) == pytest.approx(0.5)


def test_jsd_similarity_by_hand():
    assert jsd_similarity({}, {"a": 1}) is None
    assert jsd_similarity({"a": 0}, {"a": 1}) is None
    assert jsd_similarity({"a": 2, "b": 6}, {"a": 1, "b": 3}) == 1.0
    assert jsd_similarity({"a": 5}, {"b": 2}) == 0.0
    # P = (1, 0), Q = (1/2, 1/2), M = (3/4, 1/4): JSD = [log2(4/3) + log2(2/3)/2 + log2(2)/2] / 2
    expected = 1 - (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5) / 2
    assert jsd_similarity({"a": 3}, {"a": 1, "b": 1}) == pytest.approx(expected)
    assert expected == pytest.approx(0.688722, abs=1e-6)


@given(COUNTS, COUNTS)
def test_jsd_similarity_is_symmetric_and_bounded(a, b):
    ab, ba = jsd_similarity(a, b), jsd_similarity(b, a)
    assert (ab is None) == (ba is None) == (sum(a.values()) == 0 or sum(b.values()) == 0)
    if ab is not None:
        assert ab == pytest.approx(ba)
        assert 0 <= ab <= 1


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_paired_bootstrap_refuses_what_cannot_be_paired(a, b):
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap(a, b)


def test_paired_bootstrap_values():
    assert paired_bootstrap([0, 1, 0, 1], [0, 1, 0, 1]) == (0.0, 0.0, 0.0)
    assert paired_bootstrap([0] * 5, [1] * 5) == (1.0, 1.0, 1.0)
    a, b = [0] * 60 + [1] * 40, [1] * 20 + [0] * 40 + [1] * 30 + [0] * 10
    difference, low, high = paired_bootstrap(a, b)
    # 20 gained, 10 lost of 100: mean 0.1, standard error sqrt(0.3 - 0.01) / 10 = 0.0539.
    assert difference == pytest.approx(0.1)
    assert (low, high) == (pytest.approx(0.1 - 1.96 * 0.0539, abs=0.011), pytest.approx(0.1 + 1.96 * 0.0539, abs=0.011))
    assert paired_bootstrap(a, b) == (difference, low, high)
    assert paired_bootstrap(b, a)[0] == pytest.approx(-0.1)


def test_tool_statistics_of_nothing_is_unmeasured():
    stats = tool_statistics([], None)
    assert set(stats.values()) == {None}


def test_tool_statistics_without_calls():
    stats = tool_statistics([rollout(answer=None, stop="eos", sampled=0)], {"add": 1})
    assert stats["calls/per_episode"] == 0
    assert stats["calls/share_with_call"] == 0
    assert stats["calls/ok"] is None
    assert stats["tools/teacher_similarity"] is None
    assert stats["answered"] == 0
    assert stats["truncated"] == 0
    assert stats["tokens/mean_sampled"] == 0


def test_tool_statistics_by_hand():
    stats = tool_statistics(
        [
            rollout(("add", "ok"), ("add", "ok"), ("abs", "bad_arguments"), ("<script>", "unknown_tool"), sampled=5),
            rollout(("", "bad_json"), answer=" ", stop="max_turns", sampled=2),
            rollout(),
            rollout(stop="context_full", answer=None, sampled=0),
        ],
        {"add": 4, "abs": 2},
    )
    assert stats == {
        "calls/per_episode": 1.25, "calls/share_with_call": 0.5,
        "calls/ok": 0.4, "calls/unknown_tool": 0.2, "calls/bad_json": 0.2, "calls/bad_arguments": 0.2,
        "calls/error": 0.0, "calls/timeout": 0.0,
        "tool/abs": pytest.approx(1 / 3), "tool/add": pytest.approx(2 / 3), "tools/teacher_similarity": 1.0,
        "answered": 0.5, "truncated": 0.5, "tokens/mean_sampled": 2.5,
    }  # fmt: skip


def test_the_interval_of_a_mean_over_examples():
    assert bootstrap_mean([0.5] * 10) == (0.5, 0.5)
    low, high = bootstrap_mean([0.0, 1.0] * 200)  # 0.5 -+ 1.96 * 0.5 / 20
    assert low == pytest.approx(0.451, abs=0.006)
    assert high == pytest.approx(0.549, abs=0.006)
    with pytest.raises(ValueError, match="no values"):
        bootstrap_mean([])
