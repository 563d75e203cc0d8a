"""A sweep as planned: its folder, its trials, and one ordinary run for each trial and seed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate import settings
from palate.evidence import Evidence
from palate.provenance import read_json, write_json, write_text
from palate.records import fingerprint
from palate.run import Experiment, Plan, evidence_of, plan
from palate.settings import PalateError, nearest
from palate.stage_folder import StageFolder
from palate.sweep.space import Axis, axis
from palate.sweep.trials import Search, Trial, search_of, trials_of

RECIPE, MEMORY = "recipe.yaml", "sweep.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Run:
    """One trial under one seed: an ordinary run, in a folder of its own."""

    trial: Trial
    seed: int
    plan: Plan
    assignments: tuple[str, ...]
    """What makes the recipe this run."""
    evidences: tuple[Evidence, ...]
    """What each stage's result depends on."""

    @property
    def name(self) -> str:
        """`trial-003-seed-2`, which is also its folder."""
        return self.plan.experiment.name

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.plan.folder

    def stage(self, index: int) -> StageFolder:
        """The folder of a stage, with what is to be in it."""
        return StageFolder(self.plan.stage_folder(index), self.evidences[index])

    def is_done(self) -> bool:
        """Whether every stage is finished and its model as its DONE left it."""
        return all(self.stage(i).state(s.name).what == "done" for i, s in enumerate(self.plan.stages))


@dataclass(frozen=True)
class Sweep:
    """All of it. `space` is what the trials follow from; the same space under the same name is the same sweep."""

    folder: Path
    recipe: Path
    axes: tuple[Axis, ...]
    search: Search
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]
    runs: tuple[Run, ...]
    space: Mapping[str, Any]

    @property
    def stored_recipe(self) -> Path:
        """The copy of the recipe that every run is made from, so that an edit halfway changes none of them."""
        return self.folder / RECIPE

    def remember(self) -> None:
        """Keep the recipe and the space. Raises PalateError when the folder holds a sweep of another space."""
        before = read_json(self.folder / MEMORY)
        if (self.folder / "run.yaml").exists():
            raise PalateError(f"{self.folder}: an ordinary run has this name. Give the sweep another: --name NAME.")
        if before:
            refuse_another(self.folder, before, self.space)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.stored_recipe, self.recipe.read_text(encoding="utf-8"))
        write_json(self.folder / MEMORY, self.space)


def refuse_another(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise PalateError unless both spaces are the same, naming what differs."""
    if dict(before) != dict(now):
        why = Evidence(now).difference(before)
        raise PalateError(
            f"{folder}: a sweep of another space was begun under this name; the two differ in {why}. "
            "Give this one a name of its own: --name NAME."
        )


def plan_sweep(
    recipe: Path,
    words: Sequence[str],
    seeds: str = "3",
    search: Search | None = None,
    trials: int | None = None,
    name: str | None = None,
) -> Sweep:
    """Every run of a sweep with its settings found valid. `words` are `key=value` and `key=VALUES`.

    Raises PalateError for the first fault, before anything is written.
    """
    given = {"name": recipe.stem, **settings.read_yaml(recipe)}
    axes, fixed, named = _sorted_words(words)
    base = plan(given, fixed)
    folder = Path(base.experiment.output_dir).expanduser() / _sweep_name(
        name or named or f"{base.experiment.name}-sweep"
    )
    found = search_of(axes, search, trials)
    tried = trials_of(axes, found, trials, base.experiment.seed)
    numbers = seeds_of(seeds, base.experiment.seed)
    maker = _Maker(given, fixed, folder)
    runs = tuple(maker.run(trial, seed) for trial in tried for seed in numbers)
    _refuse_equal(runs, numbers)
    values = dict(_pair(word) for word in words if axis(word) is not None)
    space = {"recipe": settings.read_yaml(recipe), "fixed": fixed, "values": values, "search": found}
    return Sweep(folder, recipe, axes, found, numbers, tuple(tried), runs, _as_json(space))


def _pair(word: str) -> tuple[str, str]:
    key, _, text = word.partition("=")
    return key, text


def _sorted_words(words: Sequence[str]) -> tuple[tuple[Axis, ...], list[str], str | None]:
    """(what is swept, what is the same in every run, the sweep's name if one of the words gave it)."""
    axes: list[Axis] = []
    fixed: list[str] = []
    name: str | None = None
    for word in words:
        key = word.partition("=")[0]
        found = axis(word)
        if found is None and key == "name":
            name = word.partition("=")[2]
        elif found is None:
            fixed.append(word)
        else:
            _require_stage(key)
            if key in [a.key for a in axes]:
                raise PalateError(f"{key}: it is swept twice. Put all its values into one list.")
            axes.append(found)
    return tuple(axes), fixed, name


def _require_stage(key: str) -> None:
    """A swept key belongs to a stage: nothing else changes what a run learns."""
    first, dot, _ = key.partition(".")
    if first == "seed":
        raise PalateError(
            "seed: seeds are no setting to sweep. Write --seeds 1,2,3, and every trial is run under each."
        )
    if first in Experiment.model_fields and first != "stages":
        raise PalateError(
            f"{key}: it names no stage, so every value would give the same run. Sweep stages.STAGE.SETTING."
        )
    if first != "stages" or not dot:
        known = ["stages", *Experiment.model_fields]
        hint = nearest(first, known) if first != "stages" else ""
        raise PalateError(f"{key}: it names no stage.{hint} Write stages.STAGE.SETTING, a stage by its number or name.")


def _sweep_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise PalateError(f"--name {name!r}: it cannot be a folder name. Use letters, digits, '.', '_' and '-'.")
    return name


def seeds_of(text: str, first: int) -> tuple[int, ...]:
    """`3` is three seeds from the recipe's on; `1,2,7` are these, and `7,` is one."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() for part in parts):
        raise PalateError(f"--seeds {text}: write how many, as in --seeds 3, or which, as in --seeds 1,2,7.")
    numbers = [int(part) for part in parts]
    if "," not in text:
        if numbers[0] < 1:
            raise PalateError("--seeds 0: at least one seed is needed. With three or more, differences can be judged.")
        return tuple(range(first, first + numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise PalateError(f"--seeds {text}: a seed is there twice, and would count as two. Leave one out.")
    return tuple(numbers)


class _Maker:
    """Makes runs, and computes what a stage depends on once for all runs that share it."""

    def __init__(self, given: Mapping[str, Any], fixed: Sequence[str], folder: Path) -> None:
        self.given, self.fixed, self.folder = given, tuple(fixed), folder
        self._known: dict[str, Evidence] = {}

    def run(self, trial: Trial, seed: int) -> Run:
        """The run of one trial under one seed. Raises PalateError for settings that do not exist."""
        placed = [f"name={trial.name}-seed-{seed}", f"seed={seed}", f"output_dir={_quoted(str(self.folder))}"]
        assignments = (*self.fixed, *trial.assignments, *placed)
        planned = plan(self.given, assignments)
        return Run(trial, seed, planned, assignments, self._evidences(planned))

    def _evidences(self, planned: Plan) -> tuple[Evidence, ...]:
        hashes: dict[str, str] = {}
        found: list[Evidence] = []
        for index, stage in enumerate(planned.stages):
            read = {name: hashes[name] for name in stage.references()}
            key = fingerprint(
                {"stage": planned.resolved["stages"][index], "seed": planned.experiment.seed, "read": read}
            )
            if key not in self._known:
                self._known[key] = evidence_of(planned, index, hashes)
            hashes[stage.name] = self._known[key].hash
            found.append(self._known[key])
        return tuple(found)


def _quoted(text: str) -> str:
    """A text that YAML reads back as it is, whatever is in it."""
    return text if re.fullmatch(r"[\w./-]*[A-Za-z_/][\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _refuse_equal(runs: Sequence[Run], seeds: Sequence[int]) -> None:
    """Two trials that would do the very same thing are a mistake, and would look like agreement."""
    seen: dict[str, Run] = {}
    for run in runs[:: len(seeds)]:
        key = fingerprint({"stages": run.plan.resolved["stages"]})
        if key in seen:
            same = seen[key].trial.assignments, run.trial.assignments
            differing = ", ".join(f"{a} and {b.partition('=')[2]}" for a, b in zip(*same, strict=True) if a != b)
            raise PalateError(f"{differing}: these give the very same run. Leave one out.")
        seen[key] = run


def _as_json(value: Any) -> Any:
    """As it comes back from a JSON file, so that the two compare."""
    return json.loads(json.dumps(value, default=str))
