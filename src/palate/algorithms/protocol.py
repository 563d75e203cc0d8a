"""What the loop asks of an algorithm. A page that has these is an algorithm; the loop knows none by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from palate.batches import Learnt, Loss, Scored
from palate.cast import Cast


class Offline(Protocol):
    """Learns from data at rest."""

    kind: str
    trains: ClassVar[tuple[str, ...]]
    """Roles that receive gradient."""
    moves: ClassVar[tuple[str, ...]]
    """Roles whose weights `after` moves without gradient (target heads, a moving reference); checkpoints keep them."""
    reads: ClassVar[str]
    """The records it learns from: demonstrations, rankings, pairs, labels, returns or corrections."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Further roles that are played, without gradient: the reference, where there is one."""
        ...

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """The whole data set before training: refuse what cannot be learnt from, put rewards on one scale."""
        ...

    def prepare(self, cast: Cast, raw: Any) -> Any:
        """No gradient; sees the whole batch."""
        ...

    def loss(self, cast: Cast, batch: Any) -> Loss:
        """Gradient; sums over rows."""
        ...

    def after(self, cast: Cast, step: int) -> None:
        """Called behind optimiser step `step` (from 1): what moves without gradient moves here."""
        ...


class Online(Protocol):
    """Learns from what the policy just said."""

    kind: str
    trains: ClassVar[tuple[str, ...]]
    moves: ClassVar[tuple[str, ...]]
    learns: ClassVar[type[Learnt]]
    """What `prepare` returns."""
    group: int
    """Answers sampled per prompt."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Further roles that are played, without gradient: the reference, where there is one."""
        ...

    @property
    def passes(self) -> int:
        """Passes over one rollout."""
        ...

    @property
    def minibatches(self) -> int:
        """Optimiser steps in one pass."""
        ...

    def memory(self) -> dict[str, float]:
        """What is remembered between iterations, at the start."""
        ...

    def prepare(self, cast: Cast, scored: Scored) -> Learnt:
        """No gradient; sees the whole rollout."""
        ...

    def loss(self, cast: Cast, batch: Any) -> Loss:
        """Gradient; sums over rows."""
        ...

    def after(self, cast: Cast, step: int) -> None:
        """Called behind optimiser step `step` of the stage (from 1): what moves without gradient moves here."""
        ...


@runtime_checkable
class Resamples(Protocol):
    """An online algorithm that learns nothing from groups whose answers are all worth the same."""

    @property
    def dynamic_sampling(self) -> int:
        """Rounds of further prompts that may be drawn to replace such groups; 0 keeps them."""
        ...


@runtime_checkable
class ReadsGreedy(Protocol):
    """An online algorithm that may measure sampled answers against the likeliest one."""

    @property
    def greedy_baseline(self) -> bool:
        """Whether each prompt's likeliest answer is scored too, as `Scored.baseline_B`."""
        ...


@runtime_checkable
class Sifts(Protocol):
    """An online algorithm that learns from fewer rows in later passes."""

    def of_pass(self, batch: Any, number: int) -> Learnt:
        """The rows that pass `number` over a rollout (from 0) learns from."""
        ...


@runtime_checkable
class Rests(Protocol):
    """An online algorithm whose policy does not learn from every rollout."""

    def rests(self, batch: Any) -> bool:
        """Whether the policy stays as it is on this batch, so that nothing else may move it either."""
        ...


@runtime_checkable
class Rereads(Protocol):
    """An offline algorithm that may read to the reference what no row holds, so that the role has to be played."""

    @property
    def rereads(self) -> str:
        """Why it cannot do with the reference's log-probabilities of the rows alone; empty where it can."""
        ...


@runtime_checkable
class Warns(Protocol):
    """An algorithm some of whose settings are allowed and yet rarely what one wants."""

    def warnings(self) -> Sequence[str]:
        """What the user should know before the stage begins, a sentence each that names the setting."""
        ...
