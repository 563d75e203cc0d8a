"""Which settings are tried: every combination, or so many drawn ones; the same sweep always tries the same.

Lists are crossed. A grid tries every combination in order. A random search walks through the combinations in a
shuffled order, round and round, and draws every distribution anew for each trial. Draws come from counters named by
key and trial, so trial 5 is the same whether 6 or 60 trials are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from palate import randomness
from palate.settings import PalateError
from palate.sweep.space import Axis, Drawn, Values

Search = Literal["grid", "random"]
DRAWN_TRIALS = 8
"""Trials of a random search that does not say how many."""
_MOST = 10_000
_TRIES = 200


@dataclass(frozen=True)
class Trial:
    """One combination of values: a text per swept key, in the order of the keys."""

    number: int
    texts: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """`trial-003`."""
        return f"trial-{self.number:03d}"

    @property
    def assignments(self) -> list[str]:
        """The values as `key=value`."""
        return [f"{key}={text}" for key, text in self.texts]


def search_of(axes: Sequence[Axis], asked: Search | None, count: int | None) -> Search:
    """The search to make: as asked; else a grid when every key has a list and no number of trials was given."""
    drawn = [axis.key for axis in axes if isinstance(axis, Drawn)]
    if asked == "grid" and drawn:
        raise PalateError(
            f"{drawn[0]}: a grid needs a list of values, and this is a distribution. "
            "Use --search random, or list values."
        )
    combined = _combinations(axes)
    if asked == "grid" and count not in (None, combined):
        raise PalateError(
            f"--trials {count}: the grid has {combined} trials. Leave --trials out, or use --search random."
        )
    if asked is None:
        return "random" if drawn or count not in (None, combined) else "grid"
    return asked


def trials_of(axes: Sequence[Axis], search: Search, count: int | None, dice: int) -> list[Trial]:
    """The trials of a sweep, in order. `dice` is what the draws depend on beside key and number.

    Raises PalateError when fewer different trials exist than are asked for.
    """
    lists = [axis for axis in axes if isinstance(axis, Values)]
    combined = _combinations(axes)
    if search == "grid":
        if combined > _MOST:
            raise PalateError(f"the grid has {combined:,} trials. Use --search random --trials N to try some of them.")
        return [Trial(i, _in_order(axes, _combination(lists, i))) for i in range(combined)]
    wanted = DRAWN_TRIALS if count is None else count
    only_lists = len(lists) == len(axes)
    if only_lists:
        wanted = min(wanted, combined) if count is None else wanted
        if wanted > combined:
            raise PalateError(f"--trials {wanted}: there are only {combined} combinations. Ask for at most so many.")
    return _drawn(axes, lists, wanted, dice)


def _drawn(axes: Sequence[Axis], lists: Sequence[Values], wanted: int, dice: int) -> list[Trial]:
    """Trial after trial; one that was there before is drawn again."""
    found: list[Trial] = []
    seen: set[tuple[tuple[str, str], ...]] = set()
    names = "\x1f".join(axis.key for axis in lists)
    for number in range(wanted):
        for again in range(_TRIES):
            listed = _combination(lists, _walk(lists, number + again, dice, names))
            drawn = {a.key: a.text(_uniform(dice, a.key, number, again)) for a in axes if isinstance(a, Drawn)}
            texts = _in_order(axes, {**listed, **drawn})
            if texts not in seen:
                break
        else:
            raise PalateError(f"--trials {wanted}: only {number} different trials were found. Ask for at most so many.")
        seen.add(texts)
        found.append(Trial(number, texts))
    return found


def _uniform(dice: int, key: str, number: int, again: int) -> float:
    keys = np.array([randomness.key("sweep", dice, key, again)], dtype=np.uint64)
    return float(randomness.uniforms(keys, number)[0])


def _walk(lists: Sequence[Values], step: int, dice: int, names: str) -> int:
    """The combination at one step of the shuffled walk; a space too large to shuffle is drawn from instead."""
    combined = _combinations(lists)
    if combined > _MOST:
        return min(combined - 1, int(_uniform(dice, names, step, 0) * combined))
    return randomness.permutation(combined, "sweep", dice, names)[step % combined]


def _combinations(axes: Sequence[Axis]) -> int:
    return math.prod(len(axis.texts) for axis in axes if isinstance(axis, Values))


def _combination(lists: Sequence[Values], index: int) -> dict[str, str]:
    """Combination number `index`; the last key changes fastest."""
    found: dict[str, str] = {}
    for axis in reversed(lists):
        index, place = divmod(index, len(axis.texts))
        found[axis.key] = axis.texts[place]
    return found


def _in_order(axes: Sequence[Axis], texts: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((axis.key, texts[axis.key]) for axis in axes)
