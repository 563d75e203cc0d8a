"""The first optimiser step of a stage, as far as its gradient: what it is taken on, by whom, minimising what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palate.batches import Loss, Rows
from palate.cast import Cast
from palate.cutting import Microbatch
from palate.parallel import World
from palate.step import Optimiser, Stepper


@dataclass(frozen=True)
class Update:
    """One update. `batch` is prepared; `loss` takes any part of it."""

    stage: str
    cast: Cast
    trains: Sequence[str]
    batch: Rows
    loss: Callable[[Any], Loss]
    microbatch: Microbatch
    optimiser: Optimiser

    @property
    def dtype(self) -> torch.dtype:
        """The number format its weights compute in."""
        return self.cast.seat(self.trains[0]).trunk.computes_in

    def gradient(self, microbatch: Microbatch, world: World) -> dict[str, Tensor]:
        """The gradient in parts within `microbatch`, by name; no weight moves."""
        stepper = Stepper(self.cast.parameters(self.trains), self.optimiser, world)
        return stepper.gradient(self.batch, self.loss, microbatch)
