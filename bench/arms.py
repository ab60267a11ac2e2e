"""SFT, sparse, strict and teacher-guided rewards side by side: one cold start, equal budgets, the same questions.

    python -m bench arms --preset tiny --out DIR

For each seed there is one cold start. Every other arm starts from its adapters, takes `steps` optimizer steps on the
same questions in the same order, and is evaluated once, greedily, on the same held-out suites:

    base     the untrained student
    cold     the cold start itself
    sft      goes on with supervised steps, on the teacher's records of the questions that the others roll out, at
             the cold start's rate, warmed up again
    others   RL with the reward of that name

A finished arm is not run again; one that was interrupted goes on from its last checkpoint (sft: from its start). The
folder refuses arms of another configuration: their cold start or budget would differ.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.arms_report import ARMS, OWN, metrics_of, write_results
from bench.measure import machine
from lite_mentor import sft
from lite_mentor.config import Config, parse
from lite_mentor.errors import UserError
from lite_mentor.evaluate import evaluate
from lite_mentor.log import segments
from lite_mentor.optim import make_optimizer
from lite_mentor.run import Run, first_day, prepare
from lite_mentor.tasks import load_suite
from lite_mentor.types import Example, Rollout
from train import train_step

FORMAT = 3
TRANSCRIPTS = 2
"""Episodes of each suite that are kept as text."""


def main(argv: list[str]) -> None:
    """Run what is missing in --out, and write report.html, table.md, arms.json and figure.svg after every arm."""
    arms, rest = _take(argv, "--arms", ARMS)
    seeds, rest = _take(rest, "--seeds", ("0",))
    config = parse(rest)
    unknown = set(arms) - set(ARMS)
    if unknown:
        raise UserError(f"--arms {' '.join(sorted(unknown))}: there is no such arm; choose from {' '.join(ARMS)}.")
    if not all(seed.isdigit() for seed in seeds):
        raise UserError(f"--seeds {' '.join(seeds)}: give whole numbers.")
    if not config.out:
        raise UserError("--out is missing: name a folder for the arms; it may hold earlier ones.")
    for name in set(config.eval_suites) - {"validation", "test"}:
        load_suite(name, split="test", size=1, seed=0)  # so that a package that it lacks is missed before hours of work
    out = Path(config.out)
    config = claim(out, config)
    about = {"command": " ".join(["python -m bench arms", *argv]), **machine(config.device), "preset": config.preset}
    for seed in map(int, seeds):
        for arm in ("cold", *arms):
            folder = out / f"seed-{seed}" / arm
            if not (folder / "arm.json").exists():
                print(f"== {arm}, seed {seed} ==", flush=True)
                reward = {"reward": arm} if arm not in ("base", "cold", "sft") else {}
                run_arm(arm, replace(config, seed=seed, out=str(folder), **reward), out / f"seed-{seed}" / "cold")
                write_results(out, config, about)
    print(write_results(out, config, about))


def _take(argv: list[str], flag: str, default: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The words after `flag`, and the rest of the command line."""
    if flag not in argv:
        return default, argv
    at = argv.index(flag)
    end = next((i for i in range(at + 1, len(argv)) if argv[i].startswith("--")), len(argv))
    return tuple(argv[at + 1 : end]), argv[:at] + argv[end:]


def claim(out: Path, config: Config) -> Config:
    """Write down what the arms of this folder share, and give each of them the day on which the first was begun.

    Raises UserError when the folder belongs to something else.
    """
    path = out / "shared.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} holds other files; name a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        config = replace(config, date=config.date or first_day(config))
        path.write_text(json.dumps({"format": FORMAT, "config": _shared(config)}, indent=1))
        return config
    try:
        found = json.loads(path.read_text())
        version, theirs = found["format"], found["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); name a new --out.") from None
    if version != FORMAT:
        raise UserError(f"--out {out} was written in format {version}, not {FORMAT}; name a new folder.")
    config = replace(config, date=config.date or theirs.get("date"))
    for name, value in _shared(config).items():
        if theirs.get(name) != value:
            raise UserError(
                f"--out {out} holds arms with {name} = {theirs.get(name)}, not {value}: they could not be compared; "
                "name a new folder."
            )
    return config


def _shared(config: Config) -> dict[str, object]:
    return json.loads(json.dumps({k: v for k, v in config.asdict().items() if k not in OWN}))


def run_arm(arm: str, config: Config, cold: Path) -> None:
    """Train one arm and evaluate it; arm.json, written last, says that it is finished."""
    out = Path(config.out)
    if (out / "config.json").exists():
        config = replace(config, resume=str(out))
    with prepare(config) as run:
        tokens = sum(_TRAIN[arm](run, cold) if arm in _TRAIN else reinforce(run, cold))
        # Of every process that took a step of this arm, and of no step that a resumed one took again.
        seconds = sum(row["time/step"] for row in metrics_of(out))
        run.refresh_rollouts()
        found, shown = {}, []
        for suite, examples in run.held_out.items():
            found[suite], rollouts = evaluate(run.engine, run.chat, examples, limits=run.limits, run_call=run.run_call)
            shown += transcripts_of(run, suite, examples, rollouts, found[suite]["correct"])
            print(f"{arm} {suite}: {found[suite]['accuracy']:.1%} of {found[suite]['n']}", flush=True)
    result = {"arm": arm, "seed": config.seed, "tokens_trained": tokens, "seconds": seconds, "suites": found,
              "transcripts": shown, "cold_start": None if arm == "base" else cold_start_hash(cold)}  # fmt: skip
    partial = out / "arm.json.partial"
    partial.write_text(json.dumps(result))
    partial.replace(out / "arm.json")


def transcripts_of(
    run: Run, suite: str, examples: Sequence[Example], rollouts: Sequence[Rollout], correct: Sequence[int]
) -> list[dict]:
    """The first TRANSCRIPTS episodes of a suite as text: every arm's are of the same questions."""
    return [
        {"suite": suite, "question": e.question, "answer": list(e.answer), "correct": bool(right), "stop": r.stop,
         "segments": segments(r, run.chat.decode)}
        for e, r, right in list(zip(examples, rollouts, correct, strict=True))[:TRANSCRIPTS]
    ]  # fmt: skip


def cold_start_hash(cold: Path) -> str:
    """SHA-256 of the adapters from which the arms of a seed start."""
    return hashlib.sha256((cold / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def untrained(run: Run, cold: Path) -> Iterator[int]:
    """Nothing is learned."""
    run.restore()
    yield 0


def cold_start(run: Run, cold: Path) -> Iterator[int]:
    """The supervised steps from which every arm starts."""
    c = run.config
    run.restore()
    yield from _supervised(run, run.examples[: c.sft_steps * c.sft_batch], c)
    run.student.save_adapter(run.out / "adapter")


def more_supervision(run: Run, cold: Path) -> Iterator[int]:
    """As many supervised steps as the other arms take RL steps, on the questions that they see."""
    c = run.config
    run.restore()
    run.student.load_adapter(cold / "adapter")
    chosen = [example for step in range(c.steps) for example in run.take(step)]
    yield from _supervised(run, chosen, replace(c, sft_steps=c.steps, sft_batch=c.prompts_per_step))


def _supervised(run: Run, examples, config: Config) -> Iterator[int]:
    records = sft.teacher_rollouts(run.chat, examples, run.teacher, config)
    optimizer = make_optimizer(run.student.trainable(), config)
    began = time.monotonic()
    for metrics in sft.cold_start(run.student, optimizer, records, config, run.guard):
        now = time.monotonic()
        run.log.step({**metrics, "time/step": now - began})
        began = now
        yield int(metrics["tokens/sampled"])


def reinforce(run: Run, cold: Path) -> Iterator[int]:
    """RL with the arm's reward."""
    c = run.config
    start = run.restore()
    if start is None:
        run.student.load_adapter(cold / "adapter")
        if c.beta:
            run.student.keep_reference()
        run.save(0)
        start = 0
    for step in range(start, c.steps):
        run.log.step(train_step(run, step))
        if (step + 1) % c.save_every == 0 or step + 1 == c.steps:
            run.save(step + 1)
    yield sum(int(row.get("tokens/trained") or 0) for row in metrics_of(run.out))


_TRAIN = {"base": untrained, "cold": cold_start, "sft": more_supervision}
