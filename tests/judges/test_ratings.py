"""Elo and Bradley-Terry against golden numbers, a second way to fit, and simulated leagues whose truth is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palate.judges import ratings
from palate.judges.ratings import Game

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())[
    "elo_bradley_terry"
]
EXPECTED: dict[str, Any] = GOLDEN["expected"]
GAMES: list[Game] = [(int(a), int(b), float(s)) for a, b, s in GOLDEN["matches_a_b_scoreA"]]
WINS = np.array(GOLDEN["win_matrix"])
UNDEFEATED = np.array([[0.0, 4.0, 5.0], [0.0, 0.0, 3.0], [0.0, 1.0, 0.0]])
"""The league behind the file's `undefeated_with_half_pseudo_wins`, found by solving its numbers for whole wins."""

Formula = Callable[..., Any]


def close(actual: Any, expected: Any) -> bool:
    return np.shape(actual) == np.shape(expected) and np.allclose(actual, expected, rtol=1e-9, atol=1e-9)


# --- Elo -------------------------------------------------------------------------------------------------------------


def holds_elo(path: Formula) -> bool:
    after = [list(r) for r in path(GAMES, 4, k=GOLDEN["K"], start=GOLDEN["init"])]
    backward = [list(r) for r in path(GAMES[::-1], 4, k=GOLDEN["K"], start=GOLDEN["init"])]
    return close(after, EXPECTED["ratings_after_each"]) and close(backward[-1], EXPECTED["final_reversed_order"])


def changed(change: Callable[[list[Game]], Sequence[Game]]) -> Formula:
    return lambda games, players, **more: ratings.elo_path(change(games), players, **more)


def simultaneous(games: Sequence[Game], players: int, k: float, start: float) -> list[list[float]]:
    """A twin without an order: every game is expected from the ratings at the start."""
    now, path = [start] * players, list[list[float]]()
    for a, b, score in games:
        now = [r + k * (score - 0.5) * ((i == a) - (i == b)) for i, r in enumerate(now)]
        path.append(now)
    return path


ELO_TWINS: dict[str, Formula] = {
    "sign": changed(lambda games: [(a, b, 1 - s) for a, b, s in games]),
    "ties missing": changed(lambda games: [g for g in games if g[2] != 0.5]),
    "ties are losses": changed(lambda games: [(a, b, float(s == 1)) for a, b, s in games]),
    "order lost": changed(sorted),
    "order ignored": simultaneous,
    "base e": lambda games, players, k, start: [
        [start + (r - start) * math.log(10) for r in step]
        for step in ratings.elo_path(games, players, k / math.log(10), start)
    ],
}


def test_elo_is_the_golden_sequence_in_both_orders() -> None:
    assert holds_elo(ratings.elo_path)
    assert close(ratings.elo(GAMES, 4), EXPECTED["final"])
    assert not close(ratings.elo(GAMES[::-1], 4), EXPECTED["final"])
    assert ratings.expected_score(1000, 1000) == EXPECTED["first_match_expected"]
    assert close(ratings.expected_score(1000, 1400), EXPECTED["upset_400_points"])


@pytest.mark.parametrize("twin", ELO_TWINS.values(), ids=ELO_TWINS.keys())
def test_elo_rejects(twin: Formula) -> None:
    assert not holds_elo(twin)


def test_elo_keeps_the_sum_and_never_overflows() -> None:
    assert all(math.isclose(sum(r), 4000) for r in ratings.elo_path(GAMES, 4))
    wild = ratings.elo([(0, 1, 0.0), (0, 1, 1.0)], 2, k=1e6)
    assert np.isfinite(wild).all()
    assert ratings.elo([], 3).tolist() == [1000, 1000, 1000]


# --- Bradley-Terry ---------------------------------------------------------------------------------------------------


def holds_bradley_terry(fit: Formula) -> bool:
    score_P = fit(WINS)
    return (
        close(score_P, EXPECTED["bt_scores"])
        and close(ratings.bradley_terry_nll(score_P, WINS), EXPECTED["bt_nll"])
        and close(ratings.elo_scale(score_P), EXPECTED["bt_elo_scale"])
        and close(1 / (1 + math.exp(score_P[3] - score_P[0])), EXPECTED["bt_prob_0_beats_3"])
        and close(fit(WINS, l2=0.1), EXPECTED["bt_l2_0p1"])
        and close(fit(ratings.with_pseudo_wins(UNDEFEATED)), EXPECTED["undefeated_with_half_pseudo_wins"])
    )


BT_TWINS: dict[str, Formula] = {
    "sign": lambda wins, l2=0.0: ratings.bradley_terry(wins.T, l2),
    "not centred": lambda wins, l2=0.0: ratings.bradley_terry(wins, l2) - ratings.bradley_terry(wins, l2)[0],
    "l2 dropped": lambda wins, l2=0.0: ratings.bradley_terry(wins),
    "l2 without its half": lambda wins, l2=0.0: ratings.bradley_terry(wins, 2 * l2),
    "no pseudo-wins": lambda wins, l2=0.0: ratings.bradley_terry(np.floor(wins), l2 or 1e-3 * (len(wins) == 3)),
    "win rate": lambda wins, l2=0.0: (lambda p: np.log(p / (1 - p)))(wins.sum(1) / (wins + wins.T).sum(1)),
}


def test_bradley_terry_is_the_golden_maximum() -> None:
    assert holds_bradley_terry(ratings.bradley_terry)


@pytest.mark.parametrize("twin", BT_TWINS.values(), ids=BT_TWINS.keys())
def test_bradley_terry_rejects(twin: Formula) -> None:
    assert not holds_bradley_terry(twin)


def league(score_P: Any, games: int, seed: int, ties: float = 0.0) -> list[tuple[Game, ...]]:
    """Every pair plays `games` times at the truth `score_P`; a share of the games is called a tie."""
    dice = np.random.default_rng(seed)
    found: list[tuple[Game, ...]] = []
    for a, b in combinations(range(len(score_P)), 2):
        for _ in range(games):
            won = float(dice.random() < 1 / (1 + math.exp(score_P[b] - score_P[a])))
            found.append(((a, b, 0.5 if dice.random() < ties else won),))
    return found


def minorise_maximise(wins_PP: Any) -> Any:
    """Bradley-Terry by another road: strength_i = W_i / Σ_j n_ij/(strength_i + strength_j), repeated. Hunter 2004."""
    strength_P = np.ones(len(wins_PP))
    games_PP = wins_PP + wins_PP.T
    for _ in range(20_000):
        shared_PP = games_PP / (strength_P[:, None] + strength_P[None, :])
        strength_P = wins_PP.sum(1) / shared_PP.sum(1)
        strength_P /= np.exp(np.log(strength_P).mean())
    return np.log(strength_P)


@pytest.mark.parametrize("seed", range(5))
def test_newton_and_minorise_maximise_meet(seed: int) -> None:
    score_P = np.random.default_rng(seed).normal(size=5)
    wins_PP = ratings.win_matrix([g for unit in league(score_P, 30, seed, ties=0.2) for g in unit], 5)
    assert np.allclose(ratings.bradley_terry(wins_PP), minorise_maximise(wins_PP), atol=1e-8)


def test_a_tie_is_half_a_win_for_both_and_order_does_not_matter() -> None:
    wins_PP = ratings.win_matrix(GAMES, 4)
    assert wins_PP[1, 3] == wins_PP[3, 1] == 0.5
    assert wins_PP.sum() == len(GAMES)
    assert (wins_PP == ratings.win_matrix(GAMES[::-1], 4)).all()
    without = ratings.win_matrix([g for g in GAMES if g[2] != 0.5], 4)
    assert not np.allclose(ratings.bradley_terry(wins_PP), ratings.bradley_terry(without, 1e-6))


@pytest.mark.parametrize("wins", [1e6, 1e9])
def test_newton_settles_far_out(wins: float) -> None:
    score_P = ratings.bradley_terry(np.array([[0, wins], [1, 0]]))
    assert math.isclose(score_P[0] - score_P[1], math.log(wins), rel_tol=1e-9)


# --- What cannot be rated --------------------------------------------------------------------------------------------


def test_a_likelihood_without_a_maximum_is_seen() -> None:
    assert ratings.divided(UNDEFEATED) == ([[0]], [[1, 2]])
    assert ratings.divided(WINS) == ([], [])
    with pytest.raises(ValueError, match="no finite maximum"):
        ratings.bradley_terry(UNDEFEATED)
    assert np.isfinite(ratings.bradley_terry(UNDEFEATED, l2=0.1)).all()
    # Nobody is undefeated here, and yet the first two never lost to the last two.
    two_classes = np.array([[0, 1, 2, 2], [1, 0, 2, 2], [0, 0, 0, 1], [0, 0, 1, 0]], float)
    assert ratings.divided(two_classes) == ([[0, 1]], [[2, 3]])
    with pytest.raises(ValueError, match="no finite maximum"):
        ratings.bradley_terry(two_classes)


def test_a_cycle_of_wins_has_a_maximum() -> None:
    cycle = np.roll(np.eye(7), 1, axis=1)
    assert ratings.has_maximum(cycle[None]).all()
    assert np.allclose(ratings.bradley_terry(cycle), 0)
    cycle[6, 0] = 0
    assert not ratings.has_maximum(cycle[None]).any()


def test_groups_that_never_met_are_seen() -> None:
    apart = np.zeros((5, 5))
    apart[0, 3] = apart[3, 0] = apart[1, 4] = apart[4, 1] = 1
    assert ratings.groups(apart) == [[0, 3], [1, 4], [2]]
    assert ratings.groups(WINS) == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="3 groups"):
        ratings.bradley_terry(apart, l2=1.0)


def test_pseudo_wins_go_to_pairs_that_met() -> None:
    chain = np.array([[0, 2, 0], [0, 0, 2], [0, 0, 0]], float)
    assert ratings.with_pseudo_wins(chain, 0.5).tolist() == [[0, 2.5, 0], [0.5, 0, 2.5], [0, 0.5, 0]]


# --- Targets and intervals -------------------------------------------------------------------------------------------


def test_targets_have_mean_0_and_population_variance_1() -> None:
    z_P = ratings.z_scores(EXPECTED["final"])
    assert close(z_P, EXPECTED["zscore_reward_population_std"])
    assert not close(z_P * math.sqrt(3 / 4), EXPECTED["zscore_reward_population_std"])  # the sample's variance
    assert ratings.z_scores([1000, 1000]).tolist() == [0, 0]
    assert ratings.z_scores([0, 0]).tolist() == [0, 0]


def coverage(bootstrap: Callable[..., ratings.Intervals], games: int = 20) -> float:
    """The share of 95 % intervals that hold the truth, over 60 simulated leagues of six players."""
    held: list[bool] = []
    for seed in range(60):
        score_P = np.random.default_rng(1000 + seed).normal(size=6)
        score_P -= score_P.mean()
        found = bootstrap(league(score_P, games, seed), 6, resamples=400, key=("league", seed))
        held += list((found.low_P <= score_P) & (score_P <= found.high_P))
    return float(np.mean(held))


def narrow(*args: Any, **more: Any) -> ratings.Intervals:
    return ratings.bootstrap(*args, level=0.7, **more)


def one_sided(*args: Any, **more: Any) -> ratings.Intervals:
    found = ratings.bootstrap(*args, **more)
    return ratings.Intervals((found.low_P + found.high_P) / 2, found.high_P, found.resamples, 0)


def tripled(units: Sequence[Any], *args: Any, **more: Any) -> ratings.Intervals:
    """Every game counted three times, as if each were evidence of its own."""
    return ratings.bootstrap([*units, *units, *units], *args, **more)


def test_intervals_hold_the_truth() -> None:
    assert 0.9 <= coverage(ratings.bootstrap) <= 1.0


@pytest.mark.parametrize("twin", [narrow, one_sided, tripled])
def test_coverage_rejects(twin: Callable[..., ratings.Intervals]) -> None:
    assert coverage(twin) < 0.9


def test_few_games_still_cover() -> None:
    """Four games a pair, with pseudo-wins only in those leagues that need them, as the verb does."""

    def as_needed(units: Sequence[Any], players: int, **more: Any) -> ratings.Intervals:
        wins_PP = ratings.win_matrix([g for unit in units for g in unit], players)
        return ratings.bootstrap(units, players, pseudo_wins=0.5 * any(ratings.divided(wins_PP)), **more)

    assert coverage(as_needed, games=4) >= 0.9


def test_the_bootstrap_is_that_of_drawing_rows() -> None:
    """The multinomial over distinct rows against rows drawn one by one and fitted one by one."""
    units = league([0.8, 0.0, -0.8], 40, seed=3, ties=0.3)
    found = ratings.bootstrap(units, 3, resamples=2000)
    dice = np.random.default_rng(0)
    fits: list[Any] = []
    for _ in range(2000):
        drawn = [units[i][0] for i in dice.integers(len(units), size=len(units))]
        fits.append(ratings.bradley_terry(ratings.win_matrix(drawn, 3)))
    low_P, high_P = np.quantile(fits, [0.025, 0.975], axis=0)
    assert np.allclose(found.low_P, low_P, atol=0.05)
    assert np.allclose(found.high_P, high_P, atol=0.05)


def test_games_of_one_row_are_drawn_together() -> None:
    """Ten games that were judged at once are less evidence than ten that were judged one by one."""
    single = league([0.5, -0.5], 200, seed=1)
    by_ten = [single[i] * 10 for i in range(0, 200, 10)]
    apart = [unit for row in by_ten for unit in ((game,) for game in row)]
    together, alone = (ratings.bootstrap(units, 2, resamples=500) for units in (by_ten, apart))
    assert np.ptp([together.low_P, together.high_P]) > 2 * np.ptp([alone.low_P, alone.high_P])


def test_the_bootstrap_is_seeded_and_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    units = league([1.0, 0.0, -1.0], 15, seed=5)

    def limits(key: Sequence[int | str]) -> list[float]:
        found = ratings.bootstrap(units, 3, resamples=100, key=key)
        return [*found.low_P.tolist(), *found.high_P.tolist()]

    whole = limits(("a", 1))
    assert whole == limits(("a", 1))
    assert whole != limits(("a", 2))
    monkeypatch.setattr(ratings, "_CELLS_AT_ONCE", 300)
    assert np.allclose(whole, limits(("a", 1)), atol=1e-9)


def test_resamples_without_a_maximum_are_counted() -> None:
    found = ratings.bootstrap(league([1.5, 0.0, -1.5], 4, seed=8), 3, resamples=200)
    assert 0 < found.refitted < 200
    assert np.isfinite(found.low_P).all()
    assert np.isfinite(found.high_P).all()
