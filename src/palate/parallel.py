"""The world a run lives in: how many processes, which one this is, and how their numbers are added.

This is the only file that may speak of `torch.distributed`. A world of one is the same object as any other:
callers add through it and ask `is_main`, and no other file asks how many processes there are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from palate.settings import PalateError

Summed = TypeVar("Summed", float, Tensor, dict[str, float])


@dataclass(frozen=True)
class World:
    """The processes of one run. Rank 0 is the one that writes files and speaks to the user."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def sum(self, value: Summed) -> Summed:
        """`value` added over all ranks, the same on each: a number, a tensor of any shape, or numbers by
        name.
        """
        return value

    def sum_means(self, means: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """The mean over all ranks of each name from every rank's (sum, count); names without a count are left
        out.
        """
        totals = self.sum({name: total for name, (total, _) in means.items()})
        counts = self.sum({name: count for name, (_, count) in means.items()})
        return {name: totals[name] / count for name, count in counts.items() if count}

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
