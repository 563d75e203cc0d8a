"""Mixing and splitting: one list of records out of several parts, and its two sides by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from palate.randomness import key, permutation, uniforms
from palate.records import Record
from palate.settings import PalateError


def mix(
    pools: Sequence[list[Record]], weights: Sequence[float], rows: int | None, shuffle: bool, seed: int
) -> list[Record]:
    """One list out of the parts' records.

    Place i of a mixture takes its part by the i-th number of a counter, in proportion to the weights, and the next
    record of that part. With `rows` a part that runs dry starts over in a new order; without, the mixture ends there.
    """
    shares = np.array(weights)
    edges = np.cumsum(shares / shares.sum())
    orders = [_Walk(pool, shuffle, seed, number) for number, pool in enumerate(pools)]
    if len(pools) == 1:
        return orders[0].once(rows)
    counter = np.array([key(seed, "mixture")], dtype=np.uint64)
    mixed: list[Record] = []
    while rows is None or len(mixed) < rows:
        place = uniforms(counter, len(mixed))[0]
        order = orders[min(int(np.searchsorted(edges, place, side="right")), len(orders) - 1)]
        if rows is None and order.dry:
            break
        mixed.append(order.next())
    return mixed


@dataclass
class _Walk:
    """A part's records in order, and again in another order after the last one."""

    pool: list[Record]
    shuffled: bool
    seed: int
    number: int
    taken: int = 0
    order: list[int] = field(default_factory=lambda: list[int]())

    @property
    def dry(self) -> bool:
        return self.taken >= len(self.pool)

    def next(self) -> Record:
        turn, place = divmod(self.taken, len(self.pool))
        if place == 0:
            count = len(self.pool)
            fresh = permutation(count, self.seed, "order", self.number, turn)
            self.order = fresh if self.shuffled else list(range(count))
        self.taken += 1
        return self.pool[self.order[place]]

    def once(self, rows: int | None) -> list[Record]:
        return [self.next() for _ in range(min(len(self.pool), rows or len(self.pool)))]


def split_by_prompt(records: list[Record], share: float) -> tuple[list[Record], list[Record]]:
    """(train, held out): all records of one prompt or group land on one side.

    A side is a pure function of the prompt's key, so every stage of every run holds out the same prompts. When chance
    leaves a side empty, the prompt nearest to the border crosses it; a single prompt cannot be split.
    """
    names = list({record.key for record in records})
    places = uniforms(np.array([key("held out", name) for name in names], dtype=np.uint64), 0)
    if len(names) < 2:
        raise PalateError("held_out: all records belong to one prompt, which cannot be split. Set held_out: 0.")
    border = min(max(share, np.nextafter(places.min(), 1)), places.max())
    held = {name for name, place in zip(names, places, strict=True) if place < border}
    return [r for r in records if r.key not in held], [r for r in records if r.key in held]
