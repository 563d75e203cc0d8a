"""`palate show`: answers of a training run token by token, with the numbers the update used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from palate.diagnosis.run_folder import StageFolder
    from palate.diagnosis.tokens import Answer

    Steps = Mapping[int, Sequence[Answer]]


@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", "asked", type=int, multiple=True, help="The step to show; give it twice to compare two.")
@click.option("--stage", "name", help="The stage, where several wrote answers token by token.")
@click.option("--row", type=int, help="One answer only: its row in the rollout.")
@click.option("--prompt", is_flag=True, help="Also list the tokens of the prompt.")
@click.option("--json", "as_json", is_flag=True, help="For machines: every number, and the sums.")
def show(run: Path, asked: Sequence[int], name: str | None, row: int | None, prompt: bool, as_json: bool) -> None:
    """Show answers of RUN token by token: log-probabilities, KL, value, advantage, masks and reward.

    RUN is a run directory, or one stage's folder in it. Without --step: the steps there are.

    \b
    Example:
      palate show runs/tasting_room
      palate show runs/tasting_room --step 1 --step 100
      palate show runs/tasting_room --step 100 --row 0 --json
    """
    from palate.diagnosis.tokens import steps

    stages = {stage.name: stage for stage in _stages(run)}
    found = {stage_name: steps(stage) for stage_name, stage in stages.items()}
    _require_any(run, stages, found)
    if not asked:
        _list(run, _named(run, found, name), as_json)
        return
    stage_name = _one(run, found, name)
    chosen = {step: _rows(run, found[stage_name], step, row) for step in dict.fromkeys(asked)}
    if as_json:
        _print_json(run, stages[stage_name], chosen)
    else:
        _print_tables(stages[stage_name], chosen, prompt)


def _stages(run: Path) -> Sequence[StageFolder]:
    from palate.diagnosis.run_folder import read, read_stage
    from palate.settings import PalateError

    if (run / "stage.yaml").is_file():
        return [read_stage(run)]
    try:
        return read(run).stages
    except NotADirectoryError:
        raise PalateError(f"{run}: there is no such run directory. `palate show RUN` names one.") from None


def _require_any(run: Path, stages: Mapping[str, StageFolder], found: Mapping[str, Steps]) -> None:
    """PalateError when no stage wrote answers token by token; it says why and what to do."""
    from palate.settings import PalateError

    if any(found.values()):
        return
    there = ", ".join(f"{stage.name} (kind {stage.kind})" for stage in stages.values()) or "no stage"
    online = [stage.name for stage in stages.values() if stage.kind == "online"]
    if online:
        why = f"{online[0]} has not written any yet, or was run before palate wrote them. Run it (again) and look after"
        raise PalateError(f"{run}: no answers token by token: {why} its first rollout.")
    raise PalateError(
        f"{run}: no answers token by token: only a stage of kind online samples answers, and here is {there}. "
        "Show the run of such a stage, or read `palate report` for this one."
    )


def _named(run: Path, found: Mapping[str, Steps], name: str | None) -> Mapping[str, Steps]:
    """The stages with answers, or the one that was asked for."""
    from palate.settings import PalateError, nearest

    there = {stage: steps for stage, steps in found.items() if steps}
    if name is None or name in there:
        return there if name is None else {name: there[name]}
    raise PalateError(
        f"{run}: no stage {name!r} with answers token by token.{nearest(name, there)} There is: {', '.join(there)}."
    )


def _one(run: Path, found: Mapping[str, Steps], name: str | None) -> str:
    from palate.settings import PalateError

    there = list(_named(run, found, name))
    if len(there) > 1:
        raise PalateError(f"{run}: {len(there)} stages have such answers: {', '.join(there)}. Choose one with --stage.")
    return there[0]


def _rows(run: Path, steps: Steps, step: int, row: int | None) -> list[Answer]:
    """The answers of a step, or the one of a row; PalateError names the nearest steps, or the rows there are."""
    from palate.settings import PalateError

    if step not in steps:
        before, after = [s for s in steps if s < step][-1:], [s for s in steps if s > step][:1]
        close = " and ".join(str(s) for s in before + after)
        raise PalateError(
            f"{run}: no answers were written at step {step}. The nearest: {close}. "
            "`palate show RUN` lists all; the stage's sample_steps says how often they are written."
        )
    chosen = [answer for answer in steps[step] if row is None or answer.row == row]
    if not chosen:
        rows = ", ".join(str(answer.row) for answer in steps[step])
        raise PalateError(f"{run}: step {step} has no row {row} here. Rows written: {rows}.")
    return chosen


def _list(run: Path, found: Mapping[str, Steps], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"run": str(run), "stages": {name: list(steps) for name, steps in found.items()}}))
        return
    for name, steps in found.items():
        answers = max(len(answers) for answers in steps.values())
        click.echo(f"{name}: {answers} answers token by token at each of {len(steps)} steps")
        click.echo(f"  {', '.join(str(step) for step in steps)}")
    name, steps = next(iter(found.items()))
    stage = f" --stage {name}" if len(found) > 1 else ""
    click.echo(f"next: palate show {run}{stage} --step {min(steps)} --step {max(steps)}")


def _print_json(run: Path, stage: StageFolder, chosen: Steps) -> None:
    from palate.diagnosis.tokens import as_json, logged

    shown: list[dict[str, Any]] = [
        {"step": step, "logged": logged(stage, step), "answers": [as_json(answer) for answer in answers]}
        for step, answers in chosen.items()
    ]
    click.echo(json.dumps({"run": str(run), "stage": stage.name, "steps": shown}, indent=1))


def _print_tables(stage: StageFolder, chosen: Steps, prompt: bool) -> None:
    from rich.console import Console

    from palate.diagnosis.token_tables import Step, render
    from palate.diagnosis.tokens import logged

    console = Console()
    shown = [Step(f"{stage.name}, step {step}", answers, logged(stage, step)) for step, answers in chosen.items()]
    for part in render(shown, console.width, prompt):
        console.print(part)
