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

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.figure import figure
from bench.step import machine
from lite_mentor import sft
from lite_mentor.charts import line_chart
from lite_mentor.config import Config, parse
from lite_mentor.errors import UserError
from lite_mentor.evaluate import evaluate, suites
from lite_mentor.optim import make_optimizer
from lite_mentor.page import escape, render
from lite_mentor.run import Run, prepare
from lite_mentor.statistics import paired_bootstrap
from train import train_step

FORMAT = 1
ARMS = ("base", "sft", "sparse", "strict", "no_align", "mentor", "mentor_f1", "flex")
OWN = {"seed", "out", "reward", "resume"}
"""Settings in which the arms of one folder differ."""
NOTE = (
    "Accuracy: the mean over seeds. In brackets, for base and cold: the range over seeds, or with one seed the Wilson "
    "95 % interval; for the others: the change in points since the same seed's cold start on the same questions, and "
    "its 95 % interval by paired bootstrap, the pairs of all seeds pooled. On the first suite: "
    "calls per episode, their share that worked, the similarity of the tool mix to the teacher's (1 - JSD), tokens per "
    "episode, share of episodes cut off. The trained tokens of supervised arms are the assistant's alone."
)


def main(argv: list[str]) -> None:
    """Run what is missing in --out, then write table.md, arms.json, figure.svg and curves.html there."""
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
    out = Path(config.out)
    claim(out, config)
    for seed in map(int, seeds):
        for arm in ("cold", *arms):
            folder = out / f"seed-{seed}" / arm
            if not (folder / "arm.json").exists():
                print(f"== {arm}, seed {seed} ==", flush=True)
                reward = {"reward": arm} if arm not in ("base", "cold", "sft") else {}
                run_arm(arm, replace(config, seed=seed, out=str(folder), **reward), out / f"seed-{seed}" / "cold")
    results = collect(out)
    text = table(results)
    about = {"command": " ".join(["python -m bench arms", *argv]), **machine(config.device), "preset": config.preset}
    (out / "arms.json").write_text(json.dumps({**about, "arms": results}, indent=1))
    (out / "table.md").write_text(json.dumps(about) + "\n\n" + text + "\n")
    (out / "figure.svg").write_text(picture(results, f"{about['preset']}, {about['date']}, commit {about['commit']}"))
    settings = "".join(f"<dt>{k}</dt><dd>{escape(str(v))}</dd>" for k, v in config.asdict().items() if k not in OWN)
    parts = dict(title="Arms", date=f"{about['date']}, commit {about['commit']}", summary="", settings=settings)
    (out / "curves.html").write_text(render(body=curves(out, results), **parts))
    print(text)


def _take(argv: list[str], flag: str, default: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The words after `flag`, and the rest of the command line."""
    if flag not in argv:
        return default, argv
    at = argv.index(flag)
    end = next((i for i in range(at + 1, len(argv)) if argv[i].startswith("--")), len(argv))
    return tuple(argv[at + 1 : end]), argv[:at] + argv[end:]


def claim(out: Path, config: Config) -> None:
    """Write down what the arms of this folder share; raise UserError when it belongs to something else."""
    shared = json.loads(json.dumps({k: v for k, v in config.asdict().items() if k not in OWN}))
    path = out / "shared.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} holds other files; name a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, "config": shared}, indent=1))
        return
    try:
        found = json.loads(path.read_text())
        version, theirs = found["format"], found["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); name a new --out.") from None
    if version != FORMAT:
        raise UserError(f"--out {out} was written in format {version}, not {FORMAT}; name a new folder.")
    for name, value in shared.items():
        if theirs.get(name) != value:
            raise UserError(
                f"--out {out} holds arms with {name} = {theirs.get(name)}, not {value}: they could not be compared; "
                "name a new folder."
            )


def run_arm(arm: str, config: Config, cold: Path) -> None:
    """Train one arm and evaluate it; arm.json, written last, says that it is finished."""
    out = Path(config.out)
    if (out / "config.json").exists():
        config = replace(config, resume=str(out))
    with prepare(config) as run:
        tokens = sum(_TRAIN[arm](run, cold) if arm in _TRAIN else reinforce(run, cold))
        # Of every process that took a step of this arm, and of no step that a resumed one took again.
        seconds = sum(row["time/step"] for row in _metrics(out))
        run.refresh_rollouts()
        found = {}
        for suite, examples in suites(run.config).items():
            found[suite], _ = evaluate(run.engine, run.chat, examples, limits=run.limits, run_call=run.run_call)
            print(f"{arm} {suite}: {found[suite]['accuracy']:.1%} of {found[suite]['n']}", flush=True)
    result = {"arm": arm, "seed": config.seed, "tokens_trained": tokens, "seconds": seconds, "suites": found}
    partial = out / "arm.json.partial"
    partial.write_text(json.dumps(result))
    partial.replace(out / "arm.json")


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
    records = sft.teacher_rollouts(run.chat, examples, run.teacher, run.student.eos_ids[0], config)
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
        run.save(0)
        start = 0
    for step in range(start, c.steps):
        run.log.step(train_step(run, step))
        if (step + 1) % c.save_every == 0 or step + 1 == c.steps:
            run.save(step + 1)
    yield sum(int(row.get("tokens/trained") or 0) for row in _metrics(run.out))


_TRAIN = {"base": untrained, "cold": cold_start, "sft": more_supervision}


def _metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(out: Path) -> list[dict]:
    """All finished arms of the folder, in the order of ARMS and seeds."""
    order = ("base", "cold", *ARMS[1:])
    found = [json.loads(path.read_text()) for path in out.glob("seed-*/*/arm.json")]
    return sorted(found, key=lambda r: (order.index(r["arm"]), r["seed"]))


def table(results: list[dict]) -> str:
    """Markdown: accuracy by suite, then how the arm uses tools on validation, and what it cost."""
    names = list(dict.fromkeys(suite for r in results for suite in r["suites"]))
    header = [*names, "calls", "calls ok", "mix", "tokens", "cut off", "trained tokens", "s"]
    lines = ["| arm | seeds | " + " | ".join(header) + " |", "|---" * (len(header) + 2) + "|"]
    for arm in dict.fromkeys(r["arm"] for r in results):
        rows = [r for r in results if r["arm"] == arm]
        first = [next(iter(r["suites"].values())) for r in rows]
        cells = [_accuracy(results, arm, name) for name in names]
        for key in ("calls/per_episode", "calls/ok", "tools/teacher_similarity", "tokens/mean_sampled", "truncated"):
            known = [row[key] for row in first if row.get(key) is not None]
            cells.append(f"{statistics.fmean(known):.2f}" if known else "")
        cells += [f"{statistics.fmean(r[key] for r in rows):,.0f}" for key in ("tokens_trained", "seconds")]
        lines.append(f"| {arm} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", NOTE])


def _accuracy(results: list[dict], arm: str, suite: str) -> str:
    """Of an arm that started from the cold start: its mean, and the paired change; of the others mean and interval."""
    rows = [r["suites"][suite] for r in results if r["arm"] == arm]
    low, middle, high = _interval(rows)
    if arm in ("base", "cold"):
        return f"{middle:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    change, low, high = change_since_cold(results, arm, suite)
    return f"{middle:.1%} ({100 * change:+.1f}: {100 * low:+.1f} to {100 * high:+.1f})"


def change_since_cold(results: list[dict], arm: str, suite: str) -> tuple[float, float, float]:
    """(change of accuracy, low, high) since the same seed's cold start, over the same questions, seeds pooled.

    A paired bootstrap. Raises UserError when the two did not answer the same questions.
    """
    before: list[int] = []
    after: list[int] = []
    cold = {r["seed"]: r for r in results if r["arm"] == "cold"}
    for r in results:
        if r["arm"] == arm:
            start, end = cold[r["seed"]]["suites"][suite], r["suites"][suite]
            if start["keys"] != end["keys"]:
                raise UserError(
                    f"seed-{r['seed']}/{arm} and seed-{r['seed']}/cold answered different questions of {suite}: they "
                    "were run by different versions; start again with a new --out."
                )
            before += start["correct"]
            after += end["correct"]
    return paired_bootstrap(before, after)


def _interval(rows: list[dict]) -> tuple[float, float, float]:
    """(low, mean, high): over seeds, or with one seed its Wilson interval."""
    values = [row["accuracy"] for row in rows]
    low, high = rows[0]["ci95"] if len(rows) == 1 else (min(values), max(values))
    return low, statistics.fmean(values), high


def picture(results: list[dict], about: str) -> str:
    """The accuracies as an SVG."""
    found: dict[str, dict[str, list[dict]]] = {}
    for r in results:
        for suite, row in r["suites"].items():
            found.setdefault(r["arm"], {}).setdefault(suite, []).append(row)
    suites = list(dict.fromkeys(suite for r in results for suite in r["suites"]))
    seeds = max(len({r["seed"] for r in results if r["arm"] == arm}) for arm in found)
    lines = "95 % Wilson intervals" if seeds == 1 else "lines span the seeds"
    note = f"{about}; {seeds} seed{'s' if seeds > 1 else ''}, {lines}"
    return figure({arm: {s: _interval(rows) for s, rows in by.items()} for arm, by in found.items()}, suites, note)


def curves(out: Path, results: list[dict]) -> str:
    """Share of right answers among the rollouts of each step, the mean over seeds: rewards have different scales."""
    series: dict[str, list[float | None]] = {}
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [[row for row in _metrics(out / f"seed-{r['seed']}" / arm) if row["phase"] == "rl"]
                for r in results if r["arm"] == arm]  # fmt: skip
        length = min(len(run) for run in runs)
        if length:
            series[arm] = [statistics.fmean(run[i]["reward/correct"] for run in runs) for i in range(length)]
    steps = range(max(map(len, series.values()), default=0))
    return line_chart("right answers among the rollouts", list(steps), series, top=1.0) if series else ""
