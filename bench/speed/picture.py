"""The picture docs/img/speed.svg: a bar per row for how many times as long its peer takes, a mark for what is asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from bench.speed import results
from bench.speed.results import Record
from bench.speed.workloads import EVERY, Row

STYLE = """
  .sheet { fill: #ffffff; } text { font: 12px system-ui, sans-serif; fill: #221c22; }
  text.small { font-size: 11px; fill: #6b6169; } text.value { font-weight: 600; }
  .grid { stroke: #e4ddd6; } .one { stroke: #a89fa6; } .bar { fill: #7b2d56; } .bar.other { fill: #c9a5b8; }
  .target { stroke: #221c22; stroke-width: 1.6; }
"""
LEFT, WIDTH, STEP, TOP, BAR = 400, 420, 24, 34, 14


def picture(known: Mapping[str, Record]) -> str:
    """A standalone SVG."""
    shown = [(row, ratio) for name, row in EVERY.items() if (ratio := _ratio(known, name)) is not None]
    most = math.ceil(max([*(ratio for _, ratio in shown), *(row.target or 0 for row, _ in shown), 1]) * 1.05)
    width, height = LEFT + WIDTH + 70, TOP + STEP * max(len(shown), 1) + 34
    scale = WIDTH / most
    parts = [f'<rect class="sheet" width="{width}" height="{height}"/>']
    for tick in range(0, most + 1, 1 if most <= 12 else 2):
        kind = "one" if tick == 1 else "grid"
        x = LEFT + tick * scale
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{height - 30}"/>')
        parts.append(f'<text class="small" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{tick}×</text>')
    for number, (row, ratio) in enumerate(shown):
        parts += _bar(row, ratio, TOP + STEP * number, scale, str(known[row.name]["peer_name"]))
    note = "bar: how many times as long the peer takes · mark: asked for · pale: palate trains another model"
    parts.append(f'<text class="small" x="12" y="{height - 10}">{note}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}</svg>\n"


def _ratio(known: Mapping[str, Record], name: str) -> float | None:
    return results.ratio(known[name]) if name in known else None


def _bar(row: Row, ratio: float, y: int, scale: float, peer: str) -> list[str]:
    title = row.title.split(": ")[0] if len(row.title) > 46 else row.title
    said = escape(f"{title} · {peer}")
    kind = "bar" if row.same_models else "bar other"
    long = ratio * scale
    parts = [
        f'<text x="{LEFT - 12}" y="{y + 15}" text-anchor="end">{said}</text>',
        f'<rect class="{kind}" x="{LEFT}" y="{y + 4}" width="{long:.1f}" height="{BAR}"/>',
    ]
    if row.target is not None:
        x = LEFT + row.target * scale
        parts.append(f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="{y + 1}" y2="{y + BAR + 7}"/>')
    behind = max(long, (row.target or 0) * scale if (row.target or 0) * scale - long < 44 else 0)
    parts.append(f'<text class="value" x="{LEFT + behind + 6:.1f}" y="{y + 15}">{ratio:.2f}×</text>')
    return parts
