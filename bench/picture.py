"""Several line charts on one sheet: a standalone SVG that a README or a page of docs can show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from palate.diagnosis import svg

COLUMNS, WIDTH, HEIGHT, HEADING, GAP = 2, 410, 230, 26, 16
_HOVER = re.compile(r'<circle class="hover".*?</circle>')
STYLE = """
  .sheet { fill: #ffffff; }
  text { font: 11px system-ui, sans-serif; fill: #6b6169; }
  text.heading { font: 600 13px system-ui, sans-serif; fill: #221c22; }
  path { fill: none; }
  .grid { stroke: #e4ddd6; }
  .line { stroke-width: 2.2; stroke-linejoin: round; }
  .line.seed { stroke-width: 1; stroke-opacity: .45; }
  .line.target { stroke: #221c22; stroke-width: 1.2; stroke-dasharray: 5 4; }
  .line.kl { stroke: #1f6f78; } .line.proxy { stroke: #7b2d56; } .line.gold { stroke: #a86c00; }
  .line.value { stroke: #4a5fb0; } .line.ink { stroke: #221c22; }
  circle { fill: none; }
"""


@dataclass(frozen=True)
class Panel:
    """One chart: a thin line for each seed, a thick one for their mean, a dashed one at `target` if there is one."""

    title: str
    seeds: Sequence[Sequence[svg.Point]]
    mean: Sequence[svg.Point]
    style: str
    target: float | None = None


def sheet(panels: Sequence[Panel], x_label: str = "episodes") -> str:
    """All panels on a white sheet, two in a row."""
    rows = -(-len(panels) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEADING + HEIGHT + GAP) + GAP
    body = "".join(_place(panel, index, x_label) for index, panel in enumerate(panels))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return f'{head}<style>{STYLE}</style><rect class="sheet" width="{width}" height="{height}"/>{body}</svg>\n'


def _place(panel: Panel, index: int, x_label: str) -> str:
    left = GAP + index % COLUMNS * (WIDTH + GAP)
    top = GAP + index // COLUMNS * (HEADING + HEIGHT + GAP)
    heading = f'<text class="heading" x="{left + 4}" y="{top + 16}">{escape(panel.title)}</text>'
    spot = f'<svg x="{left}" y="{top + HEADING}" width="{WIDTH}" height="{HEIGHT}" '
    return heading + _chart(panel, x_label).replace("<svg ", spot, 1)


def _chart(panel: Panel, x_label: str) -> str:
    lines = [svg.Line(f"seed {i + 1}", p, f"seed {panel.style}") for i, p in enumerate(panel.seeds)]
    lines.append(svg.Line("mean", panel.mean, panel.style))
    if panel.target is not None:
        ends = [(panel.mean[0][0], panel.target), (panel.mean[-1][0], panel.target)]
        lines.append(svg.Line("target", ends, "target"))
    # A picture in a page answers no pointer, and the marks for it are most of the file.
    return _HOVER.sub("", svg.line_chart(lines, panel.title, x_label=x_label))
