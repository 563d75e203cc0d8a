"""Win rate: two sets of answers to the same prompts under any judge that gives scores."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import isnan

from palate.evaluation.statistics import Bootstrap, bootstrap_ratio, paired_bootstrap


@dataclass(frozen=True)
class WinRate:
    """How often ours beats theirs. `rate` counts a tie as half a win; its p-value is against ½.

    `abstained` answers pairs were left out because the judge had no score for one side.
    """

    wins: int
    ties: int
    losses: int
    abstained: int
    rate: Bootstrap


@dataclass(frozen=True)
class Gain:
    """The mean score of ours minus theirs on the same prompts; the p-value is against no difference."""

    mean: Bootstrap
    prompts: int


def win_rate(
    ours: Sequence[float],
    theirs: Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    key: Sequence[int | str] = ("win rate",),
    resamples: int = 10_000,
) -> WinRate | None:
    """Row i of both lists scores an answer to prompt i; a higher score wins, equal scores tie, NaN abstains.

    `prompts` names each row's prompt when a prompt has several answers: the bootstrap then draws whole
    prompts. None when the judge abstained throughout. ValueError on unequal lengths.
    """
    kept = _both_scored(ours, theirs)
    if not kept:
        return None
    outcomes = [1.0 if ours[i] > theirs[i] else 0.5 if ours[i] == theirs[i] else 0.0 for i in kept]
    totals, counts = _by_prompt(outcomes, [prompts[i] if prompts else i for i in kept])
    return WinRate(
        wins=outcomes.count(1.0),
        ties=outcomes.count(0.5),
        losses=outcomes.count(0.0),
        abstained=len(ours) - len(kept),
        rate=bootstrap_ratio(totals, counts, key, 0.5, resamples),
    )


def gain(
    ours: Sequence[float],
    theirs: Sequence[float],
    prompts: Sequence[Hashable] | None = None,
    key: Sequence[int | str] = ("gain",),
    resamples: int = 10_000,
) -> Gain | None:
    """Mean score difference by prompt, paired; None when the judge abstained throughout."""
    kept = _both_scored(ours, theirs)
    if not kept:
        return None
    names = [prompts[i] if prompts else i for i in kept]
    ours_total, counts = _by_prompt([ours[i] for i in kept], names)
    theirs_total, _ = _by_prompt([theirs[i] for i in kept], names)
    ours_mean = [total / count for total, count in zip(ours_total, counts, strict=True)]
    theirs_mean = [total / count for total, count in zip(theirs_total, counts, strict=True)]
    return Gain(paired_bootstrap(ours_mean, theirs_mean, key, resamples), len(counts))


def preferred(shuffled_index: int, reply: str) -> bool:
    """Whether a pairwise judge chose ours, from its one-letter reply.

    The judge saw A = answers[shuffled_index] and B = answers[1 − shuffled_index], ours being answers[0].
    Anything but the exact letter of ours counts for the other side, so a judge that rambles cannot help us.
    """
    if shuffled_index not in (0, 1):
        raise ValueError(f"shuffled_index is 0 or 1, not {shuffled_index!r}")
    return reply == "AB"[shuffled_index]


def _both_scored(ours: Sequence[float], theirs: Sequence[float]) -> list[int]:
    if len(ours) != len(theirs):
        raise ValueError(f"a duel needs as many answers on both sides, not {len(ours)} and {len(theirs)}")
    return [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not isnan(a) and not isnan(b)]


def _by_prompt(values: Sequence[float], names: Sequence[Hashable]) -> tuple[list[float], list[float]]:
    totals: dict[Hashable, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        totals.setdefault(name, []).append(value)
    return [sum(v) for v in totals.values()], [float(len(v)) for v in totals.values()]
