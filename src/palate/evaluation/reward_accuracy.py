"""How good is a reward model: agreement with held comparisons, calibration, and its taste for length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from palate.evaluation.statistics import (
    Calibration,
    Interval,
    bootstrap_ratio,
    correlation,
    preference_calibration,
    wilson,
)
from palate.records import Ranking


@dataclass(frozen=True)
class Pairs:
    """Every comparable pair of some rankings; entry i speaks of pair i, better minus worse by the label.

    `gold` is the difference of the true utilities where a world knows them, else empty.
    """

    score: NDArray[np.float64]
    length: NDArray[np.float64]
    prompt: NDArray[np.int64]
    gold: NDArray[np.float64]


@dataclass(frozen=True)
class LengthBin:
    """Pairs whose answers differ in length by about as much, and how often each side takes the longer one."""

    low: float
    high: float
    count: int
    model: float
    label: float


@dataclass(frozen=True)
class RewardAccuracy:
    """A reward model on held comparisons. Accuracies are shares of pairs; chance is ½.

    `accuracy` counts an equal score as half right, `strict` as wrong. `interval` is Wilson's and treats
    pairs as independent; `by_prompt` draws whole prompts and is the one to trust for K-way rankings.
    `longer_wins` is what preferring the longer answer would score; `length_correlation` is that of score
    and length differences.
    """

    pairs: int
    prompts: int
    accuracy: float
    strict: float
    interval: Interval
    by_prompt: Interval
    calibration: Calibration
    longer_wins: float
    length_correlation: float
    length_bins: tuple[LengthBin, ...]
    truth: TruthAccuracy | None


@dataclass(frozen=True)
class TruthAccuracy:
    """Beside the truth of a world: `ceiling` is the accuracy of an oracle on the raters' noisy labels.

    `share` is how far the model got from chance to that ceiling; `gold_accuracy` is the model's agreement
    with the true order on the `gold_pairs` pairs whose utilities differ.
    """

    ceiling: float
    share: float
    gold_accuracy: float
    gold_pairs: int


def pairs_of(
    rankings: Sequence[Ranking],
    scores: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[float]],
    gold: Sequence[Sequence[float]] | None = None,
) -> Pairs:
    """Expand rankings to pairs; `scores[i][k]`, `lengths[i][k]` and `gold[i][k]` speak of answer k of
    ranking i.

    Pairs for which the model abstained (NaN) are left out.
    """
    rows = [
        (
            n,
            scores[n][i] - scores[n][j],
            lengths[n][i] - lengths[n][j],
            gold[n][i] - gold[n][j] if gold else 0.0,
        )
        for n, ranking in enumerate(rankings)
        for i, j in ranking.pairs
    ]
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 4)
    table = table[~np.isnan(table[:, 1])]
    return Pairs(table[:, 1], table[:, 2], table[:, 0].astype(np.int64), table[:, 3] if gold else np.empty(0))


def agreement(difference_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where the difference is positive, ½ where it is 0, 0 where negative."""
    return (np.sign(difference_N) + 1) / 2


def reward_accuracy(
    pairs: Pairs,
    ceiling: float | None = None,
    key: Sequence[int | str] = ("reward accuracy",),
    bins: int = 10,
) -> RewardAccuracy:
    """Everything the reward-model page shows. `ceiling` is the Bayes accuracy where the truth is known.

    ValueError when there is no comparable pair.
    """
    if not pairs.score.size:
        raise ValueError("there is no comparable pair to judge a reward model by")
    right = agreement(pairs.score)
    prompts, place = np.unique(pairs.prompt, return_inverse=True)
    cluster = bootstrap_ratio(np.bincount(place, weights=right), np.bincount(place), key, null=0.5)
    return RewardAccuracy(
        pairs=right.size,
        prompts=prompts.size,
        accuracy=float(right.mean()),
        strict=float((right == 1).mean()),
        interval=wilson(float(right.sum()), right.size),
        by_prompt=Interval(cluster.estimate, cluster.low, cluster.high),
        calibration=preference_calibration(pairs.score, bins),
        longer_wins=float(agreement(pairs.length).mean()),
        length_correlation=correlation(pairs.score, pairs.length),
        length_bins=_length_bins(pairs),
        truth=_truth(pairs, float(right.mean()), ceiling),
    )


def _truth(pairs: Pairs, accuracy: float, ceiling: float | None) -> TruthAccuracy | None:
    if ceiling is None or not pairs.gold.size:
        return None
    known = pairs.gold != 0
    # Better by the label may be worse in truth: compare the signs of the two differences.
    agrees = agreement(pairs.score[known] * np.sign(pairs.gold[known]))
    return TruthAccuracy(
        ceiling=ceiling,
        share=(accuracy - 0.5) / (ceiling - 0.5) if ceiling > 0.5 else float("nan"),
        gold_accuracy=float(agrees.mean()) if agrees.size else float("nan"),
        gold_pairs=int(known.sum()),
    )


def _length_bins(pairs: Pairs, wanted: int = 5) -> tuple[LengthBin, ...]:
    """About equally filled bins of |length difference|; pairs of one length say nothing and are left out."""
    unequal = pairs.length != 0
    size = np.abs(pairs.length[unequal])
    if not size.size:
        return ()
    model = agreement(pairs.score[unequal] * np.sign(pairs.length[unequal]))
    label = (pairs.length[unequal] > 0).astype(np.float64)
    edges = np.unique(np.quantile(size, np.linspace(0, 1, wanted + 1)))
    place = np.clip(np.searchsorted(edges, size, side="right") - 1, 0, max(0, edges.size - 2))
    return tuple(
        LengthBin(
            float(size[place == b].min()),
            float(size[place == b].max()),
            int((place == b).sum()),
            float(model[place == b].mean()),
            float(label[place == b].mean()),
        )
        for b in np.unique(place)
    )
