"""Rewards and advantages on the torch backend: both tables row by row, hand-worked numbers, plain Python, garbage."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import cycle
from typing import get_args

import pytest
import torch
from advantage_checks import Episode, advantage_inputs, check_advantage, random_episodes
from hypothesis import given, settings
from hypothesis import strategies as st
from mentor_kernels import STANDARD_TERMS, RewardConfig, group_advantage
from mentor_kernels.group_advantage import Advantage, Reward, _forward_triton, _group_advantage, _popcount

MODULE = sys.modules["mentor_kernels.group_advantage"]
REWARDS, ADVANTAGES = get_args(Reward), get_args(Advantage)
RIGHT, WRONG = Episode(), Episode(correct=0.0)
NO_TOOLS = dict(student=frozenset(), calls=0, ok=0)
SILENT_TEACHER = dict(teacher=frozenset(), teacher_calls=0)
OTHER_TOOL = dict(student=frozenset({5}), calls=1, ok=1)
ONE_OF_TWO = dict(student=frozenset({1}), calls=1, ok=1)  # F1 = 2/3; half the calls


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernels run: on the GPU, or interpreted


def score(*episodes: Episode, reward: str = "mentor", advantage: str = "grpo", words: int = 1):
    """What the torch backend says, and the kernels too."""
    config = RewardConfig(reward, advantage)
    out = group_advantage(**advantage_inputs(episodes, words), config=config)
    kernels = group_advantage(**advantage_inputs(episodes, words, DEVICE), config=config, backend="triton")
    for found, expected in zip(kernels[:2], out[:2], strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(kernels.zero_variance_G.cpu(), out.zero_variance_G)
    return out


# The table of the released reward, row by row.
@pytest.mark.parametrize(
    ("episode", "reward"),
    [
        (RIGHT, 1.10),
        (replace(RIGHT, invalid=1), 1.00),
        (replace(RIGHT, **OTHER_TOOL), 0.80),
        (replace(RIGHT, **ONE_OF_TWO), 0.80),
        (replace(RIGHT, **NO_TOOLS), 0.80),
        (replace(RIGHT, **OTHER_TOOL, invalid=2), 0.70),
        (WRONG, 0.16),
        (replace(WRONG, **OTHER_TOOL), 0.10),
        (replace(WRONG, **NO_TOOLS), 0.10),
        (replace(WRONG, invalid=1), 0.06),
        (replace(WRONG, **OTHER_TOOL, invalid=1), 0.00),
        (replace(WRONG, answered=False), 0.10),
        (replace(WRONG, answered=False, **OTHER_TOOL, invalid=3), 0.10),
        (replace(WRONG, finished=False), 0.00),
        (replace(WRONG, finished=False, answered=False), 0.00),
        # A teacher without tools is not matched by a student without tools.
        (replace(RIGHT, teacher=frozenset(), **NO_TOOLS), 0.80),
    ],
)
def test_the_table_of_the_main_reward(episode, reward):
    assert score(episode).reward_B.item() == pytest.approx(reward, abs=1e-6)


# The table of the presets: right and wrong answer, with full, partial and no agreement, with and without a bad call.
@pytest.mark.parametrize(
    ("preset", "change", "right", "wrong"),
    [
        ("mentor", {}, 1.1, 0.16),
        ("mentor", ONE_OF_TWO, 0.8, 0.1),
        ("mentor_f1", {}, 1.1, 0.16),
        ("mentor_f1", ONE_OF_TWO, 0.7 + 0.3 * 2 / 3 + 0.1, 0.06 * 2 / 3 + 0.1),
        ("mentor_f1", {**ONE_OF_TWO, "invalid": 1}, 0.7 + 0.3 * 2 / 3, 0.06 * 2 / 3),
        ("mentor_f1", NO_TOOLS, 0.8, 0.1),
        ("mentor_overlap", ONE_OF_TWO, 1.0, 0.06),
        ("mentor_overlap", OTHER_TOOL, 0.7, 0.0),
        ("mentor_overlap", {"invalid": 1}, 1.0, 0.06),
        ("no_align", {}, 0.8, 0.1),
        ("no_align", {**OTHER_TOOL, "invalid": 1}, 0.7, 0.0),
        ("sparse", {}, 1.0, 0.1),
        ("sparse", {**OTHER_TOOL, "invalid": 1}, 1.0, 0.1),
        ("strict", {"process": 3.5}, 3.5, 3.5),
        ("strict", {"process": -3.0}, -3.0, -3.0),
        ("flex", {}, 1.0, 0.14),
        # F1 = 2/3, times 1 - 1/2/2 for one call where the teacher made two.
        ("flex", ONE_OF_TWO, 0.7 + 0.2 * 2 / 3 * 3 / 4 + 0.1, 0.04 * 2 / 3 * 3 / 4 + 0.1),
        # A loop of 8 calls, 6 of them good, over the right tools: align 1 - 6/8/2, valid 6/8.
        ("flex", dict(calls=8, ok=6), 0.7 + 0.2 * 0.625 + 0.075, 0.04 * 0.625 + 0.075),
        ("flex", NO_TOOLS, 0.7, 0.0),
        ("flex", {**NO_TOOLS, **SILENT_TEACHER}, 1.0, 0.14),
        ("flex", SILENT_TEACHER, 0.8, 0.1),  # two calls for nothing
        ("flex", {**SILENT_TEACHER, "student": frozenset(), "calls": 1, "ok": 0}, 0.8, 0.02),  # and one malformed
        ("flex", {**NO_TOOLS, "teacher": frozenset()}, 0.7, 0.0),  # the teacher's tools are not offered
        ("flex", dict(student=frozenset(), calls=3, ok=0), 0.7, 0.0),
    ],
)
def test_the_table_of_presets(preset, change, right, wrong):
    out = score(replace(RIGHT, **change), replace(WRONG, **change), reward=preset)
    assert out.reward_B.tolist() == pytest.approx([right, wrong], abs=1e-6)


@pytest.mark.parametrize("preset", REWARDS)
def test_the_gates_hold_for_every_preset(preset):
    best = replace(RIGHT, process=4.0)
    out = score(replace(best, finished=False), replace(best, answered=False), reward=preset)
    assert out.reward_B.tolist() == pytest.approx([0.0, 0.1], abs=1e-7)


def test_terms_are_what_was_measured():
    out = score(
        replace(RIGHT, **ONE_OF_TWO, finished=False), replace(WRONG, invalid=1, process=2.5), reward="mentor_f1"
    )
    terms = {name: values.tolist() for name, values in out.terms.items()}
    assert terms["align"] == pytest.approx([2 / 3, 1.0])
    assert (terms["correct"], terms["valid"], terms["process"]) == ([1.0, 0.0], [1.0, 0.0], [0.0, 2.5])
    assert tuple(terms) == (*STANDARD_TERMS, "process")
    inputs = advantage_inputs([RIGHT])
    del inputs["process_B"]
    assert tuple(group_advantage(**inputs, config=RewardConfig()).terms) == STANDARD_TERMS


# Two groups: rewards 1.1, 0.8, 0.1 (mean 2/3, std 0.5131601) and 0.7, 0.0 (mean 0.35, std 0.4949747).
GROUPS = [
    replace(RIGHT, group=1, **OTHER_TOOL, invalid=1),
    RIGHT,
    replace(RIGHT, **OTHER_TOOL),
    replace(WRONG, group=1, finished=False),
    replace(WRONG, **OTHER_TOOL),
]


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("grpo", [0.7071054, 0.8444391, 0.2598274, -0.7071054, -1.1042665]),
        ("dr_grpo", [0.35, 0.4333333, 0.1333333, -0.35, -0.5666667]),
        # std of 0.7, 1.1, 0.8, 0, 0.1: sqrt(0.892 / 4) = 0.4722288
        ("batch", [0.7411646, 0.9176324, 0.2823484, -0.7411646, -1.1999809]),
    ],
)
def test_advantages_by_hand(advantage, expected):
    out = score(*GROUPS, advantage=advantage)
    assert out.reward_B.tolist() == pytest.approx([0.7, 1.1, 0.8, 0.0, 0.1], abs=1e-6)
    assert out.advantage_B.tolist() == pytest.approx(expected, abs=5e-6)
    assert out.zero_variance_G.tolist() == [False, False]


def test_gdpo_by_hand():
    # A group of two: every term that differs becomes +-1/sqrt(2), so the rollouts get +-(0.7 + 0.3) / sqrt(2), and the
    # batch makes that +-1/sqrt(2) again. Three rollouts tell the terms apart.
    pair = score(RIGHT, replace(WRONG, **OTHER_TOOL), advantage="gdpo")
    assert pair.advantage_B.tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)], abs=1e-5)
    three = score(RIGHT, replace(RIGHT, **OTHER_TOOL), replace(WRONG, **OTHER_TOOL), advantage="gdpo")
    # correct 1, 1, 0 -> r, r, -2r with r = 1/sqrt(3); align 1, 0, 0 -> 2r, -r, -r; valid is constant.
    r = 1 / math.sqrt(3)
    raw = [0.7 * r + 0.3 * 2 * r, 0.7 * r - 0.3 * r, -0.7 * 2 * r - 0.3 * r]
    std = math.sqrt(sum(x * x for x in raw) / 2)
    assert three.advantage_B.tolist() == pytest.approx([x / std for x in raw], abs=1e-5)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_a_group_without_variance_is_exactly_silent(advantage, size):
    # The float32 mean of ten rewards of 0.8 is not 0.8.
    flat = [replace(RIGHT, **OTHER_TOOL)] * size
    out = score(*flat, *(replace(e, group=1) for e in (RIGHT, WRONG)), advantage=advantage)
    assert out.zero_variance_G.tolist() == [True, False]
    assert out.advantage_B[:size].tolist() == [0.0] * size
    assert out.advantage_B[size] > 0 > out.advantage_B[size + 1]


def test_a_tiny_difference_is_a_variance():
    flat = [replace(RIGHT, process=1.0)] * 3
    out = score(*flat, replace(RIGHT, process=1.0 + 2**-22), reward="strict")
    assert out.zero_variance_G.tolist() == [False]


def test_gdpo_looks_at_the_terms_that_pay():
    # 0.1 for a wrong answer with valid calls, and 0.1 without an answer: the same terms.
    same = score(replace(WRONG, **OTHER_TOOL), replace(WRONG, answered=False), advantage="gdpo")
    assert same.zero_variance_G.tolist() == [True]
    # The tools differ, but `no_align` pays nothing for alignment.
    paid = score(WRONG, replace(WRONG, **OTHER_TOOL), reward="no_align", advantage="gdpo")
    assert paid.zero_variance_G.tolist() == [True]
    assert paid.advantage_B.tolist() == [0.0, 0.0]


def test_equal_rewards_of_different_terms_are_a_variance_to_gdpo_alone():
    # 0.7 + 0.2 * 1/2 + 0: one of the teacher's three tools, called three times in vain; and 0.7 + 0 + 0.1.
    three = dict(calls=3, teacher=frozenset({0, 1, 2}), teacher_calls=3)
    pair = replace(RIGHT, student=frozenset({0}), ok=0, **three), replace(RIGHT, student=frozenset({5}), ok=3, **three)
    out = score(*pair, reward="flex", advantage="gdpo")
    assert out.reward_B[0] == out.reward_B[1]
    assert out.zero_variance_G.tolist() == [False]
    assert out.advantage_B.tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)], abs=1e-4)
    assert score(*pair, reward="flex", advantage="grpo").zero_variance_G.tolist() == [True]


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_what_could_not_be_scored_leaves_the_group(advantage):
    lost = replace(RIGHT, correct=math.nan)
    out = score(RIGHT, lost, WRONG, advantage=advantage)
    alone = score(RIGHT, WRONG, advantage=advantage)
    assert math.isnan(out.reward_B[1].item())
    assert out.advantage_B[1].item() == 0.0
    assert out.advantage_B[[0, 2]].tolist() == pytest.approx(alone.advantage_B.tolist(), abs=1e-6)
    assert out.terms["correct"].isnan().tolist() == [False, True, False]
    only_one = score(RIGHT, lost, replace(lost, finished=False), advantage=advantage)
    assert only_one.zero_variance_G.tolist() == [True]
    assert only_one.advantage_B.tolist() == [0.0] * 3
    assert only_one.reward_B.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_group_of_one_and_a_step_of_none(advantage):
    out = score(RIGHT, replace(WRONG, group=1), advantage=advantage)
    assert out.advantage_B.tolist() == [0.0, 0.0]
    assert out.zero_variance_G.tolist() == [True, True]
    empty = score(advantage=advantage)
    assert empty.reward_B.shape == empty.advantage_B.shape == empty.zero_variance_G.shape == (0,)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("reward", REWARDS)
def test_against_plain_python(reward, advantage):
    for seed in range(3):
        check_advantage(group_advantage, random_episodes(seed), RewardConfig(reward, advantage))
    check_advantage(group_advantage, random_episodes(3, tools=130), RewardConfig(reward, advantage), words=3)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    reward=st.sampled_from(REWARDS),
    advantage=st.sampled_from(ADVANTAGES),
    order=st.randoms(use_true_random=False),
)
def test_properties(seed, reward, advantage, order):
    episodes = random_episodes(seed, groups=5)
    out = score(*episodes, reward=reward, advantage=advantage)
    check_advantage(group_advantage, episodes, RewardConfig(reward, advantage))
    rows = list(range(len(episodes)))
    order.shuffle(rows)
    shuffled = score(*(episodes[i] for i in rows), reward=reward, advantage=advantage)
    torch.testing.assert_close(shuffled.advantage_B, out.advantage_B[rows], rtol=1e-4, atol=1e-5)
    assert torch.equal(shuffled.zero_variance_G, out.zero_variance_G)
    low, high = (-3.0, 4.0) if reward == "strict" else (0.0, 1.1)
    scored = out.reward_B[~out.reward_B.isnan()]
    assert bool(((scored >= low - 1e-6) & (scored <= high + 1e-6)).all())
    if advantage != "gdpo":
        sums = torch.zeros(5).index_add_(0, torch.tensor([e.group for e in episodes]), out.advantage_B)
        assert float(sums.abs().max()) < 1e-4


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_popcount(words):
    assert _popcount(torch.tensor(words)).tolist() == [(word & (2**64 - 1)).bit_count() for word in words]


def test_a_set_that_differs_in_the_last_word_or_the_sign_bit():
    for tool in (63, 64, 127, 129):
        near = replace(RIGHT, student=frozenset({0, 1, tool}))
        out = score(near, replace(near, teacher=near.student), words=3)
        assert out.terms["align"].tolist() == [0.0, 1.0]


def test_masks_may_be_one_dimensional_and_flags_of_any_type():
    inputs = advantage_inputs([RIGHT, replace(WRONG, **OTHER_TOOL)])
    expected = group_advantage(**inputs, config=RewardConfig())
    for name in ("teacher_tools_B", "student_tools_B"):
        inputs[name] = inputs[name][:, 0]
    for name in ("correct_B", "finished_B", "answered_B"):
        inputs[name] = inputs[name].bool() if name == "correct_B" else inputs[name].float()
    found = group_advantage(**inputs, config=RewardConfig())
    assert torch.equal(found.reward_B, expected.reward_B)
    assert torch.equal(found.advantage_B, expected.advantage_B)


triton_advantage = partial(group_advantage, backend="triton")


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("reward", REWARDS)
def test_kernels_against_plain_python(kernel_device, reward, advantage):
    check_advantage(triton_advantage, random_episodes(0), RewardConfig(reward, advantage), device=kernel_device)


@pytest.mark.parametrize(("reward", "advantage"), zip(REWARDS, cycle(ADVANTAGES)))
def test_kernels_with_more_rollouts_than_a_block_holds(kernel_device, reward, advantage, monkeypatch):
    many = random_episodes(3, groups=5, tools=130)
    monkeypatch.setattr(MODULE, "BLOCK", 16)
    check_advantage(triton_advantage, many, RewardConfig(reward, advantage), words=3, device=kernel_device)


def test_kernels_are_told_the_number_of_groups(kernel_device):
    episodes = [RIGHT, WRONG, replace(RIGHT, group=2), replace(WRONG, group=2)]
    inputs = advantage_inputs(episodes, device=kernel_device)
    for groups, silent in ((None, 3), (3, 3), (5, 5)):
        out = triton_advantage(**inputs, config=RewardConfig(), groups=groups)
        assert out.zero_variance_G.tolist() == [False, True, False, True, True][:silent]
        assert out.advantage_B.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)] * 2, abs=1e-5)
    if kernel_device == "cpu":
        with pytest.raises(ValueError, match="group 2, but there are 2"):
            triton_advantage(**inputs, config=RewardConfig(), groups=2)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("stray", [2, 2**40, -1, -(2**40)])
def test_kernels_leave_a_group_that_they_were_not_told_of_nan(kernel_device, advantage, stray):
    episodes = [RIGHT, WRONG, replace(RIGHT, group=stray), replace(WRONG, group=stray)]
    inputs = advantage_inputs(episodes, device=kernel_device)
    columns = {name: inputs[name] for name in ("correct_B", "finished_B", "answered_B", "invalid_calls_B", "group_B")}
    found = _forward_triton(
        inputs["teacher_tools_B"], inputs["student_tools_B"], *columns.values(), None,
        torch.zeros(3, 4, device=kernel_device), 2, RewardConfig("mentor", advantage),
    )  # fmt: skip
    assert all(x[..., :2].isfinite().all() and x[..., 2:].isnan().all() for x in found[:3])


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_kernels_give_the_same_bits_again_and_in_any_order(kernel_device, advantage):
    episodes = random_episodes(1, groups=9)
    config = RewardConfig("flex", advantage)
    first = triton_advantage(**advantage_inputs(episodes, device=kernel_device), config=config)
    again = triton_advantage(**advantage_inputs(episodes, device=kernel_device), config=config)
    assert torch.equal(first.advantage_B, again.advantage_B)
    back = triton_advantage(**advantage_inputs(episodes[::-1], device=kernel_device), config=config)
    torch.testing.assert_close(back.advantage_B.flip(0), first.advantage_B, rtol=1e-5, atol=1e-6)


# Rewards are compared for equality, so equal measurements must be equal numbers, and the same ones everywhere.


def whole_shares(most: int = 64) -> list[Episode]:
    """Every share of calls that worked, of up to `most` calls: valid is ok / calls under flex."""
    return [replace(RIGHT, calls=n, ok=ok, teacher_calls=n) for n in range(1, most + 1) for ok in range(n + 1)]


def whole_overlaps(most: int = 64) -> list[Episode]:
    """Tools 0 .. a - 1 against 0 .. b - 1, one of them all or odd: align is 2 min(a, b) / (a + b) under mentor_f1."""
    sizes = [(a, b) for a in range(1, most + 1) for b in {a, most, most - 1, most // 2 + 1, 3}]
    return [replace(RIGHT, teacher=frozenset(range(a)), student=frozenset(range(b))) for a, b in sizes]


def both_backends(episodes: list[Episode], device: str, reward: str):
    config = RewardConfig(reward, "gdpo")
    yield group_advantage(**advantage_inputs(episodes), config=config, backend="torch")
    yield group_advantage(**advantage_inputs(episodes, device=device), config=config, backend="triton")
    if device != "cpu":
        yield group_advantage(**advantage_inputs(episodes, device=device), config=config, backend="torch")


@pytest.mark.parametrize("term", ["valid", "align"])
def test_equal_fractions_are_equal_numbers_and_n_of_n_is_1(kernel_device, term):
    episodes, reward = (whole_shares(), "flex") if term == "valid" else (whole_overlaps(), "mentor_f1")
    if term == "valid":
        exact = [Fraction(e.ok, e.calls) for e in episodes]
    else:
        exact = [Fraction(2 * min(len(e.teacher), len(e.student)), len(e.teacher) + len(e.student)) for e in episodes]
    assert exact.count(1) >= 64
    for out in both_backends(episodes, kernel_device, reward):
        found = out.terms[term].tolist()
        # A float64 quotient of such small numbers, rounded to float32, is the exact one rounded once.
        assert found == torch.tensor([float(x) for x in exact]).tolist()
        assert all((value == 1) == (x == 1) for value, x in zip(found, exact, strict=True))


@pytest.mark.parametrize("reward", ["flex", "mentor_f1"])
def test_every_backend_has_the_same_bits_of_terms_and_rewards(kernel_device, reward):
    episodes = [
        Episode(
            correct=correct, student=frozenset(range(student)), teacher=frozenset(range(teacher)),
            calls=student + more, teacher_calls=teacher, ok=max(student + more - bad, 0), invalid=bad,
        )
        for correct in (0.0, 1.0) for student in range(6) for teacher in range(6) for more in range(5) for bad in (0, 2)
    ]  # fmt: skip
    first, *others = both_backends(episodes, kernel_device, reward)
    for other in others:
        assert torch.equal(first.reward_B, other.reward_B.cpu())
        for name, values in first.terms.items():
            assert torch.equal(values, other.terms[name].cpu()), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_equal_rewards_have_no_deviation_at_any_group_size(kernel_device, advantage, backend):
    """The float32 mean of n equal numbers is often another one, and the deviation from it would look like a signal."""
    make = torch.Generator().manual_seed(0)
    sizes = [*range(2, 65), 100] * 4 if backend == "torch" else [2, 3, 5, 6, 7, 9, 10, 11, 13, 24, 37, 64]
    pairs = list(zip((torch.rand(len(sizes), generator=make) * 7 - 3).tolist(), sizes, strict=True))
    assert any(float(torch.full((n,), value).mean()) != value for value, n in pairs)
    episodes = [replace(RIGHT, process=value, group=g) for g, (value, n) in enumerate(pairs) for _ in range(n)]
    spread = [replace(RIGHT, process=value, group=len(pairs)) for value in (0.25, 0.5)]
    inputs = advantage_inputs([*episodes, *spread], device=kernel_device)
    out = group_advantage(**inputs, config=RewardConfig("strict", advantage), backend=backend)
    assert out.zero_variance_G.tolist() == [True] * len(pairs) + [False]
    assert not out.advantage_B[: len(episodes)].any()
    assert out.advantage_B[len(episodes) :].all()


@pytest.mark.parametrize("reward", ["flex", "mentor_f1"])
def test_a_perfect_group_is_silent_however_it_got_there(kernel_device, reward):
    """gdpo compares each term: n / n of calls and of tools must be 1 for every n in the same group."""
    perfect = [
        replace(RIGHT, teacher=frozenset(range(n)), student=frozenset(range(n)), calls=n, teacher_calls=n, ok=n)
        for n in range(1, 65)
    ]
    for out in both_backends([*perfect, replace(WRONG, group=1), replace(RIGHT, group=1)], kernel_device, reward):
        assert out.zero_variance_G.tolist() == [True, False]
        assert not out.advantage_B[:64].any()


def test_kernels_on_no_rollouts(kernel_device):
    out = triton_advantage(**advantage_inputs([], device=kernel_device), config=RewardConfig("flex", "gdpo"))
    assert [x.numel() for x in (*out[:2], *out.terms.values(), out.zero_variance_G)] == [0] * 7


def test_one_graph_under_compile():
    inputs = advantage_inputs(random_episodes(0))
    config = RewardConfig("flex", "gdpo")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(group_advantage, backend="aot_eager", fullgraph=True)(**inputs, config=config)
    eager = group_advantage(**inputs, config=config)
    assert torch.equal(compiled.advantage_B, eager.advantage_B)
    assert torch.equal(compiled.zero_variance_G, eager.zero_variance_G)


def test_the_operator_keeps_its_promises():
    i = advantage_inputs(random_episodes(0, unscored=False), device=DEVICE)
    calls = torch.stack([i[name].float() for name in ("calls_B", "teacher_calls_B", "ok_calls_B")])
    names = ("correct_B", "finished_B", "answered_B", "invalid_calls_B", "group_B", "process_B")
    for groups, backend in ((None, "torch"), (6, "torch"), (6, "triton")):
        args = (*(i[n] for n in names), calls, groups, "flex", "gdpo", 1e-6, backend)
        torch.library.opcheck(_group_advantage, (i["teacher_tools_B"], i["student_tools_B"], *args))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(group_B=torch.tensor([0, -1])), "negative group: -1"),
        (dict(group_B=torch.tensor([0.0, 1.0])), "group_B must be int64"),
        (dict(teacher_tools_B=torch.tensor([1.0, 2.0])), "teacher_tools_B must be int64"),
        (dict(student_tools_B=torch.tensor([[1, 1], [2, 2]])), "one shape"),
        (dict(student_tools_B=torch.tensor([1])), "student_tools_B must be int64"),
        (dict(correct_B=torch.tensor([1.0])), "correct_B must be"),
        (dict(finished_B=torch.ones(2, device="meta")), "finished_B must be"),
        (dict(config=RewardConfig("strict"), process_B=None), "'strict' needs process_B"),
        (dict(config=RewardConfig("flex"), calls_B=None, ok_calls_B=None), "'flex' needs calls_B, ok_calls_B"),
        (dict(backend="gpu"), "backend"),
    ],
)
def test_wrong_calls(change, match):
    inputs = {**advantage_inputs([RIGHT, WRONG]), "config": RewardConfig(), **change}
    with pytest.raises(ValueError, match=match):
        group_advantage(**inputs)


@pytest.mark.parametrize("fields", [dict(reward="dense"), dict(advantage="ppo"), dict(eps=-1.0)])
def test_wrong_configurations(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        RewardConfig(**fields)
