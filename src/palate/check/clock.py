"""Time of a stage: parts of it measured on this machine and multiplied out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from palate.batches import Rows
from palate.check.found import Time
from palate.cutting import Microbatch, cut
from palate.step import Stepper

T = TypeVar("T")
_PARTS = 4
"""At most so many micro-batches of a step are run; more are multiplied out."""
_TURNS = 3
"""The fastest of so many runs counts: the first pays for memory that later ones find ready."""


def timed(ask: Callable[[], T]) -> tuple[T, float]:
    """What `ask` returns, and the seconds it took on whatever device it ran."""
    _wait()
    began = time.perf_counter()
    answer = ask()
    _wait()
    return answer, time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def of_step(stepper: Stepper, batch: Rows, loss: Callable[[Any], Any], most: Microbatch, rows: int) -> float:
    """Seconds of one optimiser step of `rows` rows, from a few micro-batches of `batch`.

    The step is the real one at a learning rate of zero, so that the throw-away cast it moves stays where it is.
    """
    some = sum(part.size for part in cut(batch, most, stepper.world)[:_PARTS])
    few = batch.select(torch.arange(some))
    seconds = min(timed(lambda: stepper.step(few, loss, most, 0.0))[1] for _ in range(_TURNS))
    return seconds * rows / few.size


def total(seconds: Mapping[str, float], basis: str) -> Time:
    """The parts and their sum."""
    return Time(dict(seconds), sum(seconds.values()), basis + _busy())


def _busy() -> str:
    """A reservation where other work shares the machine."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 1.5 * cores:
        return ""
    return f"; the machine is busy (load {load:.1f} on {cores} cores), so this may be far off"
