"""The place a stage works in: its folder, its seed, its checkpoints, and whoever listens to its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from palate import metrics as meanings
from palate.checkpoint import CheckpointStore
from palate.live import Bar, Display
from palate.parallel import World
from palate.settings import PalateError
from palate.stopping import Stopper
from palate.tracking import JsonLines, Opener, Trackers

STAGE = "stage:"


class Workspace:
    """What a stage is given by the run.

    `folder` is the stage's own, `seed` the run's, `name` the stage's. `models` maps the earlier stages to
    their model folders. `store` keeps the checkpoints; `world` adds numbers over processes.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        seed: int,
        models: Mapping[str, Path],
        world: World,
        display: Display,
        trackers: Mapping[str, Opener],
        settings: Mapping[str, Any],
        keep_checkpoints: int = 2,
        verl_names: bool = False,
        stopper: Stopper | None = None,
    ) -> None:
        self.folder, self.name, self.seed, self.world = folder, name, seed, world
        self.store = CheckpointStore(folder / "checkpoints", keep_checkpoints, self.warn)
        self.stopper = stopper or Stopper(world)
        self._models, self._display, self._verl_names = models, display, verl_names
        self._metrics = JsonLines(folder / "metrics.jsonl")
        self._samples = JsonLines(folder / "samples.jsonl")
        self._tokens = JsonLines(folder / "tokens.jsonl")
        self._warnings = JsonLines(folder / "warnings.jsonl", keep=True)
        self._trackers = Trackers(trackers if world.is_main else {}, folder.parent, name, settings, self.warn)
        self._step = 0

    def resolve(self, reference: str | Path) -> Path:
        """Where a model is: `stage:NAME` becomes that stage's model folder; a path or hub id stays what it
        is.
        """
        text = str(reference)
        if not text.startswith(STAGE):
            return Path(text).expanduser()
        name = text.removeprefix(STAGE)
        if name not in self._models:
            raise PalateError(f"{self.name}: it reads {text!r}, but its references() do not name that stage.")
        return self._models[name]

    def resume(self, step: int) -> None:
        """The stage goes on from the checkpoint of `step`: what was logged after it did not happen."""
        self._step = step
        if self.world.is_main:
            for log in (self._metrics, self._samples, self._tokens, self._warnings):
                log.cut(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step to metrics.jsonl and to the trackers."""
        self._step = step
        numbers = {name: float(value) for name, value in metrics.items()}
        if self._verl_names:
            numbers |= meanings.verl_names(numbers)
        self._write(self._metrics, step, [numbers])
        self._trackers.log(step, numbers)

    def sample(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sample rows of one step to samples.jsonl, and show a few of them now and then."""
        self._write(self._samples, step, rows)
        self._display.samples(step, rows)

    def tokens(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a few answers of one step, token by token, to tokens.jsonl."""
        self._write(self._tokens, step, rows)

    def warn(self, text: str) -> None:
        """Say that something should be looked at, to the user and in warnings.jsonl."""
        self._write(self._warnings, self._step, [{"warning": text}])
        self._display.warn(text)

    def _write(self, log: JsonLines, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every rank knows the same numbers; one writes them."""
        if self.world.is_main:
            log.append(step, rows)

    def progress(self, total: int, title: str, done: int = 0) -> Bar:
        """The stage's progress bar, to be used in a `with`; `advance(metrics)` moves it and its live line."""
        return self._display.bar(total, title, done)

    def say(self, text: str) -> None:
        """A plain sentence to the user."""
        self._display.say(text)

    def close(self) -> None:
        """Finish the trackers."""
        self._trackers.close()


def named_stages(values: Iterable[str | Path]) -> list[str]:
    """The stage names among some values: those written `stage:NAME`."""
    texts = [str(value) for value in values]
    return [text.removeprefix(STAGE) for text in texts if text.startswith(STAGE)]
