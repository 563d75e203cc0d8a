"""The report as one self-contained page: inline styles and drawings, no script, everything a model said escaped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from palate import metrics
from palate.diagnosis import curves, findings, numbers, samples, settings_view, svg, token_page
from palate.diagnosis.run_folder import RunFolder, StageFolder, at, mapping

_PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Series:
    """One metric in a row of the table of all metrics."""

    name: str
    first: float
    last: float
    low: float
    high: float
    drawing: str
    meaning: str


def render(run: RunFolder) -> str:
    """The whole page."""
    environment = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, trim_blocks=False)
    # Drawings escape what they are given themselves (diagnosis/svg.py); nothing else enters the page as markup.
    environment.filters.update(drawn=Markup, short=svg.short)
    parts = _parts(run)
    return environment.get_template("report.html").render(**parts, contents=_contents(parts))


def _parts(run: RunFolder) -> dict[str, Any]:
    found = mapping(run.evaluated.evaluation) if run.evaluated else {}
    settings = settings_view.lines(run.resolved)
    return {
        "name": run.name,
        "css": Markup((_PAGE / "report.css").read_text(encoding="utf-8")),
        "stages": run.stages,
        "verdict": findings.verdict(run),
        "findings": findings.findings(run),
        "cards": numbers.cards(found) if found else [],
        "table": numbers.table(found) if found else None,
        "numbers_note": _numbers_note(run),
        "frontier": curves.frontier(run.online) if run.online else [],
        "reward_pages": numbers.reward_pages(found),
        "samples": samples.of(run),
        "samples_note": _samples_note(run),
        "tokens": token_page.of(run),
        "curves": [(s.name, drawn, list(series(s))) for s in run.stages if (drawn := curves.figures(s))],
        "facts": settings_view.facts(run.provenance),
        "settings": settings,
        "chosen": settings_view.chosen(run.resolved),
        "warnings": [w for stage in run.stages for w in _warnings(stage)],
        "missing": missing(run),
        "version": run.provenance.get("palate"),
    }


def _contents(parts: dict[str, Any]) -> list[tuple[str, str]]:
    named = (
        ("verdict", "Verdict", True),
        ("numbers", "Key numbers", parts["cards"]),
        ("frontier", "What the KL bought", parts["frontier"]),
        ("reward-model", "Reward model", parts["reward_pages"]),
        ("samples", "Before and after", parts["samples"]),
        ("tokens", "Tokens", parts["tokens"]),
        ("training", "Training", parts["curves"]),
        ("provenance", "How it was made", True),
        ("warnings", "Warnings", True),
    )
    return [(anchor, title) for anchor, title, there in named if there]


def _numbers_note(run: RunFolder) -> str:
    found = mapping(run.evaluated.evaluation) if run.evaluated else {}
    prompts, answers = at(found, "prompts"), at(found, "answers")
    if prompts is None or not found:
        return ""
    each = f", {answers:.0f} answers each" if answers and answers > 1 else ""
    pair = f"{found.get('baseline')} → {findings.last_model(found)}"
    return (
        f"{prompts:.0f} held prompts{each}, the same for every model. {pair}. Intervals are 95 %, drawn over prompts."
    )


def _samples_note(run: RunFolder) -> str:
    if run.evaluated and run.evaluated.samples:
        return "The first prompts as they came, then a few picked for their gain or loss. ▲ marks the higher score."
    return "Answers seen during training, at its first and its last step."


def series(stage: StageFolder) -> Iterator[Series]:
    """Every metric of a stage that has at least one finite value."""
    for name in stage.metric_names:
        points = stage.series(name)
        if points:
            values = [v for _, v in points]
            known = metrics.lookup(name)
            drawing = svg.sparkline(points, f"course of {name}") if len(points) > 1 else ""
            meaning = f"{known.meaning} ({known.unit})" if known else ""
            yield Series(name, values[0], values[-1], min(values), max(values), drawing, meaning)


def _warnings(stage: StageFolder) -> Iterator[tuple[str, str, str]]:
    for row in stage.warnings:
        step = at(row, "step")
        yield stage.name, f"{step:.0f}" if step is not None else "", str(row.get("warning") or row)


def missing(run: RunFolder) -> list[str]:
    """Everything a report would show and this run directory lacks."""
    absent = [*run.missing, *(f"{stage.name}: {text}" for stage in run.stages for text in stage.missing)]
    for stage in run.stages:
        if stage.kind == "online" and not stage.tokens:
            absent.append(f"{stage.name}: answers token by token, since tokens.jsonl is not there or empty")
    if run.stages and not run.evaluated:
        absent.append("an evaluation: no stage left evaluation.json with a model in it")
    return absent
