"""What a run shows: one live display in a terminal, one plain line a step elsewhere, and warnings in both."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lite_mentor.errors import printable, say

_NAMES = {"sft": "cold start", "rl": "step"}
_SPARKS = "▁▂▃▄▅▆▇█"


class Display:
    """The state of what is on the screen. `quiet` shows nothing at all."""

    def __init__(self, config: Mapping[str, Any], total_steps: int, quiet: bool) -> None:
        self.history: list[Mapping[str, Any]] = []
        """The metrics of the steps so far."""
        self._config, self._total_steps, self._quiet = config, total_steps, quiet
        self._accuracy: dict[str, list[str]] = {}
        self._warnings: list[str] = []
        self._live = None
        if not quiet and sys.stdout.isatty():
            self._live = Live(get_renderable=self.render, console=Console(), refresh_per_second=4)
            self._live.start()

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a step. A warning is printed when it appears, and stays in the live display as long as it holds."""
        new = warnings_for(metrics, self.history)
        self.history.append(metrics)
        if not self._live:
            self.note(step_line(metrics, self._total(metrics["phase"]), self._eta()))
            for warning in new:
                if warning not in self._warnings:
                    self.note(f"  warning: {warning}")
        self._warnings = new

    def evaluation(self, name: str, suite: str, result: Mapping[str, Any]) -> None:
        """Show one evaluation of one suite."""
        low, high = result["ci95"]
        right = f"{100 * result['accuracy']:.1f} %"
        self._accuracy.setdefault(suite, []).append(f"{name} {right}")
        self.note(f"{name}  {suite}: {right} right (95 %: {100 * low:.1f} to {100 * high:.1f}, n = {result['n']})")

    def note(self, text: str) -> None:
        """Print a line, above the live display if there is one."""
        if self._quiet:
            return
        if self._live:
            self._live.console.print(_text(text))
        else:
            say(text)

    def close(self) -> None:
        """Leave the last state of the live display standing."""
        if self._live:
            self._live.stop()

    def render(self) -> Panel | Text:
        """The live display: what a person wants to see at a glance."""
        if not self.history:
            return _text("")
        row = self.history[-1]
        phase, total, eta = row["phase"], self._total(row["phase"]), self._eta()
        bar = Table.grid(padding=(0, 2))
        left = "" if eta is None else f"ETA {_duration(eta)}"
        bar.add_row(ProgressBar(total=total, completed=row["step"] + 1, width=40), _text(left))
        grid = Table.grid(padding=(0, 2))
        for label, text in _fields(row).items():
            if label == "reward" and self._live and "utf" in self._live.console.encoding:
                text += "  " + _sparkline([r.get("reward/mean") for r in self.history[-32:]])
            grid.add_row(_text(label, "dim"), _text(text))
        for suite, results in self._accuracy.items():
            grid.add_row(_text(suite, "dim"), _text("  ".join(results)))
        alarms = [_text(f"! {warning}", "bold yellow") for warning in self._warnings]
        title = f"{self._config['preset']}  {self._config['student']}  {_NAMES[phase]} {row['step'] + 1}/{total}"
        return Panel(Group(bar, grid, *alarms), title=_text(title), title_align="left")

    def _total(self, phase: str) -> int:
        return self._total_steps if phase == "rl" else self._config["sft_steps"]

    def _eta(self) -> float | None:
        """Seconds left in this phase, at the pace of its last ten steps."""
        last = self.history[-1]
        recent = [row.get("time/step") for row in self.history[-10:] if row["phase"] == last["phase"]]
        if None in recent:
            return None
        return sum(recent) / len(recent) * (self._total(last["phase"]) - last["step"] - 1)


def _text(text: str, style: str = "") -> Text:
    """Text in which no character and no [bold] means more than itself."""
    return Text(printable(text), style)


def step_line(metrics: Mapping[str, Any], total: int, eta: float | None) -> str:
    """One plain line for a step; what was not measured is left out."""
    fields = [text if label in ("speed", "memory") else f"{label} {text}" for label, text in _fields(metrics).items()]
    left = [] if eta is None else [f"ETA {_duration(eta)}"]
    return "  ".join([f"{_NAMES[metrics['phase']]} {metrics['step'] + 1}/{total}", *fields, *left])


def _fields(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The few numbers of a step worth a person's glance, as text."""

    def brackets(prefix: str, without: tuple[str, ...], digits: int) -> str:
        parts = {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix) and v is not None}
        shown = [f"{k} {v:.{digits}f}" for k, v in parts.items() if k not in without and f"{v:.{digits}f}" != "0.0"]
        return f" ({' '.join(shown)})" if shown else ""

    known = {k: v for k, v in metrics.items() if v is not None}
    out = {}
    if "reward/mean" in known:
        out["reward"] = f"{known['reward/mean']:.2f}" + brackets("reward/", ("mean", "std"), 2)
    for label in ("loss",) if metrics["phase"] == "sft" else ("entropy", "kl"):
        if label in known:
            out[label] = f"{known[label]:.3f}" if label == "kl" else f"{known[label]:.2f}"
    if known.get("time/step"):
        speed = f"{known['tokens/sampled'] / known['time/step']:.0f} tok/s  " if "tokens/sampled" in known else ""
        out["speed"] = f"{speed}{known['time/step']:.1f} s" + brackets("time/", ("step",), 1)
    if "memory/peak" in known:
        out["memory"] = f"{known['memory/peak'] / 2**30:.1f} GiB"
    return out


def warnings_for(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should look into after this step: a sentence each, with what to change.

    `history` holds the metrics of the earlier steps. `advantage/zero_variance` is a share of the step's groups.
    """
    known = {k: v for k, v in metrics.items() if v is not None}
    past = [row for row in history if row.get("phase") == metrics.get("phase")]
    found = []
    if any(isinstance(v, float) and not math.isfinite(v) for v in (known.get("loss"), known.get("grad_norm"))):
        found.append("the gradient is not finite, so this update was skipped; if it recurs, lower --lr.")
    if known.get("advantage/zero_variance") == 1:
        found.append(
            "every group has zero variance: nothing to learn from in this step; "
            "raise --group-size or --temperature, or choose --levels that are sometimes solved."
        )
    else:
        recent = [r.get("advantage/zero_variance") for r in [*past[-4:], metrics]]
        if len(recent) == 5 and None not in recent and sum(recent) / 5 > 0.8:
            found.append(
                "over 80 % of the groups of the last 5 steps have zero variance; choose harder or easier --levels."
            )
    entropies = [r["entropy"] for r in [*past, metrics] if r.get("entropy") is not None]
    if len(entropies) >= 8:
        first, last = sum(entropies[:5]) / 5, sum(entropies[-3:]) / 3
        if last < first / 5:
            found.append(f"entropy collapsed from {first:.3f} to {last:.3f}; lower --lr or set --entropy 0.001.")
    if known.get("ratio/max", 1.0) > 10:
        found.append(
            f"a token became {known['ratio/max']:.0f} times as likely in one step; lower --lr or --updates-per-step."
        )
    if known.get("logp_gap/mean", 0.0) > 0.1:
        found.append(
            f"sampler and trainer disagree by {known['logp_gap/mean']:.2f} nats a token; keep --tis-cap on, "
            "and --top-k and --top-p off."
        )
    return found + _spikes(known, past) + _fallen_reward([*past, metrics])


def _spikes(known: Mapping[str, Any], past: Sequence[Mapping[str, Any]]) -> list[str]:
    """A loss or a gradient far from the last 20 of its phase. Both may be near 0, the loss of either sign."""
    found = []
    for name, what, factor, allowance in (("loss", "the loss", 3, 1.0), ("grad_norm", "the gradient's norm", 10, 0.0)):
        recent = [abs(row[name]) for row in past[-20:] if row.get(name) is not None and math.isfinite(row[name])]
        if len(recent) < 8 or not math.isfinite(known.get(name, math.nan)):
            continue
        usual = statistics.median(recent)
        if usual and abs(known[name]) > factor * usual + allowance:
            found.append(
                f"{what} jumped to {known[name]:.3g}, where {usual:.3g} is usual; if it recurs, lower --lr or "
                "--max-grad-norm."
            )
    return found


def _fallen_reward(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The mean reward of the last five steps is less than half of what five steps in a row had before."""
    rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
    fives = [sum(rewards[i : i + 5]) / 5 for i in range(len(rewards) - 4)]
    if len(fives) < 10 or not 0 <= fives[-1] < max(fives) / 2:
        return []
    return [
        f"the reward fell from {max(fives):.2f} to {fives[-1]:.2f} (means of 5 steps); read rollouts.jsonl, and start "
        "again with a lower --lr."
    ]


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def _sparkline(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    return "".join(_SPARKS[int(7 * (v - low) / span)] if span else _SPARKS[0] for v in known)
