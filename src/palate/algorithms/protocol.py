"""What the loop asks of an algorithm. A page that has these is an algorithm; the loop knows none by name."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from palate.batches import Experience, Loss, Scored
from palate.cast import Cast


class Offline(Protocol):
    """Learns from data at rest."""

    kind: str
    trains: ClassVar[tuple[str, ...]]
    """Roles that receive gradient."""
    reads: ClassVar[str]
    """The records it learns from: `demonstrations` or `rankings`."""

    def prepare(self, cast: Cast, raw: Any) -> Any:
        """No gradient; sees the whole batch."""
        ...

    def loss(self, cast: Cast, batch: Any) -> Loss:
        """Gradient; sums over rows."""
        ...


class Online(Protocol):
    """Learns from what the policy just said."""

    kind: str
    trains: ClassVar[tuple[str, ...]]
    group: int
    """Answers sampled per prompt."""

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

    def prepare(self, cast: Cast, scored: Scored) -> Experience:
        """No gradient; sees the whole rollout."""
        ...

    def loss(self, cast: Cast, batch: Experience) -> Loss:
        """Gradient; sums over rows."""
        ...
