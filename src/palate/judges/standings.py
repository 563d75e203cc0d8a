"""Standings: a league rated both ways, with intervals, and its ratings as targets for a reward model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from palate.data.formats.row import listed
from palate.judges import ratings
from palate.judges.games import League
from palate.judges.ratings import Floats, Game, Intervals
from palate.records import Text
from palate.settings import PalateError, Settings

Method = Literal["bradley_terry", "elo"]

_FEW = 0.05
"""Share of resamples without a maximum above which the intervals are said to be poor."""


class Rating(Settings):
    """How a league is rated."""

    by: Method = "bradley_terry"
    """Which rating sorts the table and is exported."""

    k: float = ratings.ELO_K
    """Elo: the most points one game can move."""

    start: float = ratings.ELO_START
    """Elo: the rating before the first game."""

    l2: float = 0.0
    """Bradley-Terry: strength of l2/2 · Σ s², which draws scores together and keeps them finite."""

    pseudo_wins: float | None = None
    """Bradley-Terry: wins lent to both sides of every pair that met. None: 0, or ½ where the likelihood needs them."""

    resamples: int = 1000
    """Bootstrap resamples behind the intervals."""

    level: float = 0.95
    """What share of intervals shall hold the truth."""

    seed: int = 0
    """Fixes the resamples."""


@dataclass(frozen=True)
class Line:
    """One player. Ratings are on the Elo scale; `score` is Bradley-Terry's own, in nats, of mean 0 over the players."""

    player: str
    bradley_terry: float
    low: float
    high: float
    score: float
    elo: float
    elo_reversed: float
    z: float
    """The rating that was asked for, of mean 0 and variance 1 over the players: the exported target."""
    games: int
    won: int
    tied: int
    lost: int


@dataclass(frozen=True)
class Standings:
    """The best player first. `nll` is that of the data alone, in nats; `moved` the most that reversing moves an Elo."""

    lines: tuple[Line, ...]
    by: Method
    games: int
    units: int
    nll: float
    l2: float
    pseudo_wins: float
    moved: float
    resamples: int
    refitted: int
    level: float
    seed: int
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        found = asdict(self)
        players = found.pop("lines")
        return {"players": players, **found}


def rate(league: League, how: Rating, name: str) -> Standings:
    """Rate a league. PalateError, which begins with `name`, where the games leave the ratings open."""
    count, games = len(league.players), league.games
    wins_PP = ratings.win_matrix(games, count)
    _require_one_league(league, wins_PP, name)
    pseudo_wins, notes = _pseudo_wins(league, wins_PP, how, name)
    fitted_PP = ratings.with_pseudo_wins(wins_PP, pseudo_wins)
    score_P = ratings.bradley_terry(fitted_PP, how.l2)
    sure = ratings.bootstrap(
        league.units,
        count,
        l2=how.l2,
        pseudo_wins=pseudo_wins,
        resamples=how.resamples,
        level=how.level,
        key=("rank", how.seed),
    )
    if sure.refitted:
        notes.append(_refitted(sure))
    forward_P, back_P = (ratings.elo(order, count, how.k, how.start) for order in (games, games[::-1]))
    bt_P, low_P, high_P = (ratings.elo_scale(s) for s in (score_P, sure.low_P, sure.high_P))
    z_P = ratings.z_scores(forward_P if how.by == "elo" else bt_P)
    counts_P3 = _counts(games, count)
    lines = [
        Line(
            player=player,
            bradley_terry=float(bt_P[i]),
            low=float(low_P[i]),
            high=float(high_P[i]),
            score=float(score_P[i]),
            elo=float(forward_P[i]),
            elo_reversed=float(back_P[i]),
            z=float(z_P[i]),
            games=sum(counts_P3[i]),
            won=counts_P3[i][0],
            tied=counts_P3[i][1],
            lost=counts_P3[i][2],
        )
        for i, player in enumerate(league.players)
    ]
    return Standings(
        lines=tuple(sorted(lines, key=lambda line: -line.z)),
        by=how.by,
        games=len(games),
        units=len(league.units),
        nll=ratings.bradley_terry_nll(score_P, wins_PP),
        l2=how.l2,
        pseudo_wins=pseudo_wins,
        moved=float(np.abs(forward_P - back_P).max()),
        resamples=sure.resamples,
        refitted=sure.refitted,
        level=how.level,
        seed=how.seed,
        notes=tuple(notes),
    )


def _counts(games: Sequence[Game], players: int) -> list[list[int]]:
    """Won, tied and lost games of each player; a score between is a win or a loss by the side of ½ it lies on."""
    counts_P3 = [[0, 0, 0] for _ in range(players)]
    for a, b, score in games:
        at = 0 if score > 0.5 else 2 if score < 0.5 else 1
        counts_P3[a][at] += 1
        counts_P3[b][2 - at] += 1
    return counts_P3


def _refitted(sure: Intervals) -> str:
    share = f"{sure.refitted} of {sure.resamples} resamples"
    told = f"{share} had no finite maximum and were fitted with {ratings.PSEUDO_WINS:g} pseudo-wins"
    if sure.refitted <= _FEW * sure.resamples:
        return told
    return f"{told}: the intervals lean on that, not on the games. More games, or --l2, would tell more"


def _require_one_league(league: League, wins_PP: Floats, name: str) -> None:
    apart = ratings.groups(wins_PP)
    if len(apart) > 1:
        shown = " | ".join(_named(league, group) for group in apart[:5]) + (" | …" if len(apart) > 5 else "")
        move = "Add games between them, or rank each group from a file of its own"
        fault = f"{len(apart)} groups of players never met, so nothing compares them: {shown}. {move}."
        raise PalateError(f"{name}: {fault}")


def _pseudo_wins(league: League, wins_PP: Floats, how: Rating, name: str) -> tuple[float, list[str]]:
    """(pseudo-wins to fit with, what to tell): ½ where neither they nor `l2` were given and the MLE diverges."""
    unbeaten, winless = ratings.divided(wins_PP)
    if how.l2 or how.pseudo_wins or not (unbeaten or winless):
        return how.pseudo_wins or 0.0, []
    why = [f"{_named(league, group)} never lost to the others" for group in unbeaten]
    why += [f"{_named(league, group)} never won against the others" for group in winless]
    fault = f"the likelihood has no finite maximum: {'; '.join(why)}"
    if how.pseudo_wins is not None:
        raise PalateError(f"{name}: {fault}. Give --l2 0.1 or --pseudo-wins {ratings.PSEUDO_WINS:g}.")
    lent = f"{ratings.PSEUDO_WINS:g} wins were lent to both sides of every pair that met"
    return ratings.PSEUDO_WINS, [f"{fault}, so {lent} (--pseudo-wins, --l2)"]


def _named(league: League, group: Sequence[int]) -> str:
    return listed(league.players[i] for i in group)


def targets(league: League, standings: Standings, name: str) -> list[dict[str, Any]]:
    """{prompt, completion, rating, player}: each answer with its writer's z-scored rating, each text once.

    A text that several players wrote gets their mean. PalateError, which begins with `name`, without texts, or where
    all ratings are equal and would teach nothing.
    """
    if not league.written:
        move = "Give rankings with completions, or votes with prompt, response_a and response_b"
        raise PalateError(f"{name}: these games come without texts, so there is nothing to export. {move}.")
    z_of = {line.player: line.z for line in standings.lines}
    if not any(z_of.values()):
        raise PalateError(f"{name}: all ratings are equal and would teach a reward model nothing. Add games.")
    found: dict[tuple[str, Text, Text], list[int]] = {}
    for row in league.written:
        for completion, writer in zip(row.record.completions, row.writers, strict=True):
            writers = found.setdefault((row.record.group, row.record.prompt, completion), [])
            if writer not in writers:
                writers.append(writer)
    rows: list[dict[str, Any]] = []
    for (group, prompt, completion), writers in found.items():
        names = [league.players[w] for w in writers]
        rating = sum(z_of[n] for n in names) / len(names)
        row = {"prompt": _plain(prompt), "completion": _plain(completion), "rating": rating, "player": ", ".join(names)}
        rows.append({**row, "group": group} if group else row)
    return rows


def _plain(text: Text) -> str | list[dict[str, str]]:
    return text if isinstance(text, str) else [{"role": m.role, "content": m.content} for m in text]


def as_lines(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
