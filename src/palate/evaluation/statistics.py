"""How sure are we: intervals, tests and calibration, in NumPy and with counter-based randomness.

Everything here is a pure function of its arguments: the same numbers and the same key give the same
interval on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from palate import randomness

_DRAWS_AT_ONCE = 1 << 20
"""Resampled indices held in memory at a time; bounds a bootstrap at about 16 MB whatever its size."""


@dataclass(frozen=True)
class Interval:
    """An estimate between its confidence limits."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap(Interval):
    """A bootstrapped estimate. `p_value` is two-sided, against the null value the caller named."""

    p_value: float


def wilson(successes: float, trials: int, level: float = 0.95) -> Interval:
    """The score interval of a proportion. Wilson 1927.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n). Unlike p ± z·s it never leaves [0, 1] and stays
    honest near 0 and 1. `successes` may be fractional (a tie counts half). ValueError without a trial.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"a proportion needs 0 ≤ successes ≤ trials and at least one trial, not {successes}/{trials}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    reach = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / shrink
    return Interval(share, max(0.0, centre - reach), min(1.0, centre + reach))


def bootstrap_ratio(
    numerator_N: ArrayLike,
    denominator_N: ArrayLike,
    key: Sequence[int | str] = ("bootstrap",),
    null: float = 0.0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Bootstrap:
    """Σ numerator / Σ denominator over N independent units, with its percentile interval. Efron and
    Tibshirani 1993.

    A unit is whatever was drawn independently: mostly a prompt, whose several answers or pairs are then kept
    together, so that they are not counted as more evidence than they are. The p-value re-centres the
    resampled ratios on `null` (their chapter 16) and counts the observation itself, so it is never 0: the
    least is 1 / (resamples + 1). ValueError on no units or on a denominator that sums to 0.
    """
    above = np.asarray(numerator_N, dtype=np.float64)
    below = np.asarray(denominator_N, dtype=np.float64)
    if above.ndim != 1 or above.shape != below.shape or not above.size:
        raise ValueError(f"a bootstrap needs two lists of one length, at least 1, not {above.shape} and {below.shape}")
    if not below.sum() > 0:
        raise ValueError("a bootstrap needs a denominator above 0")
    observed = float(above.sum() / below.sum())
    resampled = _resample(above, below, randomness.generator(*key), resamples)
    low, high = np.quantile(resampled, [0.5 - level / 2, 0.5 + level / 2])
    extreme = int(np.count_nonzero(np.abs(resampled - observed) >= abs(observed - null)))
    return Bootstrap(observed, float(low), float(high), (1 + extreme) / (1 + resamples))


def _resample(
    above: NDArray[np.float64], below: NDArray[np.float64], draw: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    parts: list[NDArray[np.float64]] = []
    at_once = max(1, _DRAWS_AT_ONCE // above.size)
    for start in range(0, resamples, at_once):
        picked = draw.integers(above.size, size=(min(at_once, resamples - start), above.size))
        totals = below[picked].sum(axis=1)
        # A draw made of empty units only says nothing; it falls back on the whole sample.
        parts.append(
            np.where(totals > 0, above[picked].sum(axis=1), above.sum()) / np.where(totals > 0, totals, below.sum())
        )
    return np.concatenate(parts)


def bootstrap_mean(
    value_N: ArrayLike,
    key: Sequence[int | str] = ("bootstrap",),
    null: float = 0.0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Bootstrap:
    """The mean of N independent values with its percentile interval and p-value against `null`."""
    value = np.asarray(value_N, dtype=np.float64)
    return bootstrap_ratio(value, np.ones_like(value), key, null, resamples, level)


def paired_bootstrap(
    ours_N: ArrayLike,
    theirs_N: ArrayLike,
    key: Sequence[int | str] = ("bootstrap",),
    resamples: int = 10_000,
    level: float = 0.95,
) -> Bootstrap:
    """The mean of ours − theirs on the same N prompts, with interval and p-value of "no difference". Koehn
    2004.
    """
    ours, theirs = np.asarray(ours_N, dtype=np.float64), np.asarray(theirs_N, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"paired values need one length, not {ours.shape} and {theirs.shape}")
    return bootstrap_mean(ours - theirs, key, 0.0, resamples, level)


@dataclass(frozen=True)
class CalibrationBin:
    """Predictions of about the same confidence: what they said on average and how often they were right."""

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """`error` is the expected calibration error: |observed − predicted|, averaged by the bins' counts."""

    error: float
    bins: tuple[CalibrationBin, ...]


def calibration(probability_N: ArrayLike, outcome_N: ArrayLike, bins: int = 10, low: float = 0.0) -> Calibration:
    """Expected calibration error over equal-width bins of [low, 1]. Guo et al. 2017, eq. 3.

    `probability_N` is what was predicted for an event, `outcome_N` whether it happened (0, 1, or ½ for a
    tie). Empty bins are left out. ValueError on unequal or empty lists.
    """
    probability = np.asarray(probability_N, dtype=np.float64)
    outcome = np.asarray(outcome_N, dtype=np.float64)
    if probability.shape != outcome.shape or not probability.size:
        raise ValueError("calibration needs as many outcomes as probabilities, at least one")
    place = np.clip(((probability - low) / (1 - low) * bins).astype(np.int64), 0, bins - 1)
    found = [
        CalibrationBin(
            float(probability[place == b].mean()), float(outcome[place == b].mean()), int((place == b).sum())
        )
        for b in range(bins)
        if (place == b).any()
    ]
    error = sum(b.count * abs(b.observed - b.predicted) for b in found) / probability.size
    return Calibration(error, tuple(found))


def preference_calibration(difference_N: ArrayLike, bins: int = 10) -> Calibration:
    """Calibration of the Bradley–Terry probabilities behind score differences (better − worse by the label).

    A pair has no first and second, so the confidence is that of whichever answer the model prefers, σ(|d|) in
    [½, 1], and the outcome is whether the label agrees (½ where d is 0).
    """
    difference = np.asarray(difference_N, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    return calibration(confidence, np.where(difference == 0, 0.5, difference > 0), bins, low=0.5)


def explained_variance(prediction_N: ArrayLike, target_N: ArrayLike) -> float:
    """1 − mean((prediction − target)²) / Var(target): 1 is perfect, 0 as good as the mean, below 0 worse
    than it.

    Population variance, as in the 2019 work's `var_explained`. A bias of the prediction counts against it.
    NaN where the target is constant, for then there is nothing to explain.
    """
    prediction = np.asarray(prediction_N, dtype=np.float64).ravel()
    target = np.asarray(target_N, dtype=np.float64).ravel()
    if prediction.shape != target.shape or not target.size:
        raise ValueError("explained variance needs as many predictions as targets, at least one")
    spread = float(target.var())
    return 1 - float(((prediction - target) ** 2).mean()) / spread if spread > 0 else float("nan")


def standard_error(value_N: ArrayLike) -> float:
    """s / √N of the mean, with the N − 1 variance; NaN below two values."""
    value = np.asarray(value_N, dtype=np.float64)
    return float(value.std(ddof=1) / sqrt(value.size)) if value.size > 1 else float("nan")


def correlation(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Pearson's correlation; NaN where either list is constant."""
    x, y = np.asarray(x_N, dtype=np.float64), np.asarray(y_N, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError("a correlation needs two lists of one length")
    if x.size < 2 or not x.std() or not y.std():
        return float("nan")
    return float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))
