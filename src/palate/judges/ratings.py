"""Ratings: from games between players to one number each, by Elo and by Bradley-Terry. Pure, NumPy, float64.

A player is whatever was compared: a model, a prompt template, an annotator's favourite. A game is `(a, b, score)`: two
indices and the score of `a`, 1 for a win, ½ for a tie, 0 for a loss, or anything between. P players, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from palate import randomness

Floats = NDArray[np.float64]
Game = tuple[int, int, float]

ELO_K = 32.0
"""The most points one game can move; a win between equals moves half. Chatbot Arena used 4."""
ELO_START = 1000.0
"""Rating of a player without games, and the middle of the Elo scale."""
PSEUDO_WINS = 0.5
"""Wins lent to each side of every pair that met, where the maximum of the likelihood lies at infinity."""

_SLOPE = 400 / log(10)
_NEWTON_STEPS = 100
_CELLS_AT_ONCE = 1 << 21
"""Numbers of a bootstrap held in one array; bounds it at about 100 MB whatever its size."""


def expected_score(rating_a: float, rating_b: float) -> float:
    """What `a` scores against `b` on the Elo scale: 1 / (1 + 10^((R_b − R_a)/400)). Elo 1978, section 8.4."""
    return 1 / (1 + 10 ** min((rating_b - rating_a) / 400, 300))  # beyond 300 it is 0, and would overflow


def elo_path(games: Iterable[Game], players: int, k: float = ELO_K, start: float = ELO_START) -> Iterator[list[float]]:
    """The P ratings after each game: R_a += K (S − E), and `b` loses what `a` gains, so their sum never changes.

    **The order of the games matters**: the last ones weigh most, and the same games in another order end elsewhere.
    That suits players who change, and not models that do not; see `bradley_terry`.
    """
    ratings = [float(start)] * players
    for a, b, score in games:
        gain = k * (score - expected_score(ratings[a], ratings[b]))
        ratings[a] += gain
        ratings[b] -= gain
        yield ratings.copy()


def elo(games: Iterable[Game], players: int, k: float = ELO_K, start: float = ELO_START) -> Floats:
    """The P ratings after the last game of `elo_path`."""
    ratings = [float(start)] * players
    for after in elo_path(games, players, k, start):
        ratings = after
    return np.array(ratings)


def win_matrix(games: Iterable[Game], players: int) -> Floats:
    """W_ij, the points that i took from j: a tie is half a win for both. P by P."""
    wins_PP = np.zeros((players, players))
    for a, b, score in games:
        wins_PP[a, b] += score
        wins_PP[b, a] += 1 - score
    return wins_PP


def with_pseudo_wins(wins_PP: ArrayLike, amount: float = PSEUDO_WINS) -> Floats:
    """W with `amount` more wins on both sides of every pair that met: a game or so that nobody played.

    Pairs that never met get none: in a large league they would outweigh what was played.
    """
    wins_PP = np.asarray(wins_PP, np.float64)
    return wins_PP + amount * (wins_PP + wins_PP.T > 0)


def bradley_terry_nll(scores_P: ArrayLike, wins_PP: ArrayLike) -> float:
    """−Σ_ij W_ij log σ(s_i − s_j), in nats. Bradley and Terry 1952, with a tie as half a win each way."""
    scores_P, wins_PP = np.asarray(scores_P, np.float64), np.asarray(wins_PP, np.float64)
    return float((wins_PP * np.logaddexp(0, scores_P[None, :] - scores_P[:, None])).sum())


def bradley_terry(wins_PP: ArrayLike, l2: float = 0.0) -> Floats:
    """The scores s, of mean 0, that minimise `bradley_terry_nll` + l2/2 · Σ s². They do not depend on any order.

    Without `l2` the maximum of the likelihood is finite exactly where each player beat each other one through some
    chain of wins (Ford 1957): ValueError where not, as for a player who never lost. ValueError too where W falls
    apart into groups that never met.
    """
    wins_PP = np.asarray(wins_PP, np.float64)
    if len(groups(wins_PP)) > 1:
        raise ValueError(f"{len(groups(wins_PP))} groups of players never met, so nothing compares them")
    if l2 == 0 and not has_maximum(wins_PP[None])[0]:
        raise ValueError("the likelihood has no finite maximum: some players never lost to, or never beat, the others")
    return _newton(wins_PP[None], l2)[0]


def _newton(wins_RPP: Floats, l2: float) -> Floats:
    """R fits at once. Newton's step d is shortened to ln(1 + r)/r of itself, r its range: the likelihood is
    self-concordant of order 2, so each such step improves it (Sun and Tran-Dinh 2019), and the last ones are whole.
    """
    games_RPP = wins_RPP + wins_RPP.swapaxes(1, 2)
    players = wins_RPP.shape[-1]
    scores_RP = np.zeros(wins_RPP.shape[:2])
    diagonal = np.arange(players)
    for _ in range(_NEWTON_STEPS):
        beats_RPP = np.exp(-np.logaddexp(0, scores_RP[:, None, :] - scores_RP[:, :, None]))
        loses_RPP = beats_RPP.swapaxes(1, 2)  # not 1 - beats, which has no digits left far out
        slope_RP = (wins_RPP * loses_RPP - wins_RPP.swapaxes(1, 2) * beats_RPP).sum(2) - l2 * scores_RP
        weight_RPP = games_RPP * beats_RPP * loses_RPP
        curve_RPP = 1 / players - weight_RPP  # 1/P fixes the mean, which the likelihood does not see
        curve_RPP[:, diagonal, diagonal] += weight_RPP.sum(2) + l2
        step_RP = np.linalg.solve(curve_RPP, slope_RP[:, :, None])[:, :, 0]
        reach_R = np.ptp(step_RP, axis=1)
        scores_RP += step_RP * np.where(reach_R > 0, np.log1p(reach_R) / np.maximum(reach_R, 1e-300), 1.0)[:, None]
        scores_RP -= scores_RP.mean(1, keepdims=True)
        if reach_R.max() < 1e-9:  # the next error is of the order of its square
            return scores_RP
    raise ValueError(f"Bradley-Terry did not settle in {_NEWTON_STEPS} Newton steps; a larger l2 helps")


def elo_scale(scores_P: ArrayLike) -> Floats:
    """Bradley-Terry scores in Elo's unit: s · 400/ln 10 + 1000; 400 points are odds of ten to one."""
    return np.asarray(scores_P, np.float64) * _SLOPE + ELO_START


def z_scores(ratings_P: ArrayLike) -> Floats:
    """Ratings with mean 0 and population variance 1, as targets for a reward model; all 0 where they are all equal."""
    ratings_P = np.asarray(ratings_P, np.float64)
    away_P = ratings_P - ratings_P.mean()
    spread = float(away_P.std())
    return away_P / spread if spread > 1e-12 * float(np.abs(ratings_P).max()) else np.zeros_like(away_P)


def _reach(beats_RPP: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a chain of edges leads from i to j; everyone reaches himself."""
    players = beats_RPP.shape[-1]
    reach_RPP = beats_RPP | np.eye(players, dtype=bool)
    for _ in range(max(1, players - 1).bit_length()):
        reach_RPP = np.matmul(reach_RPP.astype(np.float32), reach_RPP.astype(np.float32)) > 0
    return reach_RPP


def has_maximum(wins_RPP: Floats) -> NDArray[np.bool_]:
    """For each of R matrices, whether the likelihood has a finite maximum: everyone beat everyone by some chain."""
    return np.asarray(_reach(wins_RPP > 0).all((1, 2)), np.bool_)


def groups(wins_PP: ArrayLike) -> list[list[int]]:
    """The players split into groups that never met each other, the largest first; one group where all is connected."""
    wins_PP = np.asarray(wins_PP, np.float64)
    return _classes(_reach((wins_PP + wins_PP.T > 0)[None])[0])


def divided(wins_PP: ArrayLike) -> tuple[list[list[int]], list[list[int]]]:
    """(groups that never lost a point to anybody outside, groups that never took one): why no maximum is finite.

    Both empty where it is. A group is mostly a single player, undefeated or without a win.
    """
    reach_PP = _reach((np.asarray(wins_PP, np.float64) > 0)[None])[0]
    classes = _classes(reach_PP & reach_PP.T)
    if len(classes) == 1:
        return [], []
    unbeaten = [c for c in classes if reach_PP[:, c[0]].sum() == len(c)]
    winless = [c for c in classes if reach_PP[c[0]].sum() == len(c)]
    return unbeaten, winless


def _classes(same_PP: NDArray[np.bool_]) -> list[list[int]]:
    found = {tuple(int(j) for j in np.flatnonzero(row)) for row in same_PP}
    return [list(c) for c in sorted(found, key=lambda c: (-len(c), c))]


@dataclass(frozen=True)
class Intervals:
    """Percentile limits of each player's Bradley-Terry score. `refitted` resamples had no finite maximum."""

    low_P: Floats
    high_P: Floats
    resamples: int
    refitted: int


def bootstrap(
    units: Sequence[Sequence[Game]],
    players: int,
    *,
    l2: float = 0.0,
    pseudo_wins: float = 0.0,
    resamples: int = 1000,
    level: float = 0.95,
    key: Sequence[int | str] = ("ratings",),
) -> Intervals:
    """Intervals of `bradley_terry` from fits to resampled units. Efron and Tibshirani 1993, chapter 13.

    A unit is what was judged independently: one game, or all games of one ranking. A resample without a finite maximum
    is fitted with `PSEUDO_WINS` (and counted), lest the intervals tell only of the resamples that had one.
    """
    kinds, cell_G, kind_G, points_G = _table(units, players)
    share_N = np.array(list(kinds.values()), np.float64) / len(units)
    played_PP = win_matrix([game for unit in kinds for game in unit], players)
    lent_PP = (played_PP + played_PP.T > 0).astype(np.float64)
    draws = randomness.generator(*key, "bootstrap")
    at_once = max(1, _CELLS_AT_ONCE // (len(cell_G) + len(kinds) + players * players))
    fits: list[Floats] = []
    refitted = 0
    for first in range(0, resamples, at_once):
        counts_RN = draws.multinomial(len(units), share_N, size=min(at_once, resamples - first))
        wins_RPP = _added(counts_RN[:, kind_G] * points_G, cell_G, players) + pseudo_wins * lent_PP
        if l2 == 0:
            endless_R = ~has_maximum(wins_RPP)
            wins_RPP[endless_R] += PSEUDO_WINS * lent_PP
            refitted += int(endless_R.sum())
        fits.append(_newton(wins_RPP, l2))
    low_P, high_P = np.quantile(np.concatenate(fits), [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return Intervals(low_P, high_P, resamples, refitted)


def _table(
    units: Sequence[Sequence[Game]], players: int
) -> tuple[dict[tuple[Game, ...], int], NDArray[np.intp], NDArray[np.intp], Floats]:
    """(count of each distinct unit; cell of W, unit and points of every game's two sides, in the order of the cells).

    Equal units are drawn together: a multinomial over the distinct ones is the same bootstrap, in far less memory.
    """
    kinds: dict[tuple[Game, ...], int] = {}
    for unit in units:
        kinds[tuple(unit)] = kinds.get(tuple(unit), 0) + 1
    sides: list[tuple[int, int, float]] = []
    for kind, unit in enumerate(kinds):
        for a, b, score in unit:
            sides += [(a * players + b, kind, score), (b * players + a, kind, 1 - score)]
    sides.sort()
    cell_G, kind_G, points_G = zip(*sides, strict=True)
    return kinds, np.array(cell_G, np.intp), np.array(kind_G, np.intp), np.array(points_G, np.float64)


def _added(points_RG: Floats, cell_G: NDArray[np.intp], players: int) -> Floats:
    """R win matrices from the points of games sorted by cell."""
    cells, first = np.unique(cell_G, return_index=True)
    wins_RC = np.zeros((len(points_RG), players * players))
    wins_RC[:, cells] = np.add.reduceat(points_RG, first, axis=1)
    return wins_RC.reshape(-1, players, players)
