"""The composite reward: an episode, judged against the answer and against the teacher's cached calls.

Every measurement is a pure function of (Example, Rollout, TeacherRecord). The kernel `group_advantage` turns the
measurements of a whole step into named terms, rewards and advantages in one launch; its presets are the formulas.
A measurement that raises stops the run: a reward that silently becomes 0 teaches the student something false.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from mentor_kernels import AdvantageOut, RewardConfig, group_advantage

from lite_mentor.config import Config
from lite_mentor.judge import is_right
from lite_mentor.types import CALL_STATUSES, STOP_REASONS, Example, Rollout, Scored, TeacherRecord, ToolCall


@dataclass(frozen=True)
class Measurement:
    """What the reward presets need to know of one episode."""

    correct: bool
    finished: bool
    answered: bool
    teacher_tools: frozenset[str]
    student_tools: frozenset[str]
    """Names of the example's tools that were called with well-formed JSON."""
    calls: int
    teacher_calls: int
    ok_calls: int
    unknown_calls: int
    strict: float


def measure(example: Example, rollout: Rollout, record: TeacherRecord) -> Measurement:
    """One episode against one teacher record."""
    known = [call for call in rollout.calls if call.status not in ("unknown_tool", "bad_json")]
    return Measurement(
        correct=rollout.finished and is_right(example, rollout.answer, rollout.calls),
        finished=rollout.finished,
        answered=bool(rollout.answer and rollout.answer.strip()),
        teacher_tools=frozenset(call.name for call in record.calls),
        student_tools=frozenset(call.name for call in known),
        calls=len(rollout.calls),
        teacher_calls=len(record.calls),
        ok_calls=sum(call.status == "ok" for call in rollout.calls),
        unknown_calls=sum(call.status == "unknown_tool" for call in rollout.calls),
        strict=strict_reward(rollout.calls, record.calls, boxed=rollout.answer is not None),
    )


def score(
    examples: Mapping[str, Example],
    rollouts: Sequence[Rollout],
    teacher: Mapping[str, TeacherRecord],
    config: Config,
) -> tuple[list[Scored], AdvantageOut]:
    """Measure every rollout of a step and compare each with its group; what is returned lies on the CPU."""
    measured = [measure(examples[r.example_key], r, teacher[r.example_key]) for r in rollouts]
    columns = tensors(examples, rollouts, measured, config.device)
    if config.reward != "strict":  # no other preset reads it, and its range of -3 to 4 would drown the others' curves
        del columns["process_B"]
    found = group_advantage(
        **columns,
        config=RewardConfig(reward=config.reward, advantage=config.advantage),
        groups=max((r.group for r in rollouts), default=-1) + 1,
        backend=config.kernel_backend,
    )
    out = _on_the_cpu(found)
    rewards, advantages = out.reward_B.tolist(), out.advantage_B.tolist()
    terms = {name: values.tolist() for name, values in out.terms.items()}
    scored = [
        Scored(rollout, {name: values[i] for name, values in terms.items()}, rewards[i], advantages[i])
        for i, rollout in enumerate(rollouts)
    ]
    return scored, out


def _on_the_cpu(out: AdvantageOut) -> AdvantageOut:
    """All of it in one copy, so that the host waits for a GPU once a step."""
    numbers = torch.stack([out.reward_B, out.advantage_B, *out.terms.values()])
    flat = torch.cat([numbers.flatten(), out.zero_variance_G.float()]).cpu()
    reward_B, advantage_B, *terms = flat[: numbers.numel()].view(numbers.shape)
    return AdvantageOut(reward_B, advantage_B, dict(zip(out.terms, terms, strict=True)), flat[numbers.numel() :].bool())


def summarise(scored: Sequence[Scored], out: AdvantageOut) -> dict[str, float | None]:
    """A step's reward metrics: mean and spread of the reward, the mean of each term, and how the episodes went."""
    rewards = [s.reward for s in scored if math.isfinite(s.reward)]
    rollouts = [s.rollout for s in scored]
    calls = [call for r in rollouts for call in r.calls]
    n = len(rollouts)
    metrics = {
        "reward/mean": statistics.fmean(rewards) if rewards else None,
        "reward/std": statistics.pstdev(rewards) if rewards else None,
        "advantage/zero_variance": out.zero_variance_G.float().mean().item(),
        "tokens/sampled": sum(int(r.sampled.sum()) for r in rollouts),
        "tokens/prompt": sum(r.prompt_length for r in rollouts),
        "calls/per_rollout": len(calls) / n,
    }
    metrics |= {f"reward/{name}": values.nanmean().item() for name, values in out.terms.items()}
    metrics |= {f"calls/{s}": sum(c.status == s for c in calls) / len(calls) if calls else None for s in CALL_STATUSES}
    metrics |= {f"stop/{s}": sum(r.stop == s for r in rollouts) / n for s in STOP_REASONS}
    return metrics


def tensors(
    examples: Mapping[str, Example],
    rollouts: Sequence[Rollout],
    measured: Sequence[Measurement],
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    """Measurements as the arguments of `group_advantage`; tool sets become bit masks over the example's tools."""
    names = [[tool.name for tool in examples[r.example_key].tools] for r in rollouts]
    words = max(1, -(-max((len(n) for n in names), default=1) // 63))

    def flags(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device)

    def counts(values) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=device)

    return dict(
        teacher_tools_B=counts(bit_mask(m.teacher_tools, n, words) for m, n in zip(measured, names, strict=True)),
        student_tools_B=counts(bit_mask(m.student_tools, n, words) for m, n in zip(measured, names, strict=True)),
        correct_B=flags(m.correct for m in measured),
        finished_B=flags(m.finished for m in measured),
        answered_B=flags(m.answered for m in measured),
        invalid_calls_B=counts(m.unknown_calls for m in measured),
        calls_B=counts(m.calls for m in measured),
        teacher_calls_B=counts(m.teacher_calls for m in measured),
        ok_calls_B=counts(m.ok_calls for m in measured),
        process_B=flags(m.strict for m in measured),
        group_B=counts(r.group for r in rollouts),
    )


def bit_mask(names: frozenset[str], tools: Sequence[str], words: int) -> list[int]:
    """A set of tool names as `words` integers of 63 bits each, by position in the example's tool list.

    A teacher's tool that the example does not offer gets no bit: no student could call it.
    """
    bits = sum(1 << i for i, tool in enumerate(tools) if tool in names)
    return [(bits >> (63 * w)) & ((1 << 63) - 1) for w in range(words)]


def strict_reward(calls: Sequence[ToolCall], gold: Sequence[ToolCall], *, boxed: bool) -> float:
    """ToolRL's trajectory matching (arXiv 2504.13958), in [-3, 4]: format in {0, 1} plus 6 S / S_max - 3."""
    well_formed = [c for c in calls if c.status != "bad_json"]
    form = float(boxed and len(well_formed) == len(calls))
    if calls and not well_formed:
        return form - 3.0
    if [(c.name, dict(c.arguments)) for c in well_formed] == [(c.name, dict(c.arguments)) for c in gold]:
        return form + 3.0
    best = 1 + len(gold) + sum(len(g.arguments) for g in gold)
    matched = _multiset_jaccard([c.name for c in well_formed], [g.name for g in gold])
    unused = list(well_formed)
    for g in gold:
        rivals = [c for c in unused if c.name == g.name]
        if rivals:
            chosen = max(rivals, key=lambda c: _argument_match(c, g))
            matched += _argument_match(chosen, g)
            unused.remove(chosen)
    return form + 6.0 * matched / best - 3.0


def _argument_match(call: ToolCall, gold: ToolCall) -> float:
    """Jaccard of the parameter names, plus the number of parameters with the same value."""
    mine, theirs = set(call.arguments), set(gold.arguments)
    union = len(mine | theirs)
    names = len(mine & theirs) / union if union else 1.0
    return names + sum(call.arguments[k] == gold.arguments[k] for k in mine & theirs)


def _multiset_jaccard(a: Sequence[str], b: Sequence[str]) -> float:
    shared = sum((Counter(a) & Counter(b)).values())
    total = len(a) + len(b) - shared
    return shared / total if total else 1.0
