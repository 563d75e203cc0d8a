"""Charts as inline SVG text: pure functions of numbers, coloured by the page's stylesheet, no script needed.

Every chart carries a `<title>` for screen readers; every mark a `<title>` of its own that browsers show on
hover. Text given by callers is escaped here, so a chart is safe to place in a page as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
_WIDTH, _HEIGHT = 410.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 12.0, 38.0


@dataclass(frozen=True)
class Line:
    """One series of a chart; `style` is the CSS class of its colour, `faint` are raw points drawn behind."""

    label: str
    points: Sequence[Point]
    style: str
    faint: Sequence[Point] = ()


@dataclass(frozen=True)
class Scale:
    """A linear map of data to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Three to seven round numbers inside the scale."""
        step = _round_step((self.high - self.low) / 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 2.5, 5, 10, 20) if power * m >= rough * (1 - 1e-9))


def scale(
    values: Sequence[float], start: float, end: float, include: Sequence[float] = (), room: float = 0.06
) -> Scale:
    """A scale that holds all values with a little room; constant values get a scale of some width."""
    known = [*values, *include]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    # Below a billionth of its size a difference is rounding noise, and ticks would stop being distinct.
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-300):
        reach = 0.1 * abs(low) or 0.5
        low, high = low - reach, high + reach
    margin = (high - low) * room
    return Scale(low - margin, high + margin, start, end)


def short(value: float) -> str:
    """A number for a tick or a card: three significant digits, thousands and more with a letter."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        mantissa, _, power = f"{value:.2g}".partition("e") if size < 1e-4 or size >= 1e12 else (f"{value:.2g}", "", "")
        return _minus(f"{mantissa}e{int(power)}" if power else mantissa)
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return _minus(f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}")
    return _minus(f"{value:.3g}" if size < 999.5 else f"{value:.0f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def line_chart(
    lines: Sequence[Line],
    title: str,
    x_label: str = "step",
    y_label: str = "",
    include: Sequence[float] = (),
) -> str:
    """Series over steps. `include` are values the vertical axis must show (0 for shares, for example)."""
    drawn = [line for line in lines if line.points]
    x = scale([p[0] for line in drawn for p in line.points], _LEFT, _WIDTH - _RIGHT, room=0.0)
    values = [p[1] for line in drawn for p in (*line.points, *line.faint)]
    y = scale(values, _HEIGHT - _BOTTOM, _TOP, include)
    body = [_axes(x, y, x_label, y_label)]
    body += [_stroke(line.faint, x, y, f"faint {line.style}") for line in drawn if line.faint]
    body += [_series(line, x, y) for line in drawn]
    return _figure(body, title)


def _series(line: Line, x: Scale, y: Scale) -> str:
    hovers = (
        _circle(p, x, y, 6, "hover", f"{line.label}: {short(p[1])} at {short(p[0])}") for p in thin(line.points, 60)
    )
    end = _circle(line.points[-1], x, y, 3.4, f"end {line.style}", "")
    return _stroke(line.points, x, y, f"line {line.style}") + end + "".join(hovers)


def frontier(lines: Sequence[Line], title: str, x_label: str, y_label: str) -> str:
    """Paths through (KL, score) in the order of training: hollow dot where it began, large where it ended."""
    drawn = [line for line in lines if line.points]
    x = scale([p[0] for line in drawn for p in line.points], _LEFT, _WIDTH - _RIGHT, (0.0,), 0.03)
    y = scale([p[1] for line in drawn for p in line.points], _HEIGHT - _BOTTOM, _TOP)
    body = [_axes(x, y, x_label, y_label)]
    for line in drawn:
        said = [f"{line.label}: {short(score)} at {short(kl)} nats" for kl, score in line.points]
        body.append(_stroke(line.points, x, y, f"line thin {line.style}"))
        inner = zip(line.points[1:-1], said[1:-1], strict=True)
        body += [_circle(p, x, y, 2.3, f"dot {line.style}", text) for p, text in inner]
        body.append(_circle(line.points[0], x, y, 4.5, f"start {line.style}", f"start · {said[0]}"))
        body.append(_circle(line.points[-1], x, y, 5.5, f"end {line.style}", f"end · {said[-1]}"))
    return _figure(body, title)


def calibration_chart(bins: Sequence[tuple[float, float, float]], title: str) -> str:
    """(said, was right, weight in [0, 1]) of each bin; a dot's area is its share of pairs."""
    x, y = Scale(0.5, 1.0, _LEFT, _WIDTH - _RIGHT), Scale(0.0, 1.0, _HEIGHT - _BOTTOM, _TOP)
    body = [_axes(x, y, "confidence of the model", "share it got right")]
    body.append(_stroke([(0.5, 0.5), (1.0, 1.0)], x, y, "guide"))
    body.append(_stroke([(said, right) for said, right, _ in bins], x, y, "line thin proxy"))
    for said, right, weight in bins:
        text = f"said {said:.0%}, was right {right:.0%}, {weight:.0%} of pairs"
        body.append(_circle((said, right), x, y, 3 + 9 * math.sqrt(weight), "end proxy", text))
    return _figure(body, title)


@dataclass(frozen=True)
class Bar:
    """A share as a horizontal bar; `low` and `high` draw its interval."""

    label: str
    value: float
    style: str
    low: float | None = None
    high: float | None = None


def bars(rows: Sequence[Bar], title: str, chance: float | None = 0.5) -> str:
    """Shares in [0, 1], one under the other, with a dashed line at chance."""
    x = Scale(0.0, 1.0, 150.0, _WIDTH - 52)
    height = 32.0 * len(rows) + 24
    body = [_bar(row, x, 6 + 32.0 * i) for i, row in enumerate(rows)]
    if chance is not None:
        at = x(chance)
        body.append(f'<path class="guide" d="M{at:.1f} 2V{height - 18:.1f}"/>')
        body.append(_text(at, height - 5, "chance", "tick", "middle"))
    return _svg("".join(body), title, _WIDTH, height, "chart")


def _bar(row: Bar, x: Scale, top: float) -> str:
    width = x(min(max(row.value, 0.0), 1.0)) - x.start
    parts = [
        _text(x.start - 8, top + 13, row.label, "label", "end"),
        _rectangle(x.start, top, x.end - x.start, 18, "track", ""),
        _rectangle(x.start, top, width, 18, f"fill {row.style}", f"{row.label}: {row.value:.1%}"),
    ]
    if row.low is not None and row.high is not None:
        low, high, middle = x(max(0.0, row.low)), x(min(1.0, row.high)), top + 9
        caps = f"M{low:.1f} {middle - 4:.1f}v8M{high:.1f} {middle - 4:.1f}v8"
        said = _title(f"95 % interval {row.low:.1%} to {row.high:.1%}")
        parts.append(f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}{caps}">{said}</path>')
    parts.append(_text(x.end + 6, top + 13, f"{row.value:.1%}", "amount", "start"))
    return "".join(parts)


def interval_bar(estimate: float, low: float, high: float, reference: float, title: str) -> str:
    """A slim bar for a card: where an estimate and its interval lie in [0, 1] beside a reference."""
    x, y = Scale(0.0, 1.0, 6.0, 194.0), Scale(0.0, 1.0, 16.0, 0.0)
    body = (
        _rectangle(6, 5, 188, 6, "track", "")
        + _rectangle(x(low), 5, max(1.0, x(high) - x(low)), 6, "range", f"{low:.1%} to {high:.1%}")
        + f'<path class="guide" d="M{x(reference):.1f} 0V16"/>'
        + _circle((estimate, 0.5), x, y, 4.5, "end ink", f"{estimate:.1%}")
    )
    return _svg(body, title, 200, 16, "mini")


def sparkline(points: Sequence[Point], title: str) -> str:
    """The shape of a series, without axes."""
    x = scale([p[0] for p in points], 2, 98, room=0.0)
    y = scale([p[1] for p in points], 22, 2)
    return _svg(_stroke(thin(points, 100), x, y, "line thin ink"), title, 100, 24, "spark")


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points, evenly spaced, the last always among them."""
    if len(points) <= most:
        return list(points)
    kept = list(points[:: math.ceil(len(points) / most)])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    parts: list[str] = []
    for tick in y.ticks:
        at = y(tick)
        parts.append(f'<path class="grid" d="M{x.start:.1f} {at:.1f}H{x.end:.1f}"/>')
        parts.append(_text(x.start - 7, at + 3.8, short(tick), "tick", "end"))
    parts += [_text(x(tick), y.start + 15, short(tick), "tick", "middle") for tick in x.ticks]
    parts.append(_text((x.start + x.end) / 2, y.start + 31, x_label, "axis", "middle"))
    if y_label:
        turn = f"translate(12 {(y.start + y.end) / 2:.1f}) rotate(-90)"
        parts.append(f'<text class="axis" transform="{turn}" text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _stroke(points: Sequence[Point], x: Scale, y: Scale, style: str) -> str:
    path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
    return f'<path class="{style}" d="M{path}"/>' if path else ""


def _circle(point: Point, x: Scale, y: Scale, radius: float, style: str, said: str) -> str:
    place = f'cx="{x(point[0]):.1f}" cy="{y(point[1]):.1f}" r="{radius:.1f}"'
    return f'<circle class="{style}" {place}>{_title(said)}</circle>'


def _rectangle(left: float, top: float, width: float, height: float, style: str, said: str) -> str:
    place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3"'
    return f'<rect class="{style}" {place}>{_title(said)}</rect>'


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _title(said: str) -> str:
    return f"<title>{escape(said)}</title>" if said else ""


def _figure(body: Sequence[str], title: str) -> str:
    return _svg("".join(body), title, _WIDTH, _HEIGHT, "chart")


def _svg(body: str, title: str, width: float, height: float, style: str) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="{style}" {box}>{_title(title)}{body}</svg>'
