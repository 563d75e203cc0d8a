"""What a loop does about numbers that are not finite: keep the batch, skip the step, count; go back once; give up."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from safetensors.torch import save_file
from torch import Tensor

from palate.batches import Rows
from palate.provenance import write_json
from palate.settings import NotFinite
from palate.workspace import Workspace

PATIENCE = 3
"""Skipped steps in a row that a run survives: one bad batch is bad luck, a fourth in a row is divergence."""
_KEPT = 16
"""Batches put aside for one stage; a run that skips more is not explained better by more of them."""


class Diverged(NotFinite):
    """More steps in a row than patience allows had to be skipped."""


class Spoilt(NotFinite):
    """Numbers that are not finite, and the batch they were met in."""

    def __init__(self, text: str, batch: Rows) -> None:
        super().__init__(text)
        self.batch = batch


@contextmanager
def about(batch: Rows) -> Generator[None]:
    """Numbers within that are not finite were met in this batch."""
    try:
        yield
    except Spoilt:
        raise
    except NotFinite as fault:
        raise Spoilt(str(fault), batch) from fault


class Guard:
    """Takes the steps of one stage, or skips them. `rate` is what learning rates are multiplied by."""

    def __init__(self, here: Workspace, state: Mapping[str, Any], rate: float = 1.0) -> None:
        before = cast("dict[str, float]", state.get("guard", {}))
        self.here = here
        self.rate = min(rate, before.get("rate", 1.0))
        self.taken = int(before.get("taken", 0))
        self.skipped = int(before.get("skipped", 0))
        self.in_a_row = int(before.get("in_a_row", 0))

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"rate": self.rate, "taken": self.taken, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def step(self, number: int, batch: Rows, take: Callable[[], dict[str, float]]) -> dict[str, float] | None:
        """The metrics of one step, or None when it had to be skipped."""
        try:
            seen = take()
        except NotFinite as fault:
            self.skip(number, fault, batch)
            return None
        self.taken += 1
        self.in_a_row = 0
        return seen

    def skip(self, number: int, fault: NotFinite, batch: Rows | None = None) -> None:
        """Put the batch aside, count, tell. Raises Diverged when patience is over."""
        batch = fault.batch if isinstance(fault, Spoilt) else batch
        self.skipped += 1
        self.in_a_row += 1
        kept = self.here.world.first(
            lambda: put_aside(self.here.folder / "skipped", number, self.skipped, batch, fault)
        )
        where = f"; its batch is in {kept}" if kept else ""
        self.here.warn(f"step {number} was skipped ({self.in_a_row} in a row): {fault}{where}")
        if self.in_a_row > PATIENCE:
            raise Diverged(
                f"{self.here.name}: {self.in_a_row} steps in a row gave numbers that are not finite, the last: {fault} "
                "Lower optimiser.learning_rate, set optimiser.max_grad_norm, or look at the batches in "
                f"{self.here.folder / 'skipped'}."
            )


class Loop(Protocol):
    """What can be begun again from its newest checkpoint."""

    guard: Guard
    done: int

    def go(self) -> None:
        """To the end of the stage."""
        ...


L = TypeVar("L", bound=Loop)


def survive(here: Workspace, begin: Callable[[float], L]) -> L:
    """The loop that `begin(rate)` makes, gone through to its end.

    When it diverges, it is begun once more from the last good checkpoint with half the rate. Nothing else would
    change on the way, so the second time is the last: it raises Diverged, exit code 3.
    """
    loop = begin(1.0)
    try:
        loop.go()
        return loop
    except Diverged as fault:
        if loop.guard.rate < 1.0:
            raise
        told, taken = str(fault), loop.guard.taken
    del loop
    gc.collect()
    here.world.first(lambda: _forget(here, taken))
    loop = begin(0.5)
    if loop.done == 0:  # there was no checkpoint, so nobody has taken the logs back yet
        here.resume(0)
    here.warn(f"{told} Going back to the last good checkpoint, once, with half the learning rate.")
    loop.go()
    return loop


def _forget(here: Workspace, taken: int) -> None:
    """Remove the checkpoints with no step between them and now: their weights are those that have just failed."""
    for number in here.store.steps():
        found = here.store.newest(number)
        if found is not None:
            if found[2].get("guard", {}).get("taken") != taken:
                return
            here.store.forget(number)


def put_aside(folder: Path, number: int, count: int, batch: Rows | None, fault: Exception) -> Path | None:
    """Write a batch's tensors and why it could not be learnt from; where, or None when there is none or enough."""
    if batch is None or count > _KEPT:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{number:08d}-{count:04d}.safetensors"
    save_file({name: x.detach().cpu().clone().contiguous() for name, x in _tensors(batch, "")}, path)
    write_json(path.with_suffix(".json"), {"step": number, "why": str(fault), "batch": type(batch).__name__})
    return path


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside a batch, by dotted name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Rows):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name), f"{name}.{field.name}".strip("."))
    elif isinstance(value, Mapping):
        for key, below in cast(Mapping[str, Any], value).items():
            yield from _tensors(below, f"{name}.{key}".strip("."))
