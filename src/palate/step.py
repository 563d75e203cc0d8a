"""One optimiser step for every method: the only place that divides a loss, calls backward, and moves weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from palate import optim
from palate.batches import Loss, Rows
from palate.cutting import Microbatch, cut, lengths, neighbours
from palate.parallel import World, local, part_like, whole, whole_like
from palate.randomness import permutation
from palate.settings import NotFinite, PalateError, Settings

R = TypeVar("R", bound=Rows)
LossFunction = Callable[[R], Loss]


_AVERAGE = "average"
"""The name under which a checkpoint keeps moving averages, beside the optimiser's fields."""
_SCHEDULES = {"constant": optim.constant, "linear": optim.linear, "cosine": optim.cosine}


class Optimiser(Settings):
    """How weights move."""

    learning_rate: float = Field(default=3e-6, ge=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the rate falls over the stage: `linear` and `cosine` reach its end after the last update."""
    final_rate: float = Field(default=0.0, ge=0, le=1)
    """Where the rate ends, as a share of its peak: 0 in the reference systems, 0.1 in InstructGPT."""
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
        return self.learning_rate * optim.warmed_up(update, updates, self.warmup_steps, schedule, self.final_rate)


@dataclass(frozen=True)
class Job:
    """A batch, what is minimised on it, and how much of it a forward pass takes at most."""

    batch: Rows
    loss: LossFunction[Any]
    microbatch: Microbatch


class Average:
    """A moving average of parameters, kept beside them: a ← decay · a + (1 − decay) · p behind each step.

    It begins as the parameters are, so nothing has to be corrected for a start at zero. InstructGPT saves the average
    of its policy, with a decay of 0.992 (Ouyang et al. 2022, appendix C.4). Of sharded parameters each rank keeps its
    part.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.averages: dict[str, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """The average is what the parameters are now."""
        self.averages = {name: local(p).detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """One more step is behind us."""
        for name, parameter in self.parameters.items():
            self.averages[name].lerp_(local(parameter), 1 - self.decay)

    @contextmanager
    def worn(self) -> Generator[None]:
        """The parameters are their averages within, and themselves again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            mine = local(parameter).clone()
            local(parameter).copy_(self.averages[name])
            self.averages[name].copy_(mine)


class Stepper:
    """The trained parameters, by name, with their optimiser, and a moving average of some where one is kept."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        settings: Optimiser,
        world: World,
        tell: Callable[[str], None] = lambda text: None,
        average: Average | None = None,
    ) -> None:
        """`tell` hears when memory ran out and the batch was cut finer; `average` follows each step."""
        if not parameters:
            raise PalateError("nothing to train: no parameter of the trained roles takes a gradient.")
        self.names = list(parameters)
        self.parameters = [parameters[name] for name in self.names]
        self.settings = settings
        self.world = world
        self.tell = tell
        self.average = average
        self.adam = optim.Adam(
            self.parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            variant=settings.variant,
            weight_decay=settings.weight_decay,
            local=local,
        )
        self.most = Microbatch()
        """The micro-batch that memory was found to hold; no limit where it never ran out."""

    def step(
        self, batch: R, loss: LossFunction[R], microbatch: Microbatch, rate: float, beside: Sequence[Job] = ()
    ) -> dict[str, float]:
        """Move the weights once, by the gradient of `loss` over the whole of `batch`, and of what is learnt beside it.

        Every rank holds the whole batch and takes its share of it. Each term of a loss is a sum; it is divided
        here, once, by the count of its unit over the whole of its own batch. The gradient is therefore the same for
        any `microbatch` and any number of ranks. Returns the averaged metrics.

        Raises NotFinite, the weights as they were, when the loss or the gradient is nan or infinite. Where memory
        runs out the batch is cut finer and gone through again; the finer cut is kept.
        """
        means, terms = self._gradient([Job(batch, loss, microbatch), *beside])
        norm = self.world.norm(self.parameters)
        self._require_finite({**terms, "gradient norm": norm})
        self._clip(norm)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.forget()
        if self.average is not None:
            self.average.follow()
        return {**means, **terms, "grad_norm": norm, "lr": rate}

    def gradient(self, batch: R, loss: LossFunction[R], microbatch: Microbatch) -> dict[str, Tensor]:
        """The gradient that `step` would follow, whole, by parameter name; weights stay as they are."""
        self._gradient([Job(batch, loss, microbatch)])
        found = {
            name: whole(parameter.grad).clone()
            for name, parameter in zip(self.names, self.parameters, strict=True)
            if parameter.grad is not None
        }
        self.forget()
        return found

    def forget(self) -> None:
        """Drop the gradients."""
        self.adam.zero_grad(set_to_none=True)

    def _gradient(self, jobs: Sequence[Job]) -> tuple[dict[str, float], dict[str, float]]:
        """Gradients in place, summed over jobs and ranks; returns the averaged metrics and the terms of the losses."""
        held, tried = self.most, ""
        while True:
            self.forget()
            seen = _Averages()
            short = next((job for job in jobs if self.world.any(self._accumulate(job, seen))), None)
            if short is None:
                break
            tried = tried or short.microbatch.within(held).said()
            self.most = self._finer(short)
        if self.most != held:
            self.tell(
                f"memory ran out with a micro-batch of {tried}. From now on it has {self.most.said()}; the gradient is "
                f"the same. Set {self.most.settings()} to begin with that."
            )
        self.world.sum_gradients(self.parameters)
        return self.world.sum_means(seen.means), self.world.sum(seen.terms)

    def _parts(self, job: Job) -> list[Rows]:
        """A job's micro-batches, as far as memory is known to hold them."""
        return cut(neighbours(job.batch), job.microbatch.within(self.most), self.world)

    def _accumulate(self, job: Job, seen: _Averages) -> bool:
        """Forward and backward over this rank's parts; whether memory ran out on the way."""
        counts = job.batch.counts()
        try:
            for part, matters in self.world.deal(self._parts(job)):
                result = job.loss(part.trimmed())
                weighted = [t.total * (t.weight / max(counts[t.per], 1.0)) for t in result.terms.values()]
                (torch.stack(weighted).sum() * float(matters)).backward()
                seen.add(result, counts, matters)
        except (MemoryError, RuntimeError) as fault:
            if not self.world.can_retry or not _memory_ran_out(fault):
                raise
            return True
        return False

    def _finer(self, job: Job) -> Microbatch:
        """Half of the largest micro-batch of a job for which memory ran out, counted as its limit counts."""
        large = [part for part in self._parts(job) if part.size > 1]
        if not large:
            raise PalateError(
                "memory: one row with its gradient does not fit. Shorten rows, train adapters, set "
                "loading.checkpoint_activations, or take a smaller model."
            )
        if job.microbatch.tokens is not None:
            return Microbatch(self.most.rows, max(sum(lengths(part)) for part in large) // 2)
        return Microbatch(max(part.size for part in large) // 2, self.most.tokens)

    def _require_finite(self, found: Mapping[str, float]) -> None:
        broken = [name for name, value in found.items() if not math.isfinite(value)]
        if broken:
            self.forget()
            raise NotFinite(f"{', '.join(broken)}: not a finite number; no weight was moved.")

    def _clip(self, norm: float) -> None:
        limit = self.settings.max_grad_norm
        if limit is not None and norm > limit:
            for gradient in (local(p.grad) for p in self.parameters if p.grad is not None):
                gradient.mul_(limit / (norm + 1e-6))

    def state(self) -> dict[str, Tensor]:
        """The optimiser's tensors by parameter name, for a checkpoint; sharded ones come whole, so every rank asks."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for field, value in self.adam.state.get(parameter, {}).items():
                tensors[f"{field}/{name}"] = whole_like(parameter, torch.as_tensor(value))
        if self.average is not None:
            for name, mean in self.average.averages.items():
                tensors[f"{_AVERAGE}/{name}"] = whole_like(self.average.parameters[name], mean)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, parameter in zip(self.names, self.parameters, strict=True):
            mine: dict[str, Any] = {}
            for key, value in tensors.items():
                field, _, owner = key.partition("/")
                if owner == name and field != _AVERAGE:
                    here = local(parameter).device
                    mine[field] = value.clone() if value.dim() == 0 else part_like(parameter, value).to(here).clone()
            if mine:
                self.adam.state[parameter] = mine
        if self.average is not None:
            for name, mean in self.average.averages.items():
                mean.copy_(part_like(self.average.parameters[name], tensors[f"{_AVERAGE}/{name}"]))

    def averaged(self) -> AbstractContextManager[None]:
        """Where the parameters are their moving averages, if any are kept."""
        return nullcontext() if self.average is None else self.average.worn()


def _memory_ran_out(fault: BaseException) -> bool:
    """torch has a type for this on GPUs alone; its CPU allocator says so in words."""
    text = str(fault)
    return (
        isinstance(fault, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or "not enough memory" in text
    )


class _Averages:
    """Sums and counts of metrics over micro-batches, and the value of each term of the loss."""

    def __init__(self) -> None:
        self.means: dict[str, tuple[float, float]] = {}
        self.terms: dict[str, float] = {}

    def add(self, result: Loss, counts: Mapping[str, float], matters: bool = True) -> None:
        """Count one part; one gone through for nothing only leaves its names, as zeros."""
        for name, term in result.terms.items():
            value = float(term.total.detach()) / max(counts[term.per], 1.0) if matters else 0.0
            self.terms[name] = self.terms.get(name, 0.0) + value
        for name, mean in result.metrics.items():
            total, count = self.means.get(name, (0.0, 0.0))
            more = (float(mean.total.detach()), mean.count) if matters else (0.0, 0.0)
            self.means[name] = (total + more[0], count + more[1])


def evaluate(batches: Sequence[R], loss: LossFunction[R], world: World) -> dict[str, float]:
    """The loss terms and metrics of held-out batches, averaged over their units, without gradient."""
    totals: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for batch, matters in world.deal(batches):
            result, counts = loss(batch), batch.counts()
            found = {k: (float(t.total), counts[t.per]) for k, t in result.terms.items()}
            found |= {k: (float(m.total), m.count) for k, m in result.metrics.items()}
            for name, more in found.items():
                total, count = totals.get(name, (0.0, 0.0))
                totals[name] = (total + more[0], count + more[1]) if matters else (total, count)
    return world.sum_means(totals)


def minibatches(batch: R, parts: int, *counter: int | str) -> Iterator[R]:
    """`batch` in `parts` consecutive slices of a fresh permutation drawn for this counter (details 15 and 16).

    Always so many: sizes differ by 1 at most, and some are empty where there are fewer rows than parts.
    """
    order = torch.tensor(permutation(batch.size, *counter))
    for index in order.tensor_split(parts):
        yield batch.select(index)
