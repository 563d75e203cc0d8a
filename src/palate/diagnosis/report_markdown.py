"""The report as Markdown: the same verdict, findings, numbers and samples for a terminal or a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from palate.diagnosis import findings, numbers, samples, settings_view, token_page
from palate.diagnosis.report_html import missing, series
from palate.diagnosis.run_folder import RunFolder, mapping
from palate.diagnosis.svg import short

_SAMPLES = 4


def render(run: RunFolder) -> str:
    """The whole text."""
    return "\n".join([*_head(run), *_numbers(run), *_samples(run), *_tokens(run), *_training(run), *_made(run)]) + "\n"


def _head(run: RunFolder) -> Iterator[str]:
    judged = findings.verdict(run)
    yield f"# {run.name}"
    yield f"\n**{judged.title}** {judged.text}"
    for finding in findings.findings(run):
        yield f"\n- **{finding.level}: {finding.title}.** {finding.text}"


def _numbers(run: RunFolder) -> Iterator[str]:
    found = mapping(run.evaluated.evaluation) if run.evaluated else {}
    if not found:
        return
    table = numbers.table(found)
    yield "\n## Key numbers\n"
    yield _row(["measure", *table.models])
    yield _row(["---", *("---:" for _ in table.models)])
    yield from (_row([name, *cells]) for name, cells in table.rows)
    for name, sentence, _ in numbers.reward_pages(found):
        accuracy = numbers.percent(float(mapping(found, "reward_models", name).get("accuracy") or 0))
        yield f"\nReward model {name}: accuracy {accuracy}. {sentence}"


def _samples(run: RunFolder) -> Iterator[str]:
    shown = samples.of(run)[:_SAMPLES]
    if shown:
        yield "\n## Samples"
    for sample in shown:
        yield f"\n_{sample.why}_\n\n{_indented(sample.prompt)}"
        for side in sample.sides:
            scores = ", ".join(f"{name} {short(value)}" for name, value, _ in side.scores)
            yield f"\n{side.name} ({scores}):\n\n{_indented(side.text)}"


def _tokens(run: RunFolder) -> Iterator[str]:
    lines = list(token_page.in_brief(run))
    if lines:
        yield "\n## Tokens\n"
        yield _indented("\n".join(lines).rstrip())
        yield "\n`palate show RUN --step N` shows every token."


def _indented(text: str) -> str:
    """Text as an indented block, in which Markdown and HTML mean nothing."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _training(run: RunFolder) -> Iterator[str]:
    for stage in run.stages:
        rows = list(series(stage))
        if rows:
            yield f"\n## Training: {stage.name}\n"
            yield _row(["metric", "first", "last", "lowest", "highest"])
            yield _row(["---", "---:", "---:", "---:", "---:"])
            yield from (_row([r.name, *(short(v) for v in (r.first, r.last, r.low, r.high))]) for r in rows)


def _made(run: RunFolder) -> Iterator[str]:
    facts = settings_view.facts(run.provenance)
    if facts:
        yield "\n## How it was made\n"
        yield from (f"- {term}: {fact}" for term, fact in facts)
    warned = [(stage.name, row) for stage in run.stages for row in stage.warnings]
    if warned:
        yield "\n## Warnings\n"
        yield from (f"- {name}, step {row.get('step', '?')}: {row.get('warning') or row}" for name, row in warned)
    if absent := missing(run):
        yield "\n## Not found\n"
        yield from (f"- {text}" for text in absent)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
