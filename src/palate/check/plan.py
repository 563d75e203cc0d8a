"""Which stages of a run would be made, skipped, continued or made again, read off the run directory."""

from __future__ import annotations

from collections.abc import Mapping

from palate.run import Plan, evidence_of
from palate.settings import PalateError
from palate.stage_folder import StageFolder, State


def states(plan: Plan) -> list[tuple[State, str]]:
    """The state of every stage, and the fault for which `palate run` would not begin it (empty: none)."""
    hashes: dict[str, str] = {}
    return [_state(plan, index, hashes) for index in range(len(plan.stages))]


def _state(plan: Plan, index: int, hashes: dict[str, str]) -> tuple[State, str]:
    """One stage's state; its hash joins the others, unless its own inputs cannot be read."""
    stage, path = plan.stages[index], plan.stage_folder(index)
    if any(name not in hashes for name in stage.references()):
        return State("new", path), ""
    try:
        home = StageFolder(path, evidence_of(plan, index, hashes))
    except PalateError as fault:
        return State("new", path), str(fault)
    hashes[stage.name] = home.evidence.hash
    return home.state(stage.name), _refusal(plan, stage.name, home)


def _refusal(plan: Plan, name: str, home: StageFolder) -> str:
    try:
        home.refuse_changed_data(name, plan.experiment.changed_data)
    except PalateError as fault:
        return str(fault)
    return ""


def words(state: State) -> str:
    """What will happen to a stage, in a sentence."""
    sentences: Mapping[str, str] = {
        "new": "will run",
        "done": f"done before, will be skipped; its work is in {state.folder}",
        "continue": f"goes on from checkpoint {state.step:,} in {state.folder}",
        "again": f"runs again, because of {state.because}",
    }
    return sentences[state.what]
