"""A run: one experiment, its stages in order, in one folder that can be read with `cat`.

    runs/NAME/
      run.yaml  resolved.yaml  provenance.json     as given · every value with its origin · versions, seed, command
      1-sft/    stage.yaml  metrics.jsonl  samples.jsonl  warnings.jsonl  checkpoints/  model/  DONE
      report.html  report.md

A stage whose settings, seed, data and earlier stages are what its DONE file says is skipped, so the same
command is also how a run goes on after it was stopped, and changing one stage runs again only what depends on
it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import yaml
from pydantic import Field, field_validator

from palate import parallel, products, ranks, settings, tracking
from palate.evidence import Evidence, functions, gather
from palate.live import Display, duration
from palate.models import linear
from palate.provenance import Origins, annotated, provenance, read_json, write_json, write_text
from palate.settings import PalateError, Resumable, Settings, Stopped, nearest
from palate.stage_folder import StageFolder
from palate.stopping import Stopper
from palate.workspace import Workspace

__all__ = ["Experiment", "Outcome", "Plan", "StageOutcome", "Workspace", "execute", "plan", "plan_file"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Experiment(Settings):
    """One experiment: what is common to its stages, and the stages."""

    name: str
    """The run's folder under `output_dir`; the recipe's file name when not given."""
    seed: int = Field(default=1, ge=0)
    """Every random draw of the run depends on it and on nothing else."""
    output_dir: str = "runs"
    """The folder that holds the runs."""
    report_to: tuple[str, ...] = ()
    """Trackers beside metrics.jsonl: tensorboard, trackio, wandb. One that fails never stops the run."""
    strategy: Literal["replicate", "zero2", "zero3"] = "replicate"
    """What several processes (torchrun) divide beside the work: nothing, gradients and optimiser, or weights too."""
    offload: bool = False
    """Keep what zero2 and zero3 shard in CPU memory: for GPUs that are too small, and slower."""
    linear: products.Asked = "auto"
    """The library that multiplies float32 matrices on a CPU: plain is torch's own, onednn the other one it holds,
    writing takes that while answers are written alone; auto measures. A run that goes on keeps what it began with."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """How many checkpoints of a stage are kept while it runs."""
    changed_data: Literal["refuse", "restart"] = "refuse"
    """When data changed under a stage that is half done: stop and say so, or begin that stage again."""
    verl_names: bool = False
    """Log each metric under verl's name too, where verl has one."""
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)
    """The stages in order; each a mapping with `kind` and that stage's settings."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a folder name. Use letters, digits, '.', '_' and '-'.")
        return name


@runtime_checkable
class Stage(Protocol):
    """What the run asks of a stage: any settings class with these may be a `kind`."""

    name: str

    def references(self) -> list[str]:
        """Names of the earlier stages it reads."""
        ...

    def files(self) -> list[str]:
        """Files and folders whose content counts for the cache; what is not there is left out."""
        ...

    def run(self, here: Workspace) -> None:
        """Do the job; leave what later stages load in `here.folder / "model"`."""
        ...


@dataclass(frozen=True)
class Plan:
    """An experiment whose every setting was found valid. `given` is what was asked, as asked."""

    experiment: Experiment
    stages: tuple[Stage, ...]
    given: Mapping[str, Any]
    resolved: Mapping[str, Any]
    origins: Origins
    functions: Mapping[str, str]
    """A digest of every function that was given as an object, by its place in the settings."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.experiment.output_dir).expanduser() / self.experiment.name

    def stage_folder(self, index: int) -> Path:
        """The numbered folder of a stage, counted from 1."""
        return self.folder / f"{index + 1}-{self.stages[index].name}"


def plan_file(path: Path, assignments: Sequence[str] = ()) -> Plan:
    """The plan of a YAML file with dotted overrides; every fault is found here, before anything runs."""
    given = settings.read_yaml(path)
    return plan({"name": path.stem, **given}, assignments)


def plan(given: Mapping[str, Any], assignments: Sequence[str] = (), source: str = "file") -> Plan:
    """The plan of a mapping of settings. Raises PalateError for the first fault."""
    asked = settings.override(dict(given), assignments) if assignments else dict(given)
    experiment = settings.parse(Experiment, asked)
    tracking.require_known(experiment.report_to)
    stages = tuple(_stage(s, f"stages.{i}") for i, s in enumerate(experiment.stages))
    _require_order(stages)
    dumped = [_dump(stage) for stage in stages]
    resolved = {**experiment.model_dump(mode="json", exclude={"stages"}), "stages": dumped}
    origins = Origins(asked, assignments, source)
    return Plan(experiment, stages, given, resolved, origins, functions(given))


def _stage(given: Mapping[str, Any], where: str) -> Stage:
    built = settings.build("stages", given, where)
    if not isinstance(built, Stage):
        raise PalateError(f"{where}.kind: {given['kind']!r} is no stage. A stage has name, references, files and run.")
    if not _NAME.fullmatch(built.name):
        raise PalateError(f"{where}.name: {built.name!r} cannot be a folder name. Use letters, digits, '.', '_', '-'.")
    return built


def _dump(stage: Stage) -> dict[str, Any]:
    assert isinstance(stage, Settings)
    return stage.model_dump(mode="json")


def _require_order(stages: Sequence[Stage]) -> None:
    """Every stage that is read comes before the one that reads it, and names are used once."""
    names = [stage.name for stage in stages]
    for index, stage in enumerate(stages):
        before = names[:index]
        if stage.name in before:
            raise PalateError(f"stages.{index}.name: {stage.name!r} is taken by stages.{names.index(stage.name)}.")
        for wanted in stage.references():
            if wanted not in before:
                raise PalateError(_no_such_stage(index, stage.name, wanted, names))


def _no_such_stage(index: int, name: str, wanted: str, names: Sequence[str]) -> str:
    where, before = f"stages.{index}: stage {name!r} reads 'stage:{wanted}'", names[:index]
    if wanted in names[index:]:
        return f"{where}, which does not come before it. Move stage {wanted!r} up."
    known = f"Stages before it: {', '.join(before)}." if before else "It is the first stage."
    move = f"Add a {wanted!r} stage before it, or name a model folder instead."
    return f"{where}, but no stage before it has that name.{nearest(wanted, before)} {known} {move}"


@dataclass(frozen=True)
class StageOutcome:
    """How one stage went."""

    name: str
    folder: Path
    skipped: bool
    seconds: float
    metrics: Mapping[str, Any]
    """The last metrics it logged."""


@dataclass(frozen=True)
class Outcome:
    """How a run went."""

    folder: Path
    stages: tuple[StageOutcome, ...]
    seconds: float


def execute(plan: Plan, display: Display, command: Sequence[str] = ()) -> Outcome:
    """Run every stage that is not done yet, in order, and return what came of it.

    Started by torchrun, every rank makes this call and all of them work on it; rank 0 writes. Raises PalateError when
    another process is at work in the folder or the disk is full, Stopped after SIGTERM or SIGINT, and whatever a stage
    raises; the same call made again goes on from the newest verified checkpoint of the stage that was stopped. When
    several ranks end early one of them raises, the others exit without a word.
    """
    with parallel.joined(plan.experiment.strategy, plan.experiment.offload) as world, _one_message(world, plan.folder):
        stopper = Stopper(world)
        with stopper.listening(), _alone(plan.folder, world):
            return _stages(plan, world, display, stopper, command)


def _stages(plan: Plan, world: parallel.World, display: Display, stopper: Stopper, command: Sequence[str]) -> Outcome:
    began = time.monotonic()
    choice = world.first(lambda: _describe(plan, command))
    linear.use(choice.backend)
    display.say(choice.line)
    outcomes: list[StageOutcome] = []
    hashes: dict[str, str] = {}
    for index, stage in enumerate(plan.stages):
        evidence = world.first(lambda index=index: evidence_of(plan, index, hashes))
        outcomes.append(_run_stage(plan, index, evidence, world, display, stopper))
        hashes[stage.name] = evidence.hash
    return Outcome(plan.folder, tuple(outcomes), time.monotonic() - began)


def evidence_of(plan: Plan, index: int, hashes: Mapping[str, str]) -> Evidence:
    """What the result of one stage depends on; `hashes` are those of the stages before it."""
    stage = plan.stages[index]
    return gather(_dump(stage), plan.experiment.seed, stage.references(), hashes, stage.files(), plan.functions)


@contextmanager
def _one_message(world: parallel.World, folder: Path) -> Generator[None]:
    """However many ranks fail, one of them says why; and a full disk is a fault with a next move."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as fault:  # told apart below; each is raised again, or told by another rank
        if not world.claims():
            ranks.end_quietly(fault.exit_code if isinstance(fault, PalateError | Stopped) else Resumable.exit_code)
        if world.lost(fault) and not isinstance(fault, PalateError):
            raise Resumable(
                f"{folder}: another process of this run is gone, so this one stops too. "
                "Run the same command again: it goes on from its newest checkpoint."
            ) from fault
        if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PalateError(
                f"{fault.filename or folder}: the disk is full. What was saved before is whole. "
                "Make room and run the same command again."
            ) from fault
        raise


@contextmanager
def _alone(folder: Path, world: parallel.World) -> Generator[None]:
    """Hold the run directory; a second run is told who holds it. A killed process lets go by dying."""
    with ExitStack() as kept:
        world.first(lambda: kept.enter_context(held(folder)) and None)
        yield


@contextmanager
def held(folder: Path) -> Generator[Path]:
    """The run directory's lock, held by this process. Raises PalateError when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise PalateError(
                f"{folder}: process {holder} is already at work in this run directory. "
                "Wait for it, or give this run another name: name=NAME."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield folder


def _describe(plan: Plan, command: Sequence[str]) -> products.Choice:
    """Write down what was asked and where it is done. Gives the back end that was chosen, for every rank."""
    folder = plan.folder
    plain = json.loads(json.dumps(dict(plan.given), default=str))  # functions have no YAML
    given = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    write_text(folder / "run.yaml", given)
    write_text(folder / "resolved.yaml", annotated(plan.resolved, plan.origins))
    path = folder / "provenance.json"
    earlier = read_json(path)
    choice = products.choose(plan.experiment.linear, earlier.get("products") or {})
    write_json(path, {**provenance(plan.experiment.seed, command, earlier), "products": choice.record})
    return choice


def _run_stage(
    plan: Plan, index: int, evidence: Evidence, world: parallel.World, display: Display, stopper: Stopper
) -> StageOutcome:
    stage, home = plan.stages[index], StageFolder(plan.stage_folder(index), evidence)
    done, aside = world.first(lambda: _prepare(plan, index, home, display))
    if done:
        display.say(f"{stage.name}: done before, skipped")
        return StageOutcome(stage.name, home.path, True, 0.0, _last_metrics(home.path))
    began = time.monotonic()
    here = _workspace(plan, index, world, display, stopper)
    try:
        stage.run(here)
    except PalateError:
        if world.is_main:
            home.give_way(aside)
        raise
    finally:
        here.close()
    seconds = time.monotonic() - began
    world.first(lambda: home.finish(seconds))
    display.say(f"{stage.name}: done in {duration(seconds)}")
    return StageOutcome(stage.name, home.path, False, seconds, _last_metrics(home.path))


def _prepare(plan: Plan, index: int, home: StageFolder, display: Display) -> tuple[bool, Path | None]:
    """Make a stage's folder ready: whether its work is there already, and where other work was put aside."""
    stage = plan.stages[index]
    home.adopt(stage.name)
    home.refuse_changed_data(stage.name, plan.experiment.changed_data)
    aside = home.make_room(display.say)
    if home.is_done(display.warn):
        return True, aside
    home.start(annotated(plan.resolved["stages"][index], plan.origins, ("stages", str(index))))
    return False, aside


def _workspace(plan: Plan, index: int, world: parallel.World, display: Display, stopper: Stopper) -> Workspace:
    experiment = plan.experiment
    return Workspace(
        folder=plan.stage_folder(index),
        name=plan.stages[index].name,
        seed=experiment.seed,
        models={s.name: plan.stage_folder(i) / "model" for i, s in enumerate(plan.stages[:index])},
        world=world,
        display=display,
        trackers={name: tracking.TRACKERS[name] for name in experiment.report_to},
        settings=plan.resolved["stages"][index],
        keep_checkpoints=experiment.keep_checkpoints,
        verl_names=experiment.verl_names,
        stopper=stopper,
    )


def _last_metrics(folder: Path) -> Mapping[str, Any]:
    rows = tracking.JsonLines(folder / "metrics.jsonl").read()
    return rows[-1] if rows else {}
