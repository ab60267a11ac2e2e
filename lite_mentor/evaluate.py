"""Held-out suites, greedy: accuracy with its interval, and how the student used its tools.

    python -m lite_mentor.evaluate RUN --suites validation --size 200

evaluates a run's cold start and its final adapter again, on the same examples, and says what RL changed.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from lite_mentor.config import Config, load
from lite_mentor.engine import Engine, Sampling
from lite_mentor.errors import UserError
from lite_mentor.judge import is_right
from lite_mentor.prompt import Chat, parse_turn
from lite_mentor.rollout import Limits, limits_of, messages_of, roll_out
from lite_mentor.sandbox import open_sandbox
from lite_mentor.statistics import paired_bootstrap, tool_statistics, wilson
from lite_mentor.student import load_student
from lite_mentor.tasks import bfcl, load_suite, load_task
from lite_mentor.tools import RunCall, caller, run_call
from lite_mentor.types import Example, Rollout


def suites(config: Config) -> dict[str, list[Example]]:
    """The held-out examples of a run, whatever its seed. A file too small to hold any out has fewer suites."""
    out = {}
    for name in config.eval_suites:
        size = config.eval_size if name == "validation" else max(1, config.eval_size // 2)
        if name in ("validation", "test"):
            out[name] = load_task(
                config.task, split=name, size=size, seed=0, levels=config.levels,
                quarantine=Path(config.out) / "quarantine.jsonl",
            )  # fmt: skip
        else:
            out[name] = load_suite(name, split="test", size=size, seed=0)
    return {name: examples for name, examples in out.items() if examples}


def evaluate(
    engine: Engine, chat: Chat, examples: Sequence[Example], *, limits: Limits, run_call: RunCall
) -> tuple[dict, list[Rollout]]:
    """One greedy rollout of each example -> the row of eval.jsonl (without its step and name), and the rollouts.

    An episode that was cut off, or that has no answer, is wrong; nothing is left out of the count. BFCL asks for one
    turn and judges its calls, as the leaderboard does.
    """
    if any(e.suite in bfcl.SUITES for e in examples):
        limits = replace(limits, max_turns=1)
    greedy = Sampling(temperature=0.0)
    rollouts = roll_out(
        engine, chat, examples, group_size=1, limits=limits, sampling=greedy, seed=0, step=-1, run_call=run_call
    )
    correct = [_is_right(chat, r, e) for r, e in zip(rollouts, examples, strict=True)]
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


def _is_right(chat: Chat, rollout: Rollout, example: Example) -> bool:
    if example.suite in bfcl.SUITES:
        # The leaderboard reads a text that was cut off like any other: whole calls in it count.
        turn = parse_turn("".join(m["content"] for m in messages_of(chat, rollout) if m["role"] == "assistant"))
        return bfcl.passes(example, [run_call(raw, example.tools) for raw in turn.calls])
    return rollout.finished and is_right(example, rollout.answer, rollout.calls)


def _gold_tools(examples: Sequence[Example]) -> Counter[str]:
    """How often the examples' own solutions call each tool."""
    return Counter(step["tool"] for e in examples for step in e.meta.get("steps", ()))


@dataclass(frozen=True)
class Options:
    """Evaluate the adapters of a finished run."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    suites: tuple[str, ...] = ("validation",)
    """validation, test, any built-in suite, or a category of BFCL such as bfcl_live_simple (needs bfcl-eval)."""
    size: int = 200
    """Examples of `validation`; every other suite uses half as many."""
    max_prompt_tokens: int = 0
    """Longest prompt; 0 takes the run's. BFCL's many tools need about 2,000."""
    sandbox: Literal["on", "off"] = "on"
    """off: tools of yours can read and change your files and use the network."""
    adapters: tuple[str, ...] = ("cold_start", "adapter")
    """Folders with PEFT adapters, within the run or anywhere; each is compared with the first. `none` is the base."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print accuracies and paired differences; append every result to RUN/evaluate.jsonl. 2: something to put right."""
    options = tyro.cli(Options, args=argv, prog="python -m lite_mentor.evaluate")
    try:
        config = replace(load(str(options.run / "config.json")), eval_suites=options.suites, eval_size=options.size)
        if options.max_prompt_tokens:
            config = replace(config, max_prompt_tokens=options.max_prompt_tokens)
        student = load_student(
            config.student, quant=config.quant, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha,
            device=config.device, dtype=config.dtype,
        )  # fmt: skip
        context = config.max_prompt_tokens + config.max_new_tokens
        engine = Engine.of(student, slots=64, context=context, gib=config.cache_gib, backend=config.kernel_backend)
        limits = limits_of(config)
        first: dict[str, dict] = {}
        with open_sandbox(options.sandbox) as sandbox:
            if sandbox.way == "limits only":
                print(sandbox.note, file=sys.stderr)
            for adapter in options.adapters:
                if adapter != "none":
                    inside = options.run / adapter
                    student.load_adapter(inside if inside.exists() else Path(adapter))
                engine.weights_changed()
                for suite, examples in suites(config).items():
                    result, _ = evaluate(
                        engine, Chat(student.tokenizer), examples, limits=limits,
                        run_call=caller(sandbox.call),
                    )  # fmt: skip
                    print(_line(adapter, suite, result, first.get(suite)), flush=True)
                    first.setdefault(suite, result)
                    with open(options.run / "evaluate.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps({"name": adapter, "suite": suite, **result}) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _line(adapter: str, suite: str, result: dict, first: dict | None) -> str:
    low, high = result["ci95"]
    text = f"{suite} {adapter}: {result['accuracy']:.1%} of {result['n']} (95 % interval {low:.1%} to {high:.1%})"
    if first is not None:
        change, low, high = compare(first, result)
        text += f"; change {change:+.1%} (paired bootstrap {low:+.1%} to {high:+.1%})"
    return text


if __name__ == "__main__":
    sys.exit(main())
