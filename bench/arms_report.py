"""What `python -m bench arms` writes about the finished arms of its folder.

report.html   table, figure, curves and transcripts in one page: no script, opens without a network
table.md      the same table for a README
figure.svg    the same figure
arms.json     the results themselves
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from bench.figure import figure
from lite_mentor.charts import line_chart
from lite_mentor.config import Config
from lite_mentor.errors import UserError
from lite_mentor.page import escape, render
from lite_mentor.report import transcript
from lite_mentor.statistics import paired_bootstrap

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


def write_results(out: Path, config: Config, about: Mapping[str, object]) -> str:
    """Write the four files and return the table. Raises UserError when the arms of the folder cannot be compared."""
    results = collect(out)
    text = table(results)
    when = f"{about['date']}, commit {about['commit']}"
    drawn = picture(results, f"{about['preset']}, {when}")
    without_text = [{k: v for k, v in r.items() if k != "transcripts"} for r in results]
    (out / "arms.json").write_text(json.dumps({**about, "arms": without_text}, indent=1))
    (out / "table.md").write_text(json.dumps(about) + "\n\n" + text + "\n")
    (out / "figure.svg").write_text(drawn)
    settings = {k: v for k, v in config.asdict().items() if k not in OWN}
    page = render(
        title=escape(f"Arms · {config.preset} · {config.student}"),
        date=escape(when),
        summary=summary(out, results, str(about["command"])),
        body=html_table(results, drawn) + curves(out, results) + transcripts(results),
        settings="".join(f"<dt>{escape(k)}</dt><dd>{escape(json.dumps(v))}</dd>" for k, v in settings.items()),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return text


def metrics_of(folder: Path) -> list[dict]:
    """The lines of an arm's metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(out: Path) -> list[dict]:
    """All finished arms of the folder, in the order of ARMS and seeds. Raises UserError for one that does not fit."""
    order = ("base", "cold", *ARMS[1:])
    shared = _read(out / "shared.json", ("format", "config"))["config"]
    fields = ("arm", "seed", "tokens_trained", "seconds", "suites", "transcripts", "cold_start")
    found = [_read(path, fields) for path in out.glob("seed-*/*/arm.json")]
    starts = {r["seed"]: r["cold_start"] for r in found if r["arm"] == "cold"}
    for r in found:
        folder = out / f"seed-{r['seed']}" / r["arm"]
        config = _read(folder / "config.json", tuple(shared))
        for name, value in shared.items():
            # A run writes down what `auto` came to mean on its machine.
            if config[name] != value and value != "auto":
                raise UserError(
                    f"{folder} ran with {name} = {config[name]} and this folder's arms with {value}: they cannot be "
                    "compared; take it out of the folder."
                )
        if r["arm"] != "base" and r["cold_start"] != starts.get(r["seed"]):
            raise UserError(
                f"{folder} did not start from {folder.parent / 'cold'}, so its change cannot be measured; delete it, "
                "and this command runs it again."
            )
    return sorted(found, key=lambda r: (order.index(r["arm"]), r["seed"]))


def _read(path: Path, fields: tuple[str, ...]) -> dict:
    try:
        found = json.loads(path.read_text())
        missing = [name for name in fields if name not in found]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete its folder, and run the arms again.") from None
    if missing:
        raise UserError(f"{path} has no {missing[0]}, so another version wrote it; start again with a new --out.")
    return found


def cells(results: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The table: its header, and a row for each arm."""
    names = list(dict.fromkeys(suite for r in results for suite in r["suites"]))
    header = ["arm", "seeds", *names, "calls", "calls ok", "mix", "tokens", "cut off", "trained tokens", "s"]
    out = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        rows = [r for r in results if r["arm"] == arm]
        first = [next(iter(r["suites"].values())) for r in rows]
        row = [arm, str(len(rows)), *(_accuracy(results, arm, name) for name in names)]
        for key in ("calls/per_episode", "calls/ok", "tools/teacher_similarity", "tokens/mean_sampled", "truncated"):
            known = [r[key] for r in first if r.get(key) is not None]
            row.append(f"{statistics.fmean(known):.2f}" if known else "")
        row += [f"{statistics.fmean(r[key] for r in rows):,.0f}" for key in ("tokens_trained", "seconds")]
        out.append(row)
    return header, out


def table(results: list[dict]) -> str:
    """Markdown: accuracy by suite, then how the arm uses tools on the first suite, and what it cost."""
    header, rows = cells(results)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
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


def summary(out: Path, results: list[dict], command: str) -> str:
    """What ran, and which arms have begun but are not finished."""
    suites = {name: row["n"] for r in results for name, row in r["suites"].items()}
    seeds = len({r["seed"] for r in results})
    asked = ", ".join(f"{n} of {escape(name)}" for name, n in suites.items())
    begun = sorted(str(p.parent.relative_to(out)) for p in out.glob("seed-*/*/config.json"))
    unfinished = [name for name in begun if not (out / name / "arm.json").exists()]
    lines = [f"Every arm answered the same questions: {asked}.", f"<code>{escape(command)}</code>"]
    if unfinished:
        lines.insert(0, f"Not finished, so not shown: {escape(', '.join(unfinished))}; the same command goes on.")
    arms = len({r["arm"] for r in results})
    items = "".join(f"<li>{line}</li>" for line in lines)
    lead = f"{arms} arms, {seeds} seed{'s' if seeds > 1 else ''}, one cold start for each."
    return f'<p class="lead">{lead}</p><ul class="findings">{items}</ul>'


def html_table(results: list[dict], drawn: str) -> str:
    """The table of table.md, and the figure."""
    header, rows = cells(results)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<h2>Accuracy</h2><div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f"<p class=note>{escape(NOTE)}</p><figure>{drawn}</figure>"
    )


def curves(out: Path, results: list[dict]) -> str:
    """Of the RL arms, the mean over seeds by step. Rewards have different scales, right answers have one."""
    series: dict[str, dict[str, list[float | None]]] = {"reward/correct": {}, "reward/mean": {}}
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [[row for row in metrics_of(out / f"seed-{r['seed']}" / arm) if row["phase"] == "rl"]
                for r in results if r["arm"] == arm]  # fmt: skip
        length = min(len(run) for run in runs)
        for key, by_arm in series.items() if length else ():
            columns = [[run[i][key] for run in runs] for i in range(length)]
            by_arm[arm] = [None if None in column else statistics.fmean(column) for column in columns]
    steps = list(range(1, 1 + max(map(len, series["reward/mean"].values()), default=0)))
    drawn = line_chart("Right answers among the rollouts", steps, series["reward/correct"], top=1.0)
    drawn += line_chart("Reward, each arm's own", steps, series["reward/mean"])
    return f'<h2>Training</h2><div class="charts">{drawn}</div>' if drawn else ""


def transcripts(results: list[dict]) -> str:
    """The first questions of every suite but the first, with each arm's episode; of the first seed."""
    first = next(iter(results[0]["suites"]))
    seed = min(r["seed"] for r in results)
    by_question: dict[tuple[str, str], list[str]] = {}
    for r in results:
        for row in r["transcripts"] if r["seed"] == seed else ():
            if row["suite"] != first:
                cards = by_question.setdefault((row["suite"], row["question"]), [])
                cards.append(transcript(r["arm"], ["right" if row["correct"] else "wrong"], row, opened=False))
    shown = "".join(
        f"<p><b>{escape(suite)}</b>: {escape(question[:200])}</p>{''.join(cards)}"
        for (suite, question), cards in by_question.items()
    )
    return (
        f"<h2>Transcripts</h2><p class=note>Seed {seed}. The <span class=own>student's own text</span>, and "
        f"<span class=injected>what the tools and the template gave back</span>.</p>{shown}"
    )
