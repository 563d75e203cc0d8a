"""What a stage's checkpoint holds and how a stage goes on from one: trained weights, optimiser, a few numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from palate.cast import Cast
from palate.step import Stepper
from palate.workspace import Workspace


def save(here: Workspace, number: int, cast: Cast, trains: Sequence[str], stepper: Stepper, **state: Any) -> None:
    """A checkpoint after step or rollout `number`; `state` is whatever else the loop remembers, as JSON."""
    tensors = {f"model/{name}": tensor for name, tensor in cast.state(trains).items()}
    tensors |= {f"optimiser/{name}": tensor for name, tensor in stepper.state().items()}
    here.store.save(number, tensors, state)


def resume(here: Workspace, cast: Cast, stepper: Stepper) -> tuple[int, Mapping[str, Any]]:
    """Put the newest whole checkpoint back; (its number, its state), or (0, nothing) at the beginning."""
    found = here.store.newest()
    if found is None:
        return 0, {}
    number, tensors, state = found
    cast.restore(_part(tensors, "model/"))
    stepper.restore(_part(tensors, "optimiser/"))
    here.resume(number)
    return number, state


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
