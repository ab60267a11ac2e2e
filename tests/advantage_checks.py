"""The checker of `group_advantage`: plain Python, rollout after rollout, written from the tables of the reward."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from kernel_checks import poisoned_memory
from mentor_kernels import RewardConfig


@dataclass(frozen=True)
class Episode:
    """What the reward knows of one rollout; tools are numbers, the position of their bit."""

    group: int = 0
    correct: float = 1.0
    finished: bool = True
    answered: bool = True
    teacher: frozenset[int] = frozenset({0, 1})
    student: frozenset[int] = frozenset({0, 1})
    invalid: int = 0
    calls: int = 2
    teacher_calls: int = 2
    ok: int = 2
    process: float = 0.0


def random_episodes(seed: int, groups: int = 6, tools: int = 64, unscored: bool = True) -> list[Episode]:
    """Ragged groups in mixed order; one has a single rollout, one is without variance, bits reach the sign bit."""
    make = random.Random(seed)
    episodes = [Episode(group=1, correct=0.0), *[Episode(group=2)] * 3]
    for group in (0, *range(3, groups)):
        teacher = frozenset(make.sample((0, 5, tools - 2, tools - 1), make.randint(0, 3)))
        for _ in range(make.randint(3, 7)):
            student = (
                teacher if make.random() < 0.4 else frozenset(make.sample((0, 5, 6, tools - 1), make.randint(0, 3)))
            )
            calls = len(student) + make.randint(0, 3) if student else make.randint(0, 1)
            episodes.append(
                Episode(
                    group=group,
                    correct=make.choice([0.0, 1.0, 1.0, math.nan] if unscored else [0.0, 1.0]),
                    finished=make.random() < 0.85,
                    answered=make.random() < 0.85,
                    teacher=teacher,
                    student=student,
                    invalid=make.choice([0, 0, 0, 2]),
                    calls=calls,
                    teacher_calls=len(teacher),
                    ok=make.randint(0, calls),
                    process=make.uniform(-3, 4),
                )
            )
    make.shuffle(episodes)
    return episodes


def mask(tools: frozenset[int], words: int = 1) -> list[int]:
    """Bit masks of 64 tools a word, as the signed integers that int64 holds."""
    whole = sum(1 << tool for tool in tools)
    parts = [(whole >> (64 * w)) & (2**64 - 1) for w in range(words)]
    return [part - 2**64 if part >= 2**63 else part for part in parts]


def advantage_inputs(episodes: Sequence[Episode], words: int = 1, device: str = "cpu") -> dict[str, torch.Tensor]:
    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(e, name) for e in episodes], dtype=dtype, device=device)

    def masks(name: str) -> torch.Tensor:
        rows = [mask(getattr(e, name), words) for e in episodes]
        return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, words)

    return dict(
        teacher_tools_B=masks("teacher"),
        student_tools_B=masks("student"),
        correct_B=column("correct", torch.float32),
        finished_B=column("finished", torch.bool),
        answered_B=column("answered", torch.bool),
        invalid_calls_B=column("invalid", torch.int64),
        group_B=column("group", torch.int64),
        process_B=column("process", torch.float32),
        calls_B=column("calls", torch.int64),
        teacher_calls_B=column("teacher_calls", torch.int64),
        ok_calls_B=column("ok", torch.int64),
    )


def plain_terms(e: Episode, reward: str) -> tuple[float, float, float]:
    """The three measurements of an episode, before gates."""
    shared, total = len(e.teacher & e.student), len(e.teacher) + len(e.student)
    f1 = 2 * shared / total if total else 0.0
    most = max(e.calls, e.teacher_calls)
    as_silent = not e.teacher_calls and not e.student
    align = {
        "mentor_f1": f1,
        "flex": (1.0 if as_silent else f1) * (1 - abs(e.calls - e.teacher_calls) / max(most, 1) / 2),
        "mentor_overlap": float(shared > 0),
    }.get(reward, float(bool(e.student) and e.student == e.teacher))
    valid = float(e.invalid == 0)
    if reward == "flex":
        valid = e.ok / e.calls if e.calls else float(e.teacher_calls == 0)
    return e.correct, align, valid


def plain_reward(e: Episode, reward: str) -> float:
    """One row of the table."""
    if math.isnan(e.correct):
        return math.nan
    if not e.finished:
        return 0.0
    if not e.answered:
        return 0.1
    correct, align, valid = plain_terms(e, reward)
    kept = align if correct else 0.2 * align
    return {
        "mentor": 0.7 * correct + 0.3 * kept + 0.1 * valid,
        "mentor_f1": 0.7 * correct + 0.3 * kept + 0.1 * valid,
        "mentor_overlap": 0.7 * correct + 0.3 * kept,
        "no_align": 0.7 * correct + 0.1 * valid,
        "sparse": 1.0 if correct else 0.1,
        "strict": e.process,
        "flex": 0.7 * correct + 0.2 * kept + 0.1 * valid,
    }[reward]


def plain_advantage(episodes: Sequence[Episode], config: RewardConfig) -> tuple[list[float], list[float], list[bool]]:
    """(rewards, advantages, groups without variance)."""
    rewards = [plain_reward(e, config.reward) for e in episodes]
    scored = [i for i, r in enumerate(rewards) if not math.isnan(r)]
    spread = statistics.stdev([rewards[i] for i in scored]) if len(scored) > 1 else 0.0
    advantages, flat = [0.0] * len(episodes), []
    for group in range(max(e.group for e in episodes) + 1):
        rows = [i for i in scored if episodes[i].group == group]
        values = [rewards[i] for i in rows]
        weights, columns = (1.0,), [values]
        if config.advantage == "gdpo" and config.reward != "strict":
            weights = TERM_WEIGHTS.get(config.reward, (0.7, 0.3, 0.1))
            columns = [[_gated_terms(episodes[i], config.reward)[k] for i in rows] for k in range(3)]
        flat.append(len(rows) < 2 or all(max(c) - min(c) < 1e-9 for c in columns))
        if flat[-1]:
            continue
        if config.advantage in ("grpo", "gdpo"):
            parts = [[w * z for z in _z_scores(c, config.eps)] for w, c in zip(weights, columns, strict=True)]
            found = [sum(part) for part in zip(*parts, strict=True)]
        else:
            found = [v - statistics.fmean(values) for v in values]
        for i, value in zip(rows, found, strict=True):
            advantages[i] = value / (spread + config.eps) if config.advantage == "batch" else value
    if config.advantage == "gdpo":
        whole = _z_scores([advantages[i] for i in scored], config.eps)
        for i, value in zip(scored, whole, strict=True):
            advantages[i] = 0.0 if flat[episodes[i].group] else value
    return rewards, advantages, flat


TERM_WEIGHTS = {"flex": (0.7, 0.2, 0.1), "no_align": (0.7, 0, 0.1), "sparse": (0.9, 0, 0.1)}


def _gated_terms(e: Episode, reward: str) -> tuple[float, float, float]:
    """What gdpo normalises: terms in [0, 1] as the gates leave them."""
    if not e.finished or not e.answered:
        return 0.0, 0.0, float(e.finished)
    correct, align, valid = plain_terms(e, reward)
    align = 0.0 if reward in ("no_align", "sparse") else align
    valid = {"sparse": 1.0, "mentor_overlap": 0.0}.get(reward, valid)
    return correct, align if correct else 0.2 * align, valid


def _z_scores(values: list[float], eps: float) -> list[float]:
    if len(values) < 2 or min(values) == max(values):
        return [0.0] * len(values)
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return [(v - mean) / (std + eps) for v in values]


def check_advantage(
    operator: Callable, episodes: Sequence[Episode], config: RewardConfig, *, words: int = 1, device: str = "cpu"
) -> None:
    """`operator(**inputs, config=) -> (rewards, advantages, terms, zero variance)` against plain Python."""
    with poisoned_memory():
        out = operator(**advantage_inputs(episodes, words, device), config=config)
    rewards, advantages, flat = plain_advantage(episodes, config)
    assert out[3].tolist() == flat, f"{config}: groups without variance"
    torch.testing.assert_close(out[0].cpu(), torch.tensor(rewards), rtol=0, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(out[1].cpu(), torch.tensor(advantages), rtol=1e-4, atol=2e-5)
    for i, name in enumerate(("correct", "align", "valid")):
        expected = torch.tensor([plain_terms(e, config.reward)[i] for e in episodes])
        torch.testing.assert_close(out[2][name].cpu(), expected, rtol=0, atol=1e-6, equal_nan=True)
    silent = [i for i, e in enumerate(episodes) if flat[e.group]]
    assert all(out[1][i] == 0 for i in silent), f"{config}: an advantage without variance is not exactly 0"
