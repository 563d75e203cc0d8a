"""A place where stages are set up without touching the run: a scratch folder, and stand-ins for models to come.

A model that an earlier stage has not trained yet is stood in for by what that stage starts from: the same family,
shapes and tokenizer, so counts, memory and time are right; what it would say is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from palate.live import Display
from palate.models.heads import fresh_head
from palate.models.load import Loaded, Loading
from palate.models.make import Make
from palate.models.save import Card, save, save_head
from palate.parallel import World
from palate.run import Plan
from palate.settings import PalateError
from palate.stages import _seats
from palate.tracking import JsonLines
from palate.workspace import Workspace


class Rehearsal:
    """The scratch folder of one check. `models` is where each stage's model is, real or standing in."""

    def __init__(self, plan: Plan, scratch: Path) -> None:
        self.plan, self.scratch = plan, scratch
        self.models: dict[str, Path] = {}
        self.stand_ins: set[str] = set()

    def workspace(self, index: int) -> Workspace:
        """What a stage is given, in the scratch folder; earlier models are found through `models`."""
        stage = self.plan.stages[index]
        folder = self.scratch / f"{index + 1}-{stage.name}"
        folder.mkdir(parents=True, exist_ok=True)
        return Workspace(
            folder=folder,
            name=stage.name,
            seed=self.plan.experiment.seed,
            models=self.models,
            world=World(),
            display=Display(Console(quiet=True)),
            trackers={},
            settings=self.plan.resolved["stages"][index],
        )

    def open(self, model: str | Make, here: Workspace, role: str, how: Loading, texts: Iterable[str] = ()) -> Loaded:
        """The model a stage starts from. Raises PalateError, too, where its weights alone do not fit this machine."""
        if isinstance(model, str):
            _require_memory(here.resolve(model))
        return _seats.open_model(model, here, role, how, texts)

    def warnings(self, here: Workspace) -> list[str]:
        """What was said through `here.warn`, about the folder that the stage itself would work in."""
        index = [stage.name for stage in self.plan.stages].index(here.name)
        said = (row["warning"] for row in JsonLines(here.folder / "warnings.jsonl").read())
        return [text.replace(str(here.folder), str(self.plan.stage_folder(index))) for text in said]

    def is_trained(self, model: object) -> bool:
        """Whether a model is what it will be when it is read, not a stand-in."""
        name = model.removeprefix("stage:") if isinstance(model, str) and model.startswith("stage:") else ""
        return name not in self.stand_ins

    def leave(self, here: Workspace, start: str | None, loaded: Loaded, judges: bool, plain: bool) -> None:
        """Let later stages find a stand-in for the model that the stage would leave.

        `start` is the folder or hub id it was loaded from, None for a model made from nothing; `judges` when the
        stage trains a reward head; `plain` where the tokenizer and the family are as the folder has them.
        """
        self.stand_ins.add(here.name)
        folder = Path(start).expanduser() if start is not None else None
        if folder is not None and plain and not judges:
            self.models[here.name] = folder
            return
        target = here.folder / "model"
        self.models[here.name] = target
        head = loaded.head or fresh_head(loaded.trunk.width, "reference", 0) if judges else None
        if head is not None:
            head.trained = True
        if head is not None and folder is not None and plain and (folder / "config.json").exists():
            target.mkdir()
            for file in folder.iterdir():
                (target / file.name).symlink_to(file.resolve())
            save_head(target, head)
            return
        save(target, loaded.trunk, loaded.tokenizer, Card(here.name, loaded.source), head)


def _require_memory(folder: Path) -> None:
    """Say so before the machine runs out of memory, which would end this process without a word."""
    size, free = sum(f.stat().st_size for f in folder.glob("*.safetensors")), _free()
    if free is not None and size > free:
        raise PalateError(
            f"{folder}: its weights are {size / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free here. "
            "Check it on the machine it will run on."
        )


def _free() -> int | None:
    """Bytes of memory that can be had without swapping, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    told = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((1024 * int(words[1]) for words in told), None)
