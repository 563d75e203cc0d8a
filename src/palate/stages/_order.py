"""In which order rows are drawn: a pure function of the run's seed, so the data cursor is just the step number."""

from __future__ import annotations

from collections.abc import Sequence

from palate.randomness import permutation

_WINDOW = 32
"""Batches whose rows are sorted by length together when batches are grouped by length."""


class Order:
    """Batches of row indices; each epoch is a fresh permutation and leaves out the rows that fill no batch."""

    def __init__(
        self, lengths: Sequence[int], batch_size: int, by_length: bool, counter: tuple[int | str, ...]
    ) -> None:
        self.lengths, self.batch_size, self.by_length, self.counter = lengths, batch_size, by_length, counter
        self.per_epoch = len(lengths) // batch_size
        self._epoch, self._batches = -1, [[0]]

    def batch(self, number: int) -> list[int]:
        """The rows of optimiser step `number` (from 0)."""
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[place]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        order = permutation(len(self.lengths), *self.counter, "order", epoch)[: self.per_epoch * self.batch_size]
        if self.by_length:
            span = self.batch_size * _WINDOW
            windows = [order[i : i + span] for i in range(0, len(order), span)]
            order = [row for window in windows for row in sorted(window, key=self.lengths.__getitem__)]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.by_length:
            batches = [batches[i] for i in permutation(len(batches), *self.counter, "batches", epoch)]
        return batches
