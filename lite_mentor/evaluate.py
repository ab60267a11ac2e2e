"""Held-out suites: accuracy with its interval, pass@k, and how the student used its tools.

    python -m lite_mentor.evaluate RUN --suites validation --size 200
    python -m lite_mentor.evaluate FOLDER --student Qwen/Qwen3-0.6B --adapters none --suites ood_tools

The first evaluates a run's cold start and its final adapter again, on the same examples, and says what RL changed; the
second, a student without a run. What FOLDER/evaluate.jsonl already holds, of the same weights, prompts, tools and
judge, is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

from lite_mentor.config import PRESETS, Config, check, is_date, load
from lite_mentor.device import compute_device
from lite_mentor.engine import Engine, Sampling
from lite_mentor.errors import UserError, guard_terminal, say
from lite_mentor.facts import digest, facts_of
from lite_mentor.files import append, check_folder, open_file, read_file
from lite_mentor.judge import is_right
from lite_mentor.load import load_student
from lite_mentor.log import RESULT, is_number, unsound
from lite_mentor.loss import check_backend
from lite_mentor.prompt import Chat, parse_turn
from lite_mentor.rollout import Limits, limits_of, messages_of, roll_out
from lite_mentor.sandbox import Sandbox, open_sandbox
from lite_mentor.statistics import bootstrap_mean, compare, pass_at_k, tool_statistics, wilson
from lite_mentor.student import Student
from lite_mentor.tasks import Describe, bfcl, load_suite, load_task
from lite_mentor.tools import RunCall, caller, run_call
from lite_mentor.types import Example, Rollout


def suites(config: Config, describe: Describe, note: Callable[[str], None] | None = None) -> dict[str, list[Example]]:
    """The held-out examples of a run, whatever its seed. A file too small to hold any out has fewer suites.

    `describe` tells what a file's own tools are; `note` is told how many of its examples are not used.
    """
    out = {}
    for name in config.eval_suites:
        size = config.eval_size if name == "validation" else max(1, config.eval_size // 2)
        if name in ("validation", "test"):
            out[name] = load_task(
                config.task, split=name, size=size, seed=0, levels=config.levels,
                quarantine=Path(config.out) / "quarantine.jsonl", describe=describe, note=note,
            )  # fmt: skip
        else:
            out[name] = load_suite(name, split="test", size=size, seed=0)
    return {name: examples for name, examples in out.items() if examples}


def evaluate(
    engine: Engine,
    chat: Chat,
    examples: Sequence[Example],
    *,
    limits: Limits,
    run_call: RunCall,
    samples: int = 1,
    temperature: float = 0.0,
) -> tuple[dict, list[Rollout]]:
    """`samples` rollouts of each example -> the row of eval.jsonl (without its step and name), and the rollouts.

    `correct` counts the right ones of each example, `accuracy` is their share, and with several there is pass@k for
    every power of two k. An episode that was cut off, or that has no answer, is wrong; nothing is left out of the
    count. BFCL asks for one turn and judges its calls, as the leaderboard does.
    """
    if any(e.suite in bfcl.SUITES for e in examples):
        limits = replace(limits, max_turns=1)
    sampling = Sampling(temperature=temperature)
    rollouts = roll_out(
        engine, chat, examples, group_size=samples, limits=limits, sampling=sampling, seed=0, step=-1, run_call=run_call
    )
    correct = [0] * len(examples)
    for rollout in rollouts:
        correct[rollout.group] += _is_right(chat, rollout, examples[rollout.group])
    passes = {k: [pass_at_k(samples, c, k) for c in correct] for k in (2**i for i in range(1, samples.bit_length()))}
    result = {
        "n": len(examples),
        "keys": [e.key for e in examples],
        "facts": _facts(chat, examples),
        "correct": correct,
        "accuracy": sum(correct) / len(rollouts),
        "ci95": list(
            wilson(sum(correct), len(correct)) if samples == 1 else bootstrap_mean([c / samples for c in correct])
        ),
        **{f"pass@{k}": sum(values) / len(values) for k, values in passes.items()},
        **tool_statistics(rollouts, _gold_tools(examples)),
    }
    return result, rollouts


def _facts(chat: Chat, examples: Sequence[Example]) -> str:
    """Hash of what decides a result beside weights and limits: how prompts are rendered, tools, checkers, the judge."""
    return digest([chat.fingerprint(), facts_of(examples)])


def _is_right(chat: Chat, rollout: Rollout, example: Example) -> bool:
    if example.suite in bfcl.SUITES:
        # The leaderboard reads a text that was cut off like any other: whole calls in it count.
        turns = [parse_turn(m["content"]) for m in messages_of(chat, rollout) if m["role"] == "assistant"]
        return bfcl.passes(example, [run_call(raw, example.tools) for turn in turns for raw in turn.calls])
    return rollout.finished and is_right(example, rollout.answer, rollout.calls)


def _gold_tools(examples: Sequence[Example]) -> Counter[str]:
    """How often the examples' own solutions call each tool."""
    return Counter(step["tool"] for e in examples for step in e.meta.get("steps", ()))


@dataclass(frozen=True)
class Options:
    """Evaluate the adapters of a run, or any student."""

    folder: tyro.conf.Positional[Path]
    """Folder of the run; with --student, where results shall land."""
    student: str = ""
    """A student without a run, named as for train.py; the other settings are then those of --preset."""
    preset: str = "quick"
    """Only with --student."""
    suites: tuple[str, ...] = ("validation",)
    """validation, test, any built-in suite, or a category of BFCL such as bfcl_live_simple (needs bfcl-eval)."""
    size: int = 200
    """Examples of `validation`; every other suite uses half as many."""
    samples: int = 1
    """Rollouts of each example. One is greedy; more are sampled at --temperature, and give pass@k."""
    temperature: float = 1.0
    """Of several samples."""
    max_prompt_tokens: int = 0
    """Longest prompt; 0 takes the run's. BFCL's many tools need about 2,000."""
    sandbox: Literal["on", "off"] = "on"
    """off: tools of yours can read and change your files and use the network."""
    adapters: tuple[str, ...] = ()
    """Folders with PEFT adapters, within the run or anywhere; each is compared with the first. `none` is the base.
    Nothing given: a run's cold start and its final adapter, or the student alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print accuracies and paired differences; keep every result in evaluate.jsonl.

    Exit status: 0; 2 after one sentence; 130 when interrupted.
    """
    guard_terminal()
    options = tyro.cli(Options, args=argv, prog="python -m lite_mentor.evaluate")
    try:
        config = _config(options)
        context = config.longest_rollout
        student = load_student(
            config.student, quant=config.quant, lora_rank=config.lora_rank, lora_alpha=config.lora_alpha,
            device=config.device, dtype=config.dtype, rollout_weights=config.rollout_weights, context=context,
        )  # fmt: skip
        engine = Engine.of(
            student, slots=64, context=context, gib=config.cache_gib, backend=config.kernel_backend,
            graphs=config.cuda_graphs,
        )  # fmt: skip
        with open_sandbox(options.sandbox) as sandbox:
            if sandbox.way == "limits only":
                say(sandbox.note, sys.stderr)
            _evaluate_all(options, config, engine, student, sandbox)
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("stopped; what is finished is kept: run the same command again to go on", sys.stderr)
        return 130
    return 0


def _config(options: Options) -> Config:
    if options.samples < 1 or not options.temperature > 0:
        raise UserError(
            f"--samples {options.samples} --temperature {options.temperature}: take one sample or more, at a "
            "temperature above 0."
        )
    check_folder(options.folder)
    if options.student:
        if options.preset not in PRESETS:
            raise UserError(f"--preset {options.preset!r}: there is no such preset; choose from {', '.join(PRESETS)}.")
        preset = PRESETS[options.preset]
        device = compute_device(preset.device)
        config = replace(preset, student=options.student, device=device, out=str(options.folder))
        try:
            options.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{options.folder} cannot be made ({error.strerror}); choose another folder.") from error
    else:
        config = load(str(options.folder / "config.json"))
        config = replace(config, device=compute_device(config.device), out=str(options.folder))
    longest = options.max_prompt_tokens or config.max_prompt_tokens
    config = replace(config, eval_suites=options.suites, eval_size=options.size, max_prompt_tokens=longest)
    for_update = dict(micro_tokens=0, drop_mass=0.0)  # what only the update reads is no reason to refuse here
    check(replace(config, **for_update))
    check_backend(replace(config, **for_update))
    return config


def _evaluate_all(options: Options, config: Config, engine: Engine, student: Student, sandbox: Sandbox) -> None:
    """Each adapter on each suite; a line of evaluate.jsonl that is the same evaluation stands for it."""
    file, limits = options.folder / "evaluate.jsonl", limits_of(config)
    done = _results(file)
    # A student without a run is told the day of its first evaluation in this folder, so that all can be compared.
    chat = Chat(student.tokenizer, config.date or next((row["date"] for row in done), ""))
    untrained = {name: tensor.clone() for name, tensor in student.adapter_state().items()}
    temperature = options.temperature if options.samples > 1 else 0.0
    held_out = suites(config, sandbox.describe, partial(say, file=sys.stderr))
    first: dict[str, dict] = {}
    for adapter in options.adapters or (("none",) if options.student else ("cold_start", "adapter")):
        if adapter == "none":
            student.load_adapter_state(untrained)
        else:
            inside = options.folder / adapter
            student.load_adapter(inside if os.path.exists(inside) else Path(adapter))
        engine.weights_changed()
        for suite, examples in held_out.items():
            identity = {
                "name": adapter, "suite": suite, "samples": options.samples, "temperature": temperature,
                "keys": [e.key for e in examples], "limits": asdict(limits), "weights": _weights(student),
                "date": chat.date, "facts": _facts(chat, examples),
            }  # fmt: skip
            result = next((row for row in done if identity.items() <= row.items()), None)
            if result is None:
                found, _ = evaluate(
                    engine, chat, examples, limits=limits, run_call=caller(sandbox.call), samples=options.samples,
                    temperature=temperature,
                )  # fmt: skip
                result = {**identity, **found}
                done.append(result)
                _keep(result, file)
            say(_line(adapter, suite, result, first.get(suite)))
            first.setdefault(suite, result)


def _results(file: Path) -> list[dict]:
    """The results of an earlier call. What a line that is none was to hold is evaluated again."""
    rows = []
    try:
        lines = read_file(file).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); move it away, or choose another folder.") from error
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if _is_result(row) else []
    return rows


def _is_result(row: object) -> bool:
    if not isinstance(row, dict) or unsound(row, RESULT) or not is_date(row.get("date")):
        return False
    return all(is_number(value) for key, value in row.items() if key.startswith("pass@"))


def _keep(result: dict, file: Path) -> None:
    """Append it as a line; one that was cut short must not take it with it."""
    try:
        with open_file(file, "a+b", follow=False) as out:
            out.seek(0)
            cut = out.read()[-1:] not in (b"", b"\n")
            append(out, b"\n" * cut + json.dumps(result).encode() + b"\n")
    except OSError as error:
        raise UserError(
            f"{file} cannot be written ({error.strerror}); make room or rights there, or choose another folder."
        ) from error


def _weights(student: Student) -> str:
    """sha256 of what decides an answer: the base, as far as its fingerprint goes, and the adapters."""
    digest = hashlib.sha256(student.fingerprint().encode())
    for name, tensor in sorted(student.adapter_state().items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


def _line(adapter: str, suite: str, result: dict, first: dict | None) -> str:
    low, high = result["ci95"]
    text = f"{suite} {adapter}: {result['accuracy']:.1%} of {result['n']} (95 % interval {low:.1%} to {high:.1%})"
    text += "".join(f"; {key} {value:.1%}" for key, value in result.items() if key.startswith("pass@"))
    difference = compare(first, result) if first is not None and result["samples"] == 1 else None
    if difference:
        change, low, high = difference
        text += f"; change {change:+.1%} (paired bootstrap {low:+.1%} to {high:+.1%})"
    return text


if __name__ == "__main__":
    sys.exit(main())
