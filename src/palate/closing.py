"""The last words of a run: a short table, where the report is, and three things to try next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from palate.diagnosis import report
from palate.live import Display, duration, line
from palate.provenance import read_json
from palate.run import Outcome, Plan, StageOutcome
from palate.tracking import JsonLines


def close(outcome: Outcome, plan: Plan, display: Display) -> None:
    """Write the report and say how the run went."""
    table = Table("stage", "time", "at its end", box=None, pad_edge=False, header_style="bold")
    for stage in outcome.stages:
        took = "done before" if stage.skipped else duration(stage.seconds)
        table.add_row(Text(stage.name), took, Text(_end(stage)))
    display.console.print(table)
    page = _report(outcome.folder, display)
    if page is not None:
        display.say(f"report: {page}")
    display.say("next:")
    for step in next_steps(outcome, plan):
        display.say(f"  {step}")


def _end(stage: StageOutcome) -> str:
    numbers = {name: value for name, value in stage.metrics.items() if isinstance(value, int | float)}
    numbers.pop("tokens_per_second", None)
    return line(numbers) or _evaluated(read_json(stage.folder / "evaluation.json"))


def _evaluated(found: Mapping[str, Any]) -> str:
    """The win rates of an evaluation, in a line."""
    parts: list[str] = []
    for name, model in dict(found.get("models") or {}).items():
        for judge, rate in dict(model.get("win_rate") or {}).items():
            share = dict(rate.get("rate") or {}).get("estimate")
            if isinstance(share, float):
                parts.append(f"{name} wins {share:.0%} by {judge}")
    return ", ".join(parts)


def _report(folder: Path, display: Display) -> Path | None:
    try:
        return report.write(folder)[0]
    except Exception as fault:  # the run itself is done and safe; a page about it is not worth an exit code
        display.warn(f"the report could not be written: {fault}. Try `palate report {folder}`.")
        return None


def next_steps(outcome: Outcome, plan: Plan) -> list[str]:
    """Three commands worth trying after this run."""
    return list(_ideas(outcome, plan))[:3]


def _ideas(outcome: Outcome, plan: Plan) -> Iterator[str]:
    speakers = [stage for stage in outcome.stages if _speaks(stage.folder / "model")]
    sampled = [stage for stage in outcome.stages if (stage.folder / "samples.jsonl").exists()]
    if speakers:
        prompt = _quoted(_a_prompt(sampled))
        yield f"talk to it:        palate generate model={speakers[-1].folder / 'model'} prompt={prompt}"
    if sampled:
        yield f"read its samples:  less {sampled[-1].folder / 'samples.jsonl'}"
    name = plan.experiment.name
    yield f"try another seed:  the same command with seed={plan.experiment.seed + 1} name={name}-2"
    yield f"see each setting:  less {outcome.folder / 'resolved.yaml'}"
    yield f"see what numbers mean:  palate list metrics  (they are in {outcome.stages[-1].folder / 'metrics.jsonl'})"


def _speaks(model: Path) -> bool:
    """Whether a model folder holds a language model, not a reward model."""
    return (model / "generation_config.json").exists()


def _quoted(text: str) -> str:
    """For a shell, on one line."""
    if "\n" not in text:
        return shlex.quote(text)
    return "$'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _a_prompt(sampled: Sequence[StageOutcome]) -> str:
    """A prompt the model knows what to do with, from the samples of the run."""
    for stage in reversed(sampled):
        for row in JsonLines(stage.folder / "samples.jsonl").read()[:1]:
            if isinstance(row.get("prompt"), str):
                return str(row["prompt"])
    return "Hello"
