"""A stage that several runs of a sweep have in common is made once: its finished folder is taken over by the others.

Equal evidence means an equal result (settings, seed, data, earlier stages, the user's code), which is what a run's own
stage cache rests on. What is taken over is verified by its DONE first. Weights are hard links where the disk allows,
all else is copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from palate.provenance import read_json, write_json
from palate.stage_folder import StageFolder
from palate.sweep.sweep import Run


def finished(home: StageFolder) -> bool:
    """Whether a stage says that it is done, without reading its model again."""
    return read_json(home.path / "DONE").get("hash") == home.evidence.hash


def waits_for(run: Run, busy: Iterable[Run]) -> bool:
    """Whether a run at work is just making a stage that this run needs too: then it is better to wait for it."""
    making = {e.hash for other in busy for i, e in enumerate(other.evidences) if not finished(other.stage(i))}
    return any(e.hash in making and not finished(run.stage(i)) for i, e in enumerate(run.evidences))


def take_over(run: Run, runs: Sequence[Run]) -> list[str]:
    """Give a run every stage that another one has finished and it has not begun; returns the names of those stages."""
    taken: list[str] = []
    for index, stage in enumerate(run.plan.stages):
        home = run.stage(index)
        if home.state(stage.name).what != "new":
            continue
        source = _source(home, run, runs)
        if source is not None:
            _copy(source, home.path)
            taken.append(stage.name)
    return taken


def _source(home: StageFolder, run: Run, runs: Sequence[Run]) -> Path | None:
    """A finished folder of the same evidence, whose model is as it was left."""
    for other in runs:
        if other is run:
            continue
        for index, evidence in enumerate(other.evidences):
            name = other.plan.stages[index].name
            candidate = other.stage(index)
            if evidence.hash == home.evidence.hash and finished(candidate) and candidate.state(name).what == "done":
                return candidate.path
    return None


def _copy(source: Path, target: Path) -> None:
    """The whole folder under its new name, or nothing of it."""
    partial = target.with_name(f".{target.name}.taken")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("checkpoints"), copy_function=_link_or_copy)
    done = read_json(partial / "DONE")
    write_json(partial / "DONE", {**done, "taken_from": f"{source.parent.name}/{source.name}"})
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copy2(source, target)
