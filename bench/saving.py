"""What checkpoints cost: the share of a real run's training time that goes into saving, and into what part of it.

    python -m bench.saving                        the tasting room, from nothing, in minutes; exit code 1 above 5 %
    python -m bench.saving --page bench/saving.md

Every stage that trains runs as it ships, at its default cadence (a checkpoint about every tenth of the stage). Training
time is from the first optimiser step of a stage to the end of its last one, saving included.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from palate import checkpoint, run, settings
from palate.live import Display
from palate.stages import _state
from palate.step import Stepper
from palate.workspace import Workspace

RECIPE = Path("recipes/tasting_room.yaml")
MOST = 0.05
PARTS: Mapping[str, tuple[Any, str]] = {
    "serialise and write": (checkpoint, "save_file"),
    "sha256": (checkpoint, "sha256"),
    "fsync": (os, "fsync"),
}
"""What a save does, each with the function whose time it is; none of them calls another."""


@dataclass
class Cost:
    """What one stage spent, in seconds."""

    began: float = 0.0
    ended: float = 0.0
    steps: int = 0
    size: int = 0
    """Bytes of a checkpoint."""
    saves: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    """For each save, the seconds in each part of it."""

    @property
    def share(self) -> float:
        """Saving, as a share of the training time."""
        return sum(self.saves) / (self.ended - self.began)


class Meter:
    """Clocks around the functions that train and save, for as long as it is open."""

    def __init__(self) -> None:
        self.stages: dict[str, Cost] = {}
        self._stage = ""
        self._saving = False
        self._replaced: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Meter:
        self._around(Workspace, "progress", self._stage_begins)
        self._around(Stepper, "step", self._step)
        self._around(_state, "save", self._save)
        for name, (owner, function) in PARTS.items():
            self._around(owner, function, functools.partial(self._part, name))
        return self

    def __exit__(self, *fault: object) -> None:
        for owner, name, original in self._replaced:
            setattr(owner, name, original)

    def _around(self, owner: Any, name: str, clock: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        self._replaced.append((owner, name, original))

        @functools.wraps(original)
        def clocked(*args: Any, **more: Any) -> Any:
            return clock(original, *args, **more)

        setattr(owner, name, clocked)

    def _stage_begins(self, progress: Callable[..., Any], here: Workspace, *args: Any, **more: Any) -> Any:
        self._stage = here.name
        self.stages.setdefault(here.name, Cost())
        return progress(here, *args, **more)

    def _step(self, step: Callable[..., Any], *args: Any, **more: Any) -> Any:
        cost = self.stages[self._stage]
        cost.began = cost.began or time.perf_counter()
        result = step(*args, **more)
        cost.ended, cost.steps = time.perf_counter(), cost.steps + 1
        return result

    def _save(self, save: Callable[..., Any], here: Workspace, number: int, *args: Any, **more: Any) -> None:
        cost = self.stages[here.name]
        for seconds in cost.parts.values():
            seconds.append(0.0)
        began, self._saving = time.perf_counter(), True
        save(here, number, *args, **more)
        cost.saves.append(time.perf_counter() - began)
        self._saving = False
        cost.size = sum(file.stat().st_size for file in (here.store.folder / f"step-{number:08d}").iterdir())

    def _part(self, name: str, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        began = time.perf_counter()
        result = function(*args, **more)
        if self._saving:
            self.stages[self._stage].parts[name][-1] += time.perf_counter() - began
        return result


def measure(given: Mapping[str, Any], words: Sequence[str], folder: Path) -> dict[str, Cost]:
    """Run the stages of a recipe that train, from nothing, and return what each spent."""
    training = [stage for stage in given["stages"] if stage["kind"] in ("train", "online")]
    plan = run.plan({**given, "stages": training}, [*words, f"output_dir={folder}"])
    with Meter() as meter:
        run.execute(plan, Display())
    return meter.stages


def table(stages: Mapping[str, Cost]) -> str:
    """Markdown: a row for each stage."""
    lines = [
        f"| stage | steps | training | checkpoint | saves | a save, median | {' | '.join(PARTS)} | rest | share |",
        "|---|" + "---|" * (7 + len(PARTS)),
    ]
    for name, cost in stages.items():
        whole = median(cost.saves)
        parts = [median(seconds) for seconds in cost.parts.values()]
        spent = " | ".join(f"{seconds * 1e3:.1f} ms" for seconds in (*parts, whole - sum(parts)))
        lines.append(
            f"| {name} | {cost.steps} | {cost.ended - cost.began:.1f} s | {cost.size / 2**20:.1f} MiB | "
            f"{len(cost.saves)} | {whole * 1e3:.1f} ms | {spent} | {cost.share:.2%} |"
        )
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """The exit code: 0 when every stage saves for less than `MOST` of its training time."""
    parser = argparse.ArgumentParser(prog="python -m bench.saving")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings of the recipe, to change it")
    parser.add_argument("--page", type=Path, help="write the figures here as well")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        stages = measure({"name": "saving", **settings.read_yaml(RECIPE)}, asked.words, Path(folder))
    print(table(stages))
    if asked.page:
        command = " ".join(["python -m bench.saving", *asked.words])
        asked.page.write_text(f"# Saving\n\n`{command}`\n\n{table(stages)}", encoding="utf-8")
    return 0 if all(cost.share < MOST for cost in stages.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
