"""A whole recipe, seen before it runs: every stage is set up in a scratch folder and none is run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from palate import settings
from palate.check import answering, measuring, training
from palate.check.found import RecipeFound, Seen, Setting, StageFound
from palate.check.plan import states
from palate.check.rehearsal import Rehearsal
from palate.provenance import Origins
from palate.run import Plan, plan_file
from palate.settings import PalateError
from palate.stages import evaluate, online, train

Say = Callable[[str], None]


def check_recipe(path: Path, assignments: Sequence[str], measure: bool, say: Say) -> RecipeFound:
    """What `palate run` would do with a recipe. Raises PalateError when there is no recipe to speak of.

    Faults of settings end the check, one for each stage that has any; faults of data and models are gathered over
    all stages. Nothing is written to the run directory.
    """
    faults = _faults_of_settings(path, assignments)
    if faults:
        return RecipeFound(str(path), "", (), (), tuple(faults))
    plan = plan_file(path, assignments)
    with tempfile.TemporaryDirectory(prefix="palate-check-") as scratch:
        stages = tuple(_stages(plan, Rehearsal(plan, Path(scratch)), measure, say))
    common = {name: value for name, value in plan.resolved.items() if name != "stages"}
    return RecipeFound(str(path), str(plan.folder), tuple(_settings(common, plan.origins, ())), stages)


def _faults_of_settings(path: Path, assignments: Sequence[str]) -> list[str]:
    """The first fault of each stage's settings; what is wrong between stages is left to `plan_file`."""
    given = settings.override({"name": path.stem, **settings.read_yaml(path)}, assignments)
    stages = given.get("stages")
    found: list[str] = []
    for index, stage in enumerate(cast(list[Any], stages) if isinstance(stages, list) else []):
        try:
            settings.build("stages", dict(stage) if isinstance(stage, dict) else {}, f"stages.{index}")
        except PalateError as fault:
            found.append(str(fault))
    return found


def _stages(plan: Plan, rehearsal: Rehearsal, measure: bool, say: Say) -> Iterator[StageFound]:
    faulty: set[str] = set()
    for index, (stage, (state, refusal)) in enumerate(zip(plan.stages, states(plan), strict=True)):
        say(f"{stage.name}: setting up")
        done = state.what == "done"
        missing = [name for name in stage.references() if name in faulty]
        if missing:
            seen = Seen(rules=(f"not looked at: it reads stage {missing[0]!r}, which has a fault",))
        else:
            seen = _look(stage, index, rehearsal, measure and not done)
        if done:
            rehearsal.models[stage.name] = state.folder / "model"
            rehearsal.stand_ins.discard(stage.name)
        if refusal and not seen.faults:
            seen = replace(seen, faults=(f"{stage.name}: {refusal}",))
        if stage.name not in rehearsal.models and (seen.faults or missing):
            faulty.add(stage.name)
        resolved = plan.resolved["stages"][index]
        told = tuple(_settings(resolved, plan.origins, ("stages", str(index))))
        yield StageFound(index + 1, stage.name, str(resolved.get("kind", "")), state, told, seen)


def _look(stage: Any, index: int, rehearsal: Rehearsal, measure: bool) -> Seen:
    """Stages of palate's own kinds are set up; of others only the settings and the state are known."""
    if isinstance(stage, train.Stage):
        return training.look(stage, index, rehearsal, measure)
    if isinstance(stage, online.Stage):
        return answering.look(stage, index, rehearsal, measure)
    if isinstance(stage, evaluate.Stage):
        return measuring.look(stage, index, rehearsal, measure)
    return Seen(rules=("a stage of your own: its settings are valid; what it does is not looked at",))


def _settings(resolved: Mapping[str, Any], origins: Origins, path: tuple[str, ...]) -> Iterator[Setting]:
    """Every value with its dotted name and its origin; a list of plain values is one value."""
    for name, value in _leaves(resolved, ()):
        yield Setting(".".join(name), value, origins.of((*path, *name), value))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, below in cast(dict[str, Any], value).items():
            yield from _leaves(below, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(v, dict | list) for v in cast(list[Any], value)):
        for number, below in enumerate(cast(list[Any], value)):
            yield from _leaves(below, (*path, str(number)))
    else:
        yield path, value
