"""Memory of a stage: what its cast holds, counted tensor by tensor, and what one pass keeps, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from palate.cast import Cast
from palate.check.found import Memory
from palate.models.load import Loaded
from palate.models.trunk import Trunk

_MOMENTS = 2
"""Adam keeps the mean and the mean square of each gradient."""


def of_cast(cast: Cast, trains: Sequence[str], others: Iterable[Loaded] = ()) -> tuple[dict[str, int], dict[str, int]]:
    """(parameters, bytes) by use. Tensors that several roles share count once, whoever names them."""
    training = {id(p): p for p in cast.parameters(trains).values()}
    everything = {id(p): p for seat in cast.roles.values() for p in _of_seat(seat.trunk, seat.head)}
    frozen = [p for i, p in everything.items() if i not in training]
    judges = {id(p): p for loaded in others for p in _of_seat(loaded.trunk, loaded.head)}
    parameters = {"trained": _count(training.values()), "frozen": _count(frozen)}
    held = {
        "trained weights": _bytes(training.values()),
        "frozen weights": _bytes(frozen),
        "gradients": _bytes(training.values()),
        "Adam moments": _MOMENTS * _bytes(training.values()),
    }
    if judges:
        parameters["reward models"] = _count(judges.values())
        held["reward models"] = _bytes(judges.values())
    return parameters, held


def of_average(cast: Cast, role: str, decay: float | None) -> dict[str, int]:
    """Bytes of a moving average of the role's trained weights, by use; nothing where none is kept."""
    return {} if decay is None else {"moving average": _bytes(cast.parameters((role,)).values())}


def _of_seat(trunk: Trunk, head: nn.Module | None) -> list[nn.Parameter]:
    return [*trunk.parameters(), *(head.parameters() if head is not None else ())]


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def activations(forward: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass: each storage once, the weights' own not counted."""
    known = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())  # a freed storage's address would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(kept.values())


@torch.no_grad()
def cache_bytes(trunk: Trunk) -> int:
    """Bytes of keys and values that one token of one answer keeps while it is written."""
    one = torch.zeros(1, 1, dtype=torch.long, device=trunk.device)
    _, cache = trunk.extend(one, torch.ones_like(one, dtype=torch.bool), None)
    return sum(_bytes([layer.keys, layer.values]) for layer in cache.layers)


def memory(parameters: Mapping[str, int], held: Mapping[str, int], basis: str) -> Memory:
    """The whole: gradients and activations live while a step is made, keys and values while answers are written."""
    passing = ("gradients", "activations", "keys and values")
    always = sum(size for use, size in held.items() if use not in passing)
    step = held.get("gradients", 0) + held.get("activations", 0)
    return Memory(dict(parameters), dict(held), always + max(step, held.get("keys and values", 0)), basis)
