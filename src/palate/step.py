"""One optimiser step for every method: the only place that divides a loss, calls backward, and moves weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from palate import optim
from palate.batches import Loss, Rows
from palate.parallel import World
from palate.randomness import permutation
from palate.settings import PalateError, Settings

R = TypeVar("R", bound=Rows)
LossFunction = Callable[[R], Loss]


_SCHEDULES = {"constant": optim.constant, "linear": optim.linear, "cosine": optim.cosine}


class Optimiser(Settings):
    """How weights move."""

    learning_rate: float = Field(default=3e-6, ge=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls to zero over the stage: `linear` and `cosine` reach it after the last update."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the rate rises linearly to its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: float = Field(default=1e-5, gt=0)
    """Adam's epsilon; 1e-5 in the reference systems, not 1e-8."""
    variant: Literal["torch", "tensorflow"] = "torch"
    """Where epsilon enters Adam: after (`torch`) or before (`tensorflow`, the 2019 work) the bias correction."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (AdamW); 0 in the 2019 work."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Clip the gradient to this global norm; none in the reference systems."""

    def rate(self, update: int, updates: int) -> float:
        """The learning rate of update `update` (from 0) out of `updates`."""
        schedule = _SCHEDULES[self.schedule]
        return self.learning_rate * optim.warmed_up(update, updates, self.warmup_steps, schedule)


class Stepper:
    """The trained parameters, by name, with their optimiser."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: Optimiser, world: World) -> None:
        if not parameters:
            raise PalateError("nothing to train: no parameter of the trained roles takes a gradient.")
        self.names = list(parameters)
        self.parameters = [parameters[name] for name in self.names]
        self.settings = settings
        self.world = world
        self.adam = optim.Adam(
            self.parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            variant=settings.variant,
            weight_decay=settings.weight_decay,
        )

    def step(self, batch: R, loss: LossFunction[R], microbatch: int, rate: float) -> dict[str, float]:
        """Move the weights once, by the gradient of `loss` over the whole of `batch`.

        Each term of the loss is a sum; it is divided here, once, by the count of its unit over all micro-batches
        and ranks. The gradient is therefore the same for any `microbatch`. Returns the averaged metrics.
        """
        counts = self.world.sum(batch.counts())
        seen = _Averages()
        for part in batch.split(microbatch):
            result = loss(part.trimmed())
            weighted = [t.total * (t.weight / max(counts[t.per], 1.0)) for t in result.terms.values()]
            torch.stack(weighted).sum().backward()
            seen.add(result, counts)
        norm = self._clip()
        if not math.isfinite(norm):
            self.adam.zero_grad(set_to_none=True)
            raise PalateError(f"the gradient is not finite (norm {norm}); lower the learning rate or look at the data.")
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        means, terms = self.world.sum_means(seen.means), self.world.sum(seen.terms)
        return {**means, **terms, "grad_norm": norm, "lr": rate}

    def _clip(self) -> float:
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """The optimiser's tensors by parameter name, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for field, value in self.adam.state.get(parameter, {}).items():
                tensors[f"{field}/{name}"] = torch.as_tensor(value)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            mine: dict[str, Any] = {}
            for key, value in tensors.items():
                field, _, owner = key.partition("/")
                if owner == name:
                    mine[field] = value.clone() if value.dim() == 0 else value.to(parameter.device).clone()
            if mine:
                self.adam.state[parameter] = mine


class _Averages:
    """Sums and counts of metrics over micro-batches, and the value of each term of the loss."""

    def __init__(self) -> None:
        self.means: dict[str, tuple[float, float]] = {}
        self.terms: dict[str, float] = {}

    def add(self, result: Loss, counts: Mapping[str, float]) -> None:
        for name, term in result.terms.items():
            value = float(term.total.detach()) / max(counts[term.per], 1.0)
            self.terms[name] = self.terms.get(name, 0.0) + value
        for name, mean in result.metrics.items():
            total, count = self.means.get(name, (0.0, 0.0))
            self.means[name] = (total + float(mean.total.detach()), count + mean.count)


def evaluate(batches: Iterable[R], loss: LossFunction[R]) -> dict[str, float]:
    """The loss terms and metrics of held-out batches, averaged over their units, without gradient."""
    totals: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for batch in batches:
            result, counts = loss(batch), batch.counts()
            found = {k: (float(t.total), counts[t.per]) for k, t in result.terms.items()}
            found |= {k: (float(m.total), m.count) for k, m in result.metrics.items()}
            for name, (total, count) in found.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + count)
    return {name: total / count for name, (total, count) in totals.items() if count}


def minibatches(batch: R, parts: int, *counter: int | str) -> Iterator[R]:
    """`batch` in `parts` consecutive slices of a fresh permutation drawn for this counter (details 15 and 16)."""
    order = torch.tensor(permutation(batch.size, *counter))
    for index in order.chunk(parts):
        yield batch.select(index)
