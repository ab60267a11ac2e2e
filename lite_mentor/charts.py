"""Small charts as SVG text: no library, no script, and colours from the page's own style sheet.

A chart is a <figure> whose series use the CSS variables --c0 .. --c7, so it follows the page into dark mode. Hovering
over a step tells its values. A chart without any known value is "".
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Series = Mapping[str, Sequence[float | None]]
"""Named values, one for each step; None where nothing was measured."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 220, 46, 10, 10, 24
MOST_POINTS = 200
COLOURS = 8


def line_chart(title: str, steps: Sequence[int], series: Series, *, top: float | None = None, unit: str = "") -> str:
    """Each series as a faint line and, from 10 points on, its moving average as a bold one. `top` fixes the axis."""
    steps, series = _thin(steps, {k: v for k, v in series.items() if any(x is not None for x in v)})
    if not series:
        return ""
    known = [x for values in series.values() for x in values if x is not None]
    frame = _Frame(steps, min(0.0, *known), max(top or 0.0, *known))
    window = len(steps) // 10
    body = []
    for index, values in enumerate(series.values()):
        smooth = _moving_average(values, window) if window else values
        if window:
            body.append(f'<path class="raw c{index % COLOURS}" d="{frame.path(values)}"/>')
        body.append(f'<path class="line c{index % COLOURS}" d="{frame.path(smooth)}"/>')
    return _figure(title, frame, "".join(body), steps, series, unit)


def stacked_chart(title: str, steps: Sequence[int], series: Series, *, share: bool = False, unit: str = "") -> str:
    """Bars of the series on top of each other; `share` scales every bar to 1. An unknown value adds nothing."""
    steps, series = _thin(steps, {k: v for k, v in series.items() if any(v)})
    if not series:
        return ""
    totals = [sum(x or 0.0 for x in column) for column in zip(*series.values(), strict=True)]
    if share:
        series = {
            k: [None if x is None or not total else x / total for x, total in zip(v, totals, strict=True)]
            for k, v in series.items()
        }
    frame = _Frame(steps, 0.0, 1.0 if share else max(totals))
    width = (frame.x(1) - frame.x(0)) * 0.86 if len(steps) > 1 else 24.0
    body, floor = [], [0.0] * len(steps)
    for index, values in enumerate(series.values()):
        for i, value in enumerate(values):
            if value:
                y, height = frame.y(floor[i] + value), frame.y(floor[i]) - frame.y(floor[i] + value)
                body.append(
                    f'<rect class="bar f{index % COLOURS}" x="{frame.x(i) - width / 2:.1f}" y="{y:.1f}" '
                    f'width="{width:.1f}" height="{height:.1f}"/>'
                )
                floor[i] += value
    return _figure(title, frame, "".join(body), steps, series, unit)


def interval(low: float, middle: float, high: float, colour: int) -> str:
    """A share in [0, 1] with its interval, as a strip that is 100 % wide."""
    return (
        '<svg class="interval" viewBox="0 0 200 12" preserveAspectRatio="none" aria-hidden="true">'
        '<line class="grid" x1="0" x2="200" y1="6" y2="6"/>'
        f'<line class="line c{colour}" x1="{200 * low:.1f}" x2="{200 * high:.1f}" y1="6" y2="6"/>'
        f'<line class="mark c{colour}" x1="{200 * middle:.1f}" x2="{200 * middle:.1f}" y1="1" y2="11"/></svg>'
    )


class _Frame:
    """Maps (index of a step, value) to the plane of the drawing."""

    def __init__(self, steps: Sequence[int], low: float, high: float) -> None:
        self.steps = steps
        self.ticks = _ticks(low, high if high > low else low + 1.0)
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])
        # Bars are centred on their step, so the outer ones need half a place more.
        self.place = (WIDTH - LEFT - RIGHT) / len(steps)

    def x(self, index: float) -> float:
        return LEFT + (index + 0.5) * self.place

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def path(self, values: Sequence[float | None]) -> str:
        """A polyline with gaps at None; a lone point becomes a dot (a line of no length with round ends)."""
        out, pen_down = [], False
        for i, value in enumerate(values):
            if value is not None:
                out.append(
                    f"{'L' if pen_down else 'M'}{self.x(i):.1f} {self.y(value):.1f}" + ("" if pen_down else "h0")
                )
            pen_down = value is not None
        return "".join(out)

    def axes(self) -> str:
        out = []
        for tick in self.ticks:
            y = self.y(tick)
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
        stride = max(1, round(_stride((self.steps[-1] - self.steps[0]) / 6))) if len(self.steps) > 6 else 1
        passed = (self.steps[0] - 1) // stride
        for i, step in enumerate(self.steps):
            if step // stride > passed:  # a thinned run may step over the round number itself
                passed = step // stride
                x, y = self.x(i), HEIGHT - 7
                out.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{passed * stride}</text>')
        return "".join(out)


def _figure(title: str, frame: _Frame, body: str, steps: Sequence[int], series: Series, unit: str) -> str:
    hits = []
    for i, step in enumerate(steps):
        values = "".join(f"\n{name}  {_number(v[i])}{unit}" for name, v in series.items() if v[i] is not None)
        hits.append(
            f'<rect class="hit" x="{frame.x(i) - frame.place / 2:.1f}" y="{TOP}" width="{frame.place:.2f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>step {step}{html.escape(values)}</title></rect>'
        )
    names = list(series)
    legend = "".join(f'<span><i class="f{i % COLOURS}"></i>{html.escape(n)}</span>' for i, n in enumerate(names))
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b>{legend if names != [title] else ''}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{frame.axes()}{body}{''.join(hits)}</svg></figure>"
    )


def _thin(steps: Sequence[int], series: Series) -> tuple[list[int], dict[str, list[float | None]]]:
    """At most MOST_POINTS steps: neighbours are averaged, and named by the first of them."""
    size = max(1, math.ceil(len(steps) / MOST_POINTS))
    starts = range(0, len(steps), size)
    return [steps[i] for i in starts], {k: [_mean(v[i : i + size]) for i in starts] for k, v in series.items()}


def _moving_average(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of a value and up to `window` on either side, as many on both, so that the ends stay where they are."""
    out = []
    for i, value in enumerate(values):
        reach = min(window, i, len(values) - 1 - i)
        out.append(None if value is None else _mean(values[i - reach : i + reach + 1]))
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that span the values; the ends lie at or outside low and high."""
    stride = _stride((high - low) / 4)
    first, last = math.floor(low / stride + 1e-9), math.ceil(high / stride - 1e-9)
    return [round(i * stride, 12) for i in range(first, last + 1)]


def _stride(rough: float) -> float:
    """The next round number: 1, 2, 2.5 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)


def _number(value: float) -> str:
    if value and (abs(value) < 0.001 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 10 else f"{value:.4g}"
