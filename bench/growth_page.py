"""The page and the picture of bench/growth.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[int, float, float, float]
"""Size, and seconds: median, least, most."""
COLUMNS, WIDTH, HEIGHT, LEFT, BOTTOM, TOP, GAP = 3, 250, 200, 46, 40, 40, 14
STYLE = """
  .sheet { fill: #ffffff; } text { font: 11px system-ui, sans-serif; fill: #6b6169; }
  text.heading { font: 600 12px system-ui, sans-serif; fill: #221c22; } text.fit { fill: #7b2d56; }
  .grid { stroke: #e4ddd6; } .line { stroke: #7b2d56; stroke-width: 1.6; } .range { stroke: #1f6f78; stroke-width: 2; }
  .one { stroke: #a39a92; stroke-dasharray: 4 4; } circle { fill: #1f6f78; }
"""


@dataclass(frozen=True)
class Found:
    """One series as measured, with the power law through its medians and what it was expected to be."""

    unit: str
    points: tuple[Point, ...]
    exponent: float
    error: float
    factor: float
    law: str

    @property
    def last(self) -> float:
        """The exponent between the two largest sizes."""
        (x, y, *_), (a, b, *_) = self.points[-2:]
        return math.log(b / y) / math.log(a / x)


def page(found: Mapping[str, Found], how: str) -> str:
    """bench/growth.md."""
    lines = [
        "# How cost grows",
        "",
        f"`python -m bench.growth` · {how}",
        "",
        "Time = factor · size^exponent, by least squares through the logarithms of five medians; ± is the exponent's",
        "standard error (three degrees of freedom). Where two costs trade places it lies between theirs,",
        "so the exponent between the two largest sizes stands beside it.",
        "",
        "![time over size, both logarithmic](../docs/img/growth.svg)",
        "",
        "| what grows | from – to | exponent | the last step's | what it should be |",
        "|---|---|---|---|---|",
    ]
    for title, one in found.items():
        ends = f"{one.points[0][0]:,} – {one.points[-1][0]:,}"
        lines.append(f"| {title} | {ends} | {one.exponent:.2f} ± {one.error:.2f} | {one.last:.2f} | {one.law} |")
    for title, one in found.items():
        lines += ["", f"## {title}", "", f"| {one.unit} | {' | '.join(f'{p[0]:,}' for p in one.points)} |"]
        lines.append("|---|" + "---|" * len(one.points))
        lines.append(f"| median | {' | '.join(seconds(p[1]) for p in one.points)} |")
        lines.append(f"| least – most | {' | '.join(f'{seconds(p[2])} – {seconds(p[3])}' for p in one.points)} |")
        lines.append(f"| × the one before | – | {' | '.join(f'{b[1] / a[1]:.2f}' for a, b in pairwise(one.points))} |")
    return "\n".join([*lines, ""])


def seconds(spent: float) -> str:
    """A duration with three digits."""
    return f"{spent:.3g} s" if spent >= 1 else f"{spent * 1e3:.3g} ms"


def picture(found: Mapping[str, Found]) -> str:
    """All series on one sheet: medians with their range, the fitted line, and a dashed one of exponent 1."""
    rows = -(-len(found) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + GAP) + GAP
    panels = [
        _panel(title, one, GAP + i % COLUMNS * (WIDTH + GAP), GAP + i // COLUMNS * (HEIGHT + GAP))
        for i, (title, one) in enumerate(found.items())
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    sheet = f'<rect class="sheet" width="{width}" height="{height}"/>'
    return f"{head}<style>{STYLE}</style>{sheet}{''.join(panels)}</svg>\n"


def _panel(title: str, one: Found, left: int, top: int) -> str:
    xs = [p[0] for p in one.points]
    x = _Axis(min(xs), max(xs), left + LEFT, left + WIDTH - 8)
    y = _Axis(min(p[2] for p in one.points), max(p[3] for p in one.points), top + HEIGHT - BOTTOM, top + TOP)
    parts = [
        f'<text class="heading" x="{left + 2}" y="{top + 12}">{escape(title)}</text>',
        f'<text class="fit" x="{left + 2}" y="{top + 27}">exponent {one.exponent:.2f} ± {one.error:.2f}</text>',
        f'<text x="{(x.start + x.end) / 2:.0f}" y="{top + HEIGHT - 6}" text-anchor="middle">{escape(one.unit)}</text>',
    ]
    for tick in _ticks(y.low, y.high):
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{x.start - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{seconds(tick)}</text>')
    for i in xs[::2]:
        parts.append(f'<text x="{x(i):.1f}" y="{y.start + 15}" text-anchor="middle">{_short(i)}</text>')
    ends = (xs[0], xs[-1])
    first = one.points[0][1]
    leaves = min(xs[-1], xs[0] * y.high / first)  # where a line of exponent 1 meets the upper edge
    parts.append(_stroke("one", x, y, [(i, first * i / xs[0]) for i in (xs[0], leaves)]))
    parts.append(_stroke("line", x, y, [(i, one.factor * i**one.exponent) for i in ends]))
    for size, middle, least, most in one.points:
        parts.append(_stroke("range", x, y, [(size, least), (size, most)]))
        parts.append(f'<circle cx="{x(size):.1f}" cy="{y(middle):.1f}" r="3.2"/>')
    return "".join(parts)


class _Axis:
    """Pixels of numbers on a logarithmic scale; what lies outside is drawn at the edge."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        room = (high / low) ** 0.06
        self.low, self.high, self.start, self.end = low / room, high * room, start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that lie inside; powers alone where those would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = [t for t in every if low <= t <= high]
    return inside if len(inside) <= 5 else [t for t in inside if math.isclose(math.log10(t) % 1, 0, abs_tol=1e-9)]


def _short(size: int) -> str:
    return f"{size / 1e6:.3g}M" if size >= 1e6 else f"{size / 1e3:.3g}k" if size >= 10_000 else str(size)


def _stroke(style: str, x: _Axis, y: _Axis, points: Sequence[tuple[float, float]]) -> str:
    (a, b), (c, d) = points
    return f'<line class="{style}" x1="{x(a):.1f}" y1="{y(b):.1f}" x2="{x(c):.1f}" y2="{y(d):.1f}"/>'
