"""The comparison of a sweep, written down: report.html, report.md and results.json, and a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from palate import diagnosis
from palate.diagnosis.svg import short
from palate.provenance import write_json, write_text
from palate.sweep import drawing
from palate.sweep.comparison import Comparison, Row, labels, summary

_HERE = Path(__file__).parent
_STYLE = Path(diagnosis.__file__).parent / "page" / "report.css"


def write(found: Comparison, folder: Path) -> Path:
    """Write all three into the sweep's folder; returns the page's path."""
    page = folder / "report.html"
    write_text(page, html(found))
    write_text(folder / "report.md", markdown(found))
    write_json(folder / "results.json", results(found))
    return page


def terminal(found: Comparison) -> Table:
    """The table, best first."""
    table = Table(*head(found), box=None, pad_edge=False, header_style="bold")
    for row in found.ranked:
        table.add_row(*(Text(cell, style="bold" if row.best else "") for cell in cells(found, row)))
    return table


def head(found: Comparison) -> list[str]:
    """The names of the columns."""
    names = labels(found.keys)
    return ["trial", *(names[k] for k in found.keys), "mean", "± s.e.", *(f"seed {s}" for s in found.seeds), "verdict"]


def cells(found: Comparison, row: Row) -> list[str]:
    """The columns of one setting."""
    values = dict(row.trial.texts)
    runs = [row.values.get(seed) for seed in found.seeds]
    per_seed = ["failed" if value is None else short(value) for value in runs]
    return [
        row.trial.name,
        *(values[key] for key in found.keys),
        _number(row.mean),
        _number(row.standard_error),
        *per_seed,
        row.verdict,
    ]


def _number(value: float) -> str:
    return "–" if math.isnan(value) else short(value)


def markdown(found: Comparison) -> str:
    """The report as text for a pull request."""
    return "\n".join(_markdown(found)) + "\n"


def _markdown(found: Comparison) -> Iterator[str]:
    better = "more" if found.measure.goal == "max" else "less"
    yield f"# {found.name}\n"
    yield f"Compared by `{found.measure.metric}` ({better} is better).\n"
    yield "\n".join(summary(found))
    columns = head(found)
    yield "\n" + _line(columns)
    yield _line(["---"] * (1 + len(found.keys)) + ["---:"] * (2 + len(found.seeds)) + ["---"])
    yield from (_line(cells(found, row)) for row in found.ranked)
    failed = _failures(found)
    if failed:
        yield "\n## Runs that failed\n"
        yield from (f"- {run}: {why}" for run, why in failed)


def _line(columns: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in columns) + " |"


def html(found: Comparison) -> str:
    """The report as one self-contained page."""
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True)
    # Drawings escape what they are given themselves; nothing else enters the page as markup.
    environment.filters["drawn"] = Markup
    return environment.get_template("page.html").render(
        found=found,
        css=Markup(_STYLE.read_text(encoding="utf-8")),
        summary=summary(found),
        ladder=drawing.ladder(found) if found.best else "",
        head=head(found),
        table=[cells(found, row) for row in found.ranked],
        plots=drawing.plots(found) if found.best else [],
        failures=_failures(found),
    )


def _failures(found: Comparison) -> list[tuple[str, str]]:
    return [(f"{row.trial.name}-seed-{seed}", why) for row in found.rows for seed, why in row.failures.items()]


def results(found: Comparison) -> dict[str, Any]:
    """The same for machines; a number that does not exist is null."""
    return {
        "metric": found.measure.metric,
        "goal": found.measure.goal,
        "seeds": list(found.seeds),
        "best": found.best.trial.name if found.best else None,
        "trials": [_result(row) for row in found.rows],
    }


def _result(row: Row) -> dict[str, Any]:
    behind = row.behind
    return {
        "name": row.trial.name,
        "settings": dict(row.trial.texts),
        "values": {str(seed): value for seed, value in row.values.items()},
        "failures": {str(seed): why for seed, why in row.failures.items()},
        "mean": _finite(row.mean),
        "standard_error": _finite(row.standard_error),
        "behind": {"mean": behind.mean, "standard_error": behind.standard_error, "p_value": behind.p_value}
        if behind
        else None,
        "verdict": row.verdict,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
