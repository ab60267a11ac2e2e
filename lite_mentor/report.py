"""report.html: what a run learned, from the run's own files. One file, no script, opens without a network.

`python -m lite_mentor.report RUN` writes it again, also for a run that is not finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite_mentor.charts import interval, line_chart, stacked_chart
from lite_mentor.errors import UserError, guard_terminal, say
from lite_mentor.files import check_folder, replace_file
from lite_mentor.log import RunFiles, is_number, read_run
from lite_mentor.page import escape, render
from lite_mentor.statistics import compare
from lite_mentor.types import CALL_STATUSES, STOP_REASONS

MOST_TEXT = 20_000
"""Characters of a transcript that are shown."""

_STATISTICS = {
    "calls/per_episode": ("calls per episode", "{:.2f}"),
    "calls/share_with_call": ("episodes with a call", "{:.0%}"),
    **{f"calls/{status}": (f"calls: {status.replace('_', ' ')}", "{:.0%}") for status in CALL_STATUSES},
    "tools/teacher_similarity": ("tool mix, 1 - JSD to the teacher's", "{:.2f}"),
    "answered": ("episodes with an answer", "{:.0%}"),
    "truncated": ("episodes cut off", "{:.0%}"),
    "tokens/mean_sampled": ("sampled tokens per episode", "{:.0f}"),
}


def write_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run and return its path. Raises UserError when a file is not sound."""
    run = Path(run)
    check_folder(run, written=False)
    files = read_run(run)
    markup = render(
        title=escape(f"{files.config.get('preset', 'run')} · {files.config.get('student', '')}"),
        date=escape(files.date),
        summary=summary(files),
        body=accuracy_table(files) + charts(files) + tool_table(files) + transcripts(files),
        settings="".join(f"<dt>{escape(k)}</dt><dd>{escape(json.dumps(v))}</dd>" for k, v in files.config.items()),
    )
    target = run / "report.html"
    try:
        replace_file(target, markup.encode())
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); make room or rights there.") from error
    return target


def summary(files: RunFiles) -> str:
    """What happened, in sentences: how long the run was, and for each suite before, after and the difference."""
    steps = {phase: [row for row in files.metrics if row["phase"] == phase] for phase in ("sft", "rl")}
    seconds = sum(_number(row, "time/step") or 0.0 for row in files.metrics)
    parts = [f"{len(steps['rl'])} of {files.config.get('steps', '?')} steps of reinforcement learning"]
    if steps["sft"]:
        parts.append(f"after {len(steps['sft'])} supervised steps on the teacher's records")
    took = f", in {_duration(seconds)}" if seconds else ""
    sentences = [_change(rows) for rows in _by_suite(files).values()]
    if not sentences:
        sentences = ["No evaluation is finished yet."]
    items = "".join(f"<li>{sentence}</li>" for sentence in sentences)
    return f'<p class="lead">{escape(" ".join(parts) + took)}.</p><ul class="findings">{items}</ul>'


def _change(rows: Sequence[Mapping[str, Any]]) -> str:
    """One suite's first and last evaluation, as a sentence."""
    before, after = rows[0], rows[-1]
    suite, result = f"<b>{escape(after['suite'])}</b>", f"<b>{_percent(after['accuracy'])}</b> {_range(after)}"
    if len(rows) == 1:
        return f"{suite}: {result} right at {escape(_label(after))}, of {after['n']} examples."
    start = f"{_percent(before['accuracy'])} {_range(before)}"
    difference = compare(before, after)
    if difference is None:
        return f"{suite}: from {start} to {result}, on different examples, so the two cannot be paired."
    change, low, high = difference
    paired = (
        f"{_points(change)} points on the same {after['n']} examples (95\u00a0%: {_points(low)} to {_points(high)})"
    )
    if low > 0:
        return f"{suite}: up from {start} to {result}: {paired}."
    if high < 0:
        return f"{suite}: down from {start} to {result}: {paired}."
    return f"{suite}: no clear change, from {start} to {result}: {paired}."


def accuracy_table(files: RunFiles) -> str:
    """A row for each suite: accuracy at each stage with its interval, and the paired difference."""
    stages = _stages(files)
    if not stages:
        return ""
    head = "".join(f"<th>{escape(label)}</th>" for label in stages)
    body = []
    for suite, rows in _by_suite(files).items():
        cells = []
        for index, label in enumerate(stages):
            row = next((r for r in reversed(rows) if _label(r) == label), None)
            if row is None:
                cells.append("<td>-</td>")
            else:
                strip = interval(row["ci95"][0], row["accuracy"], row["ci95"][1], index)
                cells.append(f"<td><b>{_percent(row['accuracy'])}</b> <small>{_range(row)}</small>{strip}</td>")
        difference = compare(rows[0], rows[-1]) if len(rows) > 1 else None
        change = "-"
        if difference:
            change = (
                f"<b>{_points(difference[0])}</b> <small>{_points(difference[1])} to {_points(difference[2])}</small>"
            )
        body.append(f"<tr><th>{escape(suite)}</th><td>{rows[-1]['n']}</td>{''.join(cells)}<td>{change}</td></tr>")
    return (
        f"<h2>Accuracy</h2><div class=wide><table><thead><tr><th>suite</th><th>n</th>{head}<th>change, paired</th></tr>"
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p class=note>Share of right answers, decoded greedily; an episode that was cut off counts as wrong. "
        "Small: 95 % Wilson intervals, and for the change the 95 % bootstrap interval over the same examples.</p>"
    )


def tool_table(files: RunFiles) -> str:
    """How tools were used: first evaluation -> last evaluation, for each suite."""
    suites = _by_suite(files)
    keys = [k for rows in suites.values() for row in rows for k in row]
    passes = sorted({k for k in keys if k.startswith("pass@")})
    labels = {**{k: (k, "{:.0%}") for k in passes}, **_STATISTICS}
    body = []
    for key, (label, form) in labels.items():
        cells = []
        for rows in suites.values():
            shown = [_shown(row, key, form) for row in ([rows[0], rows[-1]] if len(rows) > 1 else rows)]
            cells.append(f"<td>{' <i>→</i> '.join(shown)}</td>")
        if any(cell != "<td>-</td>" and cell != "<td>- <i>→</i> -</td>" for cell in cells):
            body.append(f"<tr><th>{escape(label)}</th>{''.join(cells)}</tr>")
    if not body:
        return ""
    mixes = "".join(f"<td><small>{_tool_mix(rows[-1])}</small></td>" for rows in suites.values())
    body.append(f"<tr><th>tools called at the end</th>{mixes}</tr>")
    head = "".join(f"<th>{escape(suite)}</th>" for suite in suites)
    return (
        f"<h2>Use of tools</h2><div class=wide><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def charts(files: RunFiles) -> str:
    """Every curve of the run that has data."""
    cold = [row for row in files.metrics if row["phase"] == "sft"]
    rows = [row for row in files.metrics if row["phase"] == "rl"]
    steps = [row["step"] + 1 for row in rows]

    def columns(rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, list[float | None]]:
        return {label: [_number(row, key) for row in rows] for label, key in keys.items()}

    def line(title: str, keys: Mapping[str, str], **how: Any) -> str:
        return line_chart(title, steps, columns(rows, keys), **how)

    terms = {k: None for row in rows for k in row if k.startswith("reward/")}
    terms = {"reward": "reward/mean", **{k.removeprefix("reward/"): k for k in terms if k[7:] not in ("mean", "std")}}
    seconds = columns(rows, {"rollout": "time/rollout", "tools": "time/tools", "score": "time/score",
                             "update": "time/update"})  # fmt: skip
    # Tools run within the rollout, so the stack shows what is left of it.
    seconds["rollout"] = [
        None if total is None else total - (tools or 0.0)
        for total, tools in zip(seconds["rollout"], seconds["tools"], strict=True)
    ]
    outcomes = {status.replace("_", " "): f"calls/{status}" for status in CALL_STATUSES}
    stops = {reason.replace("_", " "): f"stop/{reason}" for reason in STOP_REASONS}
    made = [
        line("Reward and its terms", terms),
        _accuracy_chart(files),
        stacked_chart("How episodes ended", steps, columns(rows, stops), share=True),
        stacked_chart("How calls ended", steps, columns(rows, outcomes), share=True),
        line("Calls per rollout", {"Calls per rollout": "calls/per_rollout"}),
        line("Groups without variance", {"Groups without variance": "advantage/zero_variance"}, top=1.0),
        line("Entropy", {"Entropy": "entropy"}, unit=" nats"),
        line("KL to the reference", {"KL to the reference": "kl"}, unit=" nats"),
        line("Sampler and trainer disagree by", {"mean": "logp_gap/mean", "max": "logp_gap/max"}, unit=" nats"),
        line("Gradient norm", {"Gradient norm": "grad_norm"}),
        stacked_chart("Seconds a step", steps, seconds, unit=" s"),
        line_chart("Cold start: loss", [row["step"] + 1 for row in cold], columns(cold, {"Cold start: loss": "loss"})),
    ]
    shown = "".join(made)
    return f'<h2>Training</h2><div class="charts">{shown}</div>' if shown else ""


def _accuracy_chart(files: RunFiles) -> str:
    """Accuracy over the run, when it was evaluated more often than before and after."""
    steps = sorted({row["step"] for row in files.evaluations})
    if len(steps) < 3:
        return ""
    series = {}
    for suite, rows in _by_suite(files).items():
        at = {row["step"]: row["accuracy"] for row in rows}
        series[suite] = [at.get(step) for step in steps]
    return line_chart("Accuracy", steps, series)


def transcripts(files: RunFiles) -> str:
    """The best and the worst rollout of the first and of the last recorded step."""
    if not files.rollouts:
        return ""
    cards = []
    for step in dict.fromkeys((files.rollouts[-1]["step"], files.rollouts[0]["step"])):
        ranked = sorted((r for r in files.rollouts if r["step"] == step), key=lambda r: -r["reward"])
        cards.append(_rewarded(f"Step {step + 1}, best", ranked[0], opened=not cards))
        if len(ranked) > 1:
            cards.append(_rewarded(f"Step {step + 1}, worst", ranked[-1], opened=len(cards) == 1))
    return (
        "<h2>Transcripts</h2><p class=note>The <span class=own>student's own text</span>, and "
        f"<span class=injected>what the tools and the template gave back</span>.</p>{''.join(cards)}"
    )


def _rewarded(title: str, row: Mapping[str, Any], *, opened: bool) -> str:
    terms = [f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in row["terms"].items()]
    return transcript(title, [f"reward {row['reward']:.2f}", *terms], row, opened=opened)


def transcript(title: str, marks: Sequence[str], row: Mapping[str, Any], *, opened: bool) -> str:
    """One episode that folds. `row` has question, answer, stop and segments as in rollouts.jsonl; `marks[0]` is bold.

    All text is escaped here, and what is longer than MOST_TEXT is cut.
    """
    left, body = MOST_TEXT, []
    for segment in row["segments"]:
        kind = "own" if segment["sampled"] else "injected"
        body.append(f"<span class={kind}>{escape(segment['text'][:left])}</span>")
        left = max(0, left - len(segment["text"]))
    if not left:
        body.append(f"<span class=note> ... (cut after {MOST_TEXT} characters)</span>")
    first, *others = (escape(mark) for mark in marks)
    chips = "".join(f"<span class=chip>{mark}</span>" for mark in (f"<b>{first}</b>", *others))
    answer = " or ".join(str(a) for a in row["answer"])
    return (
        f"<details{' open' if opened else ''}><summary><b>{escape(title)}</b>{chips}"
        f"<span class=chip>ended by {escape(row['stop'])}</span></summary>"
        f"<p class=question>{escape(row['question'])}</p><p class=note>Right answer: {escape(answer)}</p>"
        f"<pre>{''.join(body)}</pre></details>"
    )


def _by_suite(files: RunFiles) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in files.evaluations:
        out.setdefault(row["suite"], []).append(row)
    return out


def _stages(files: RunFiles) -> list[str]:
    """The evaluations that the table shows: the first, the one after the cold start, and the last."""
    labels = list(dict.fromkeys(_label(row) for row in files.evaluations))
    return labels if len(labels) < 4 else [x for x in labels if x in (labels[0], "cold start", labels[-1])]


def _label(row: Mapping[str, Any]) -> str:
    return row["name"].replace("_", " ") if row["name"] != "step" else f"step {row['step']}"


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return float(value) if is_number(value) else None


def _shown(row: Mapping[str, Any], key: str, form: str) -> str:
    value = _number(row, key)
    return "-" if value is None else form.format(value).replace("%", "\u00a0%")


def _tool_mix(row: Mapping[str, Any]) -> str:
    shares = {k[5:]: _number(row, k) or 0.0 for k in row if k.startswith("tool/")}
    ranked = sorted(shares.items(), key=lambda item: -item[1])
    return "<br>".join(f"{escape(name)} {share:.0%}".replace("%", "\u00a0%") for name, share in ranked[:6]) or "-"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _range(row: Mapping[str, Any]) -> str:
    low, high = row["ci95"]
    return f"({100 * low:.1f} to {100 * high:.1f})"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report of the run that the command line names."""
    guard_terminal()
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit("usage: python -m lite_mentor.report RUN")
    try:
        say(str(write_report(Path(arguments[0]))))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
