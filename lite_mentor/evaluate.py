"""Held-out suites, greedy: accuracy with its interval, and how the student used its tools.

`python -m lite_mentor.evaluate RUN` evaluates the final adapter of a run again, on any suite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lite_mentor.config import Config
from lite_mentor.engine import Engine, Sampling
from lite_mentor.judge import is_correct
from lite_mentor.prompt import Chat
from lite_mentor.rollout import Limits, RunCall, roll_out
from lite_mentor.statistics import paired_bootstrap, tool_statistics, wilson
from lite_mentor.tasks import load_suite
from lite_mentor.types import Example, Rollout


def suites(config: Config) -> dict[str, list[Example]]:
    """The held-out examples of a run. They never depend on the seed: all runs are judged on the same ones."""
    out = {}
    for name in config.eval_suites:
        size = config.eval_size if name == "validation" else max(1, config.eval_size // 2)
        if name in ("validation", "test"):
            out[name] = load_suite(config.task, split=name, size=size, seed=0, levels=config.levels)
        else:
            out[name] = load_suite(name, split="test", size=size, seed=0)
    return out


def evaluate(
    engine: Engine, chat: Chat, examples: Sequence[Example], *, limits: Limits, run_call: RunCall
) -> tuple[dict, list[Rollout]]:
    """One greedy rollout of each example -> the row of eval.jsonl (without its step and name), and the rollouts.

    An episode that was cut off, or that has no answer, is wrong; nothing is left out of the count.
    """
    greedy = Sampling(temperature=0.0)
    rollouts = roll_out(
        engine, chat, examples, group_size=1, limits=limits, sampling=greedy, seed=0, step=-1, run_call=run_call
    )
    correct = [
        r.finished and is_correct(r.answer, e.answer, e.checker) for r, e in zip(rollouts, examples, strict=True)
    ]
    result = {
        "n": len(examples),
        "keys": [e.key for e in examples],
        "correct": [int(c) for c in correct],
        "accuracy": sum(correct) / len(correct),
        "ci95": list(wilson(sum(correct), len(correct))),
        **tool_statistics(rollouts, _gold_tools(examples)),
    }
    return result, rollouts


def compare(before: dict, after: dict) -> tuple[float, float, float]:
    """(difference, low, high) of accuracy, by paired bootstrap over the same examples."""
    if before["keys"] != after["keys"]:
        raise ValueError("the two evaluations were not made on the same examples")
    return paired_bootstrap(before["correct"], after["correct"])


def _gold_tools(examples: Sequence[Example]) -> Counter[str]:
    """How often the examples' own solutions call each tool."""
    return Counter(step["tool"] for e in examples for step in e.meta.get("steps", ()))
