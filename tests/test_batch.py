"""Packing, on rollouts small enough to write the packed row down by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_mentor.batch import pack
from lite_mentor.types import Rollout


def rollout(prompt: list[int], tail: list[tuple[int, int]], group: int = 0, index: int = 0) -> Rollout:
    """`tail` lists (token, was it sampled?)."""
    ids = prompt + [token for token, _ in tail]
    sampled = [False] * len(prompt) + [bool(s) for _, s in tail]
    return Rollout(
        example_key=str(group), group=group, index=index, ids=torch.tensor(ids), sampled=torch.tensor(sampled),
        behaviour_logp=-torch.tensor(ids, dtype=torch.float32) / 100, prompt_length=len(prompt), calls=(), turns=1,
        answer=None, stop="eos",
    )  # fmt: skip


def test_one_row_by_hand():
    rows = pack(
        [
            rollout([1, 2, 3], [(10, 1), (11, 1), (90, 0), (12, 1)]),  # a tool result, 90, between sampled tokens
            rollout([1, 2, 3], [(20, 1), (21, 1)], index=1),
            rollout([1, 2, 4, 5], [(30, 1)], group=1),
        ],
        [0.5, -0.5, 2.0],
        100,
    )
    assert len(rows) == 1
    row = rows[0]
    #                         shared |  3 | first rollout | second | 4  5
    assert row.ids_T.tolist() == [1, 2, 3, 10, 11, 90, 20, 4, 5]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 3, 2, 3]
    assert row.segment_starts == (0, 2, 3, 6, 7)
    assert row.segment_parents == (-1, 0, 1, 1, 0)
    # 10 and 20 follow the prompt's last token (row 2); 12 follows the tool's 90; 30 follows 5.
    assert row.row_index_N.tolist() == [2, 3, 5, 2, 6, 8]
    assert row.targets_N.tolist() == [10, 11, 12, 20, 21, 30]
    assert row.advantage_N.tolist() == [0.5, 0.5, 0.5, -0.5, -0.5, 2.0]
    assert row.sequence_N.tolist() == [0, 0, 0, 1, 1, 2]
    assert torch.allclose(row.behaviour_logp_N, -row.targets_N / 100)
    assert (row.global_tokens, row.global_sequences) == (6, 3)


def test_a_prompt_that_is_itself_the_shared_prefix():
    row = pack([rollout([7, 8], [(1, 1), (2, 1)]), rollout([7, 8], [(3, 1)], index=1)], [1.0, 1.0], 50)[0]
    assert row.ids_T.tolist() == [7, 8, 1]
    assert row.segment_parents == (-1, 0)
    assert row.row_index_N.tolist() == [1, 2, 1]


def test_the_rows_of_a_step_keep_their_budget_and_share_its_counts():
    rollouts = [rollout([1, 2, 3], [(10 + i, 1), (20 + i, 1), (30 + i, 1)], index=i) for i in range(3)]
    rows = pack(rollouts, [1.0] * 3, 7)
    assert [len(row.ids_T) for row in rows] == [3 + 2 + 2, 3 + 2]
    assert [(row.global_tokens, row.global_sequences) for row in rows] == [(9, 3)] * 2


def test_rollouts_without_a_sampled_token_are_left_out_of_the_counts():
    rows = pack([rollout([1], []), rollout([1], [(2, 1)], index=1)], [9.0, 1.0], 50)
    assert rows[0].sequence_N.tolist() == [1]
    assert rows[0].global_sequences == 1


def test_nothing_to_pack():
    assert pack([], [], 10) == []


def test_a_rollout_over_the_budget_is_an_error():
    with pytest.raises(ValueError, match="exceeds the row budget of 3"):
        pack([rollout([1, 2, 3], [(4, 1), (5, 1)])], [1.0], 3)


groups = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=6),
        st.lists(st.lists(st.tuples(st.integers(4, 9), st.integers(0, 1)), max_size=6), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200)
@given(groups, st.integers(12, 60))
def test_every_sampled_token_appears_once_after_its_own_past(groups, budget):
    rollouts = [
        rollout(prompt, tail, group=g, index=i)
        for g, (prompt, tails) in enumerate(groups)
        for i, tail in enumerate(tails)
    ]
    rows = pack(rollouts, [0.0] * len(rollouts), budget)
    found = []
    for row in rows:
        assert len(row.ids_T) <= budget
        starts = [*row.segment_starts, len(row.ids_T)]
        columns = (row.row_index_N.tolist(), row.targets_N.tolist(), row.sequence_N.tolist())
        for at, target, sequence in zip(*columns, strict=True):
            path, segment = [], max(s for s in range(len(starts) - 1) if starts[s] <= at)
            end = at + 1
            while segment >= 0:
                path = row.ids_T[starts[segment] : end].tolist() + path
                segment = row.segment_parents[segment]
                end = starts[segment + 1]
            found.append((sequence, (*path, target)))
            assert row.positions_T[at] == len(path) - 1
    expected = [
        (i, tuple(r.ids[: t + 1].tolist())) for i, r in enumerate(rollouts) for t in r.sampled.nonzero()[:, 0].tolist()
    ]
    assert sorted(found) == sorted(expected)
    assert all(row.global_tokens == len(expected) for row in rows)
