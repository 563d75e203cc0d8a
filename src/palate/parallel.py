"""The world a run lives in: how many processes, which one this is, and how their numbers are added.

This is the only file that may speak of `torch.distributed`. A world of one is the same object as any other:
callers add through it and ask `is_main`, and no other file asks how many processes there are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from palate.settings import PalateError

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class World:
    """The processes of one run. Rank 0 is the one that writes files and speaks to the user."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, value: Number) -> Number:
        """`value`, a number or a tensor of any shape, added over all ranks; the same on each."""
        return value

    def mean(self, total: float, count: float) -> float:
        """The mean over all ranks from each rank's sum and count; nan when nothing was counted anywhere."""
        counted = self.sum(count)
        return self.sum(total) / counted if counted else float("nan")

    def barrier(self) -> None:
        """Return once every rank has come here."""


def world() -> World:
    """The world this process was started in; several processes are refused, not half supported."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise PalateError(
            f"WORLD_SIZE is {size}: this version of palate trains in one process. Start it without torchrun, "
            "or unset WORLD_SIZE."
        )
    return World()
