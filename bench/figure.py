"""One picture of all arms: a panel for each suite, a row for each arm, a dot for its accuracy and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

NAMES, PANEL, GAP, ROW, TOP, BOTTOM = 92, 150, 66, 22, 34, 34

Interval = tuple[float, float, float]
"""(low, middle, high), shares in [0, 1]."""


def figure(rows: Mapping[str, Mapping[str, Interval]], suites: Sequence[str], note: str) -> str:
    """A standalone SVG of `rows[arm][suite]`; an arm that has no such suite leaves its place empty."""
    width, height = NAMES + len(suites) * (PANEL + GAP), TOP + len(rows) * ROW + BOTTOM
    body = [_text(0, TOP + (i + 0.5) * ROW + 4, arm, "name") for i, arm in enumerate(rows)]
    for column, suite in enumerate(suites):
        left = NAMES + column * (PANEL + GAP)
        found = {arm: by_suite[suite] for arm, by_suite in rows.items() if suite in by_suite}
        body += _panel(left, suite, [found.get(arm) for arm in rows])
    body.append(_text(0, height - 4, note, "note"))
    return (
        f'<svg class="arms" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="Accuracy of every arm on every suite"><style>{_STYLE}</style>'
        f'<rect class="page" width="{width}" height="{height}"/>{"".join(body)}</svg>'
    )


def _panel(left: int, title: str, intervals: Sequence[Interval | None]) -> list[str]:
    bottom = TOP + len(intervals) * ROW
    most = max((high for _, _, high in filter(None, intervals)), default=0.0)
    top = next(t for t in (0.1, 0.2, 0.5, 1.0) if most <= t)
    out = [_text(left, TOP - 16, title, "title")]
    for tick in (0.0, 0.5, 1.0):
        x = left + tick * PANEL
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
        out.append(_text(x, bottom + 12, f"{tick * top:.0%}", "tick"))
    for i, interval in enumerate(intervals):
        if interval is not None:
            low, middle, high = (left + value / top * PANEL for value in interval)
            y = TOP + (i + 0.5) * ROW
            out.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
            out.append(f'<circle class="dot" cx="{middle:.1f}" cy="{y}" r="4.5"/>')
            out.append(_text(left + PANEL + 10, y + 4, f"{interval[1]:.1%}", "value"))
    return out


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


# Within a page these rules must not reach what is outside the figure.
_STYLE = (
    ".arms text{font:12px system-ui,sans-serif;fill:#1d1f23}.arms .page{fill:#fff}.arms .title{font-weight:600}"
    ".arms .name{font-weight:500}.arms .note{fill:#6a6f78;font-size:11px}.arms .value{fill:#6a6f78;font-size:11px}"
    ".arms .tick{fill:#6a6f78;font-size:10px;text-anchor:middle}.arms .grid{stroke:#e3e4e0}"
    ".arms .range{stroke:#2f6fde;stroke-width:2;stroke-linecap:round;opacity:.45}.arms .dot{fill:#2f6fde}"
)
