"""A sweep in pictures: every setting beside the others, and the measure against each swept setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from palate.diagnosis.svg import Scale, scale, short
from palate.sweep.comparison import Comparison, Row, labels, settings_text
from palate.sweep.space import plain

_WIDTH, _HEIGHT = 410.0, 230.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 12.0, 38.0
_WIDE, _LABELS, _LINE = 860.0, 330.0, 26.0


def ladder(found: Comparison) -> str:
    """One line per setting, best first: a dot per seed, and mean ± standard error as a bar."""
    rows = [row for row in found.ranked if row.known]
    x = scale([v for row in rows for v in row.known], _LABELS, _WIDE - 20)
    foot = 8 + _LINE * len(rows)
    body = [f'<path class="grid" d="M{x(t):.1f} 4V{foot:.1f}"/>' for t in x.ticks]
    body += [_text(x(t), foot + 15, short(t), "tick", "middle") for t in x.ticks]
    body.append(_text((x.start + x.end) / 2, foot + 32, found.measure.metric, "axis", "middle"))
    body += [_rung(row, x, 8 + _LINE * (i + 0.5)) for i, row in enumerate(rows)]
    return _svg(body, f"{found.measure.metric} of every setting", _WIDE, foot + 38)


def _rung(row: Row, x: Scale, y: float) -> str:
    style = "proxy" if row.best else "plain"
    name = settings_text(row.trial)
    parts = [_text(_LABELS - 10, y + 4, name if len(name) < 48 else f"{name[:46]}…", "label", "end")]
    if not math.isnan(row.standard_error):
        low, high = max(x.start, x(row.mean - row.standard_error)), min(x.end, x(row.mean + row.standard_error))
        parts.append(f'<path class="line {style}" d="M{low:.1f} {y:.1f}H{high:.1f}"/>')
    for seed, value in row.values.items():
        if value is not None:
            parts.append(_dot(x(value), y, 3.2, f"dot {style}", f"{name}, seed {seed}: {short(value)}"))
    parts.append(_dot(x(row.mean), y, 5.5, f"start {style}", f"{name}: mean {short(row.mean)}"))
    return "".join(parts)


def plots(found: Comparison) -> list[tuple[str, str]]:
    """(key, drawing of the measure against its values) for each swept key."""
    return [(key, against(found, key)) for key in found.keys]


def against(found: Comparison, key: str) -> str:
    """The measure of every run against one swept setting: a dot per run, a ring per setting's mean."""
    rows = [row for row in found.rows if row.known]
    texts = [dict(row.trial.texts)[key] for row in rows]
    places, ticks, logarithmic = horizontal(texts)
    x = scale([*places, *(place for place, _ in ticks)], _LEFT, _WIDTH - _RIGHT)
    y = scale([v for row in rows for v in row.known], _HEIGHT - _BOTTOM, _TOP)
    body = [f'<path class="grid" d="M{x.start:.1f} {y(t):.1f}H{x.end:.1f}"/>' for t in y.ticks]
    body += [_text(x.start - 7, y(t) + 3.8, short(t), "tick", "end") for t in y.ticks]
    body += [_text(x(place), y.start + 15, said, "tick", "middle") for place, said in ticks]
    label = labels(found.keys)[key] + (", logarithmic" if logarithmic else "")
    body.append(_text((x.start + x.end) / 2, y.start + 31, label, "axis", "middle"))
    for row, place in zip(rows, places, strict=True):
        style, name = "proxy" if row.best else "plain", settings_text(row.trial)
        for seed, value in row.values.items():
            if value is not None:
                body.append(_dot(x(place), y(value), 2.6, f"dot {style}", f"{name}, seed {seed}: {short(value)}"))
        body.append(_dot(x(place), y(row.mean), 5.0, f"start {style}", f"{name}: mean {short(row.mean)}"))
    return _svg(body, f"{found.measure.metric} against {key}", _WIDTH, _HEIGHT)


def horizontal(texts: Sequence[str]) -> tuple[list[float], list[tuple[float, str]], bool]:
    """(place of each value, ticks, whether the axis is logarithmic) for values as they were written.

    Numbers stand at their value, or at its logarithm where they span more than a factor of 8; words in their order.
    """
    read = [plain(text) for text in texts]
    if not read or not all(isinstance(value, float) and math.isfinite(value) for value in read):
        order = list(dict.fromkeys(texts))
        named = [(float(i), text if len(text) < 12 else f"{text[:10]}…") for i, text in enumerate(order)]
        return [float(order.index(text)) for text in texts], named, False
    logarithmic = min(read) > 0 and max(read) > 8 * min(read)
    places = [math.log10(value) if logarithmic else float(value) for value in read]
    distinct = sorted(set(zip(places, read, strict=True)))
    if len(distinct) > 6:
        distinct = [distinct[round(i * (len(distinct) - 1) / 4)] for i in range(5)]
    return places, [(place, short(value)) for place, value in distinct], logarithmic


def _dot(x: float, y: float, radius: float, style: str, said: str) -> str:
    return f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"><title>{escape(said)}</title></circle>'


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(body: Sequence[str], title: str, width: float, height: float) -> str:
    box = f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="chart" {box}><title>{escape(title)}</title>{"".join(body)}</svg>'
