"""What a stage's checkpoint holds and how a stage goes on from one: trained weights, optimiser, a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from palate.algorithms.protocol import Offline, Online
from palate.cast import Cast
from palate.cutting import Microbatch
from palate.parallel import whole
from palate.step import Stepper
from palate.workspace import Workspace


def save(
    here: Workspace,
    number: int,
    cast: Cast,
    algorithm: Offline | Online,
    stepper: Stepper,
    more: Mapping[str, Tensor] | None = None,
    **state: Any,
) -> None:
    """A checkpoint after step or rollout `number`; `more` and `state` are whatever else the loop remembers.

    Every rank comes here; sharded tensors come together and rank 0 writes them. So a checkpoint is of no strategy and
    no number of ranks.
    """
    tensors = {f"model/{name}": whole(tensor) for name, tensor in cast.state(algorithm.trains, algorithm.moves).items()}
    tensors |= {f"optimiser/{name}": tensor for name, tensor in stepper.state().items()}
    said = {**state, "budget": cast.budget, "most": asdict(stepper.most)}
    here.world.first(lambda: here.store.save(number, {**tensors, **(more or {})}, said) and None)


def resume(here: Workspace, cast: Cast, stepper: Stepper) -> tuple[int, Mapping[str, Any], Mapping[str, Tensor]]:
    """Put the newest whole checkpoint back; (its number, its state, its other tensors), or (0, {}, {}) at the start.

    Rank 0 says which checkpoint that is; every rank reads it.
    """
    mine = here.store.newest() if here.world.is_main else None
    step = here.world.first(lambda: mine[0] if mine else None)
    found = mine if mine or step is None else here.store.newest(step)
    if found is None:
        return 0, {}, {}
    number, tensors, state = found
    cast.restore(_part(tensors, "model/"))
    stepper.restore(_part(tensors, "optimiser/"))
    stepper.most = Microbatch(**state.get("most", {}))
    cast.budget = state.get("budget", cast.budget)
    here.resume(number)
    return number, state, tensors


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
