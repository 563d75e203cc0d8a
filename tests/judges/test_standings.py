"""Standings: what is fitted and told when games leave ratings open, and ratings as targets that palate reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palate.data.source import Data, load
from palate.judges import ratings
from palate.judges.games import League, read_league
from palate.judges.standings import Rating, Standings, as_lines, rate, targets
from palate.records import Message, Rated
from palate.settings import PalateError

CYCLE = ((0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0), (0, 1, 1.0))
FEW = {"resamples": 50}


def rated(*games: tuple[int, int, float], players: str = "ana bob cid", **how: Any) -> Standings:
    league = League(tuple(players.split()), tuple((g,) for g in games), ())
    return rate(league, Rating(**{**FEW, **how}), "games")


def test_lines_come_best_first_with_their_counts() -> None:
    found = rated(*CYCLE, (2, 1, 0.5))
    assert [line.player for line in found.lines] == ["ana", "cid", "bob"]
    assert [(line.games, line.won, line.tied, line.lost) for line in found.lines] == [
        (3, 2, 0, 1),
        (3, 1, 1, 1),
        (4, 1, 1, 2),
    ]
    scores = {line.player: line.score for line in found.lines}
    expected_P = ratings.bradley_terry(ratings.win_matrix([*CYCLE, (2, 1, 0.5)], 3))
    assert np.allclose([scores[p] for p in ("ana", "bob", "cid")], expected_P)
    assert all(line.low < line.bradley_terry < line.high for line in found.lines)
    assert found.pseudo_wins == 0


def test_elo_sorts_and_is_exported_when_asked() -> None:
    found = rated(*CYCLE, by="elo", k=4)
    elo_P = ratings.elo(CYCLE, 3, k=4)
    back_P = ratings.elo(CYCLE[::-1], 3, k=4)
    assert [line.elo for line in found.lines] == sorted(elo_P.tolist(), reverse=True)
    assert np.allclose([line.z for line in found.lines], ratings.z_scores(sorted(elo_P, reverse=True)))
    assert found.moved == np.abs(elo_P - back_P).max() > 0


def test_an_undefeated_player_gets_pseudo_wins_and_it_is_said() -> None:
    games = ((0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0), (2, 1, 1.0))
    found = rated(*games)
    assert found.pseudo_wins == 0.5
    told = found.notes[0]
    assert "no finite maximum: ana never lost to the others; bob, cid never won against the others" in told
    assert "0.5 wins were lent to both sides of every pair that met" in told
    expected_P = ratings.bradley_terry(ratings.with_pseudo_wins(ratings.win_matrix(games, 3)))
    assert found.lines[0].score == pytest.approx(expected_P[0])
    with_l2 = rated(*games, l2=0.1)
    assert (with_l2.pseudo_wins, with_l2.notes) == (0, ())
    assert rated(*games, pseudo_wins=1).pseudo_wins == 1
    with pytest.raises(PalateError, match=r"games: the likelihood has no finite maximum: ana .* Give --l2 0\.1 or"):
        rated(*games, pseudo_wins=0)


def test_groups_that_never_met_are_refused_by_name() -> None:
    with pytest.raises(PalateError) as caught:
        rated((0, 1, 1.0), (3, 2, 1.0), (4, 2, 0.5), players="ana bob cid dan eve", l2=1)
    assert str(caught.value) == (
        "games: 2 groups of players never met, so nothing compares them: cid, dan, eve | ana, bob. "
        "Add games between them, or rank each group from a file of its own."
    )


def test_poor_intervals_are_said_to_be_poor() -> None:
    assert any("the intervals lean on that" in note for note in rated(*CYCLE).notes)
    plenty = rated(*CYCLE * 20)
    assert (plenty.refitted, plenty.notes) == (0, ())


def test_the_seed_fixes_the_intervals() -> None:
    assert rated(*CYCLE, seed=1) == rated(*CYCLE, seed=1)
    assert rated(*CYCLE, seed=1).lines[0].low != rated(*CYCLE, seed=2).lines[0].low


def read(folder: Path, *rows: dict[str, Any]) -> League:
    path = folder / "games.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_league(str(path))


RANKED: list[dict[str, Any]] = [
    {"prompt": "A?", "completions": ["x", "y"], "ranks": [0, 1], "players": ["ana", "bob"], "group": "g"},
    {"prompt": "B?", "completions": ["x", "x"], "ranks": [0, 0], "players": ["ana", "bob"]},
    {
        "prompt": [{"role": "user", "content": "C?"}],
        "completions": [[{"role": "assistant", "content": "z"}], [{"role": "assistant", "content": "w"}]],
        "ranks": [1, 0],
        "players": ["ana", "bob"],
    },
    {"prompt": "A?", "completions": ["x", "v"], "ranks": [0, 1], "players": ["ana", "bob"], "group": "g"},
]


def test_targets_are_rated_records_for_the_data_layer(tmp_path: Path) -> None:
    league = read(tmp_path, *RANKED)
    standings = rate(league, Rating(**FEW), "games")
    (tmp_path / "rated.jsonl").write_text(as_lines(targets(league, standings, "games")))
    records = load(Data(path=str(tmp_path / "rated.jsonl"), shuffle=False), seed=0)
    assert all(isinstance(r, Rated) for r in records)
    shown = [(r.prompt, r.completion, r.rating, r.columns["player"], r.group) for r in records if isinstance(r, Rated)]
    turns = [(Message("user", "C?"),), (Message("assistant", "z"),), (Message("assistant", "w"),)]
    assert shown == [  # two players: their z-scores are 1 and -1; the text of both has the mean; no text is there twice
        ("A?", "x", 1.0, "ana", "g"),
        ("A?", "y", -1.0, "bob", "g"),
        ("B?", "x", 0.0, "ana, bob", ""),
        (turns[0], turns[1], 1.0, "ana", ""),
        (turns[0], turns[2], -1.0, "bob", ""),
        ("A?", "v", -1.0, "bob", "g"),
    ]


def test_nothing_to_export_is_a_fault(tmp_path: Path) -> None:
    bare = read(tmp_path, {"a": "x", "b": "y", "winner": "a"})
    with pytest.raises(PalateError, match="games: these games come without texts"):
        targets(bare, rate(bare, Rating(**FEW), "games"), "games")
    even = read(tmp_path, RANKED[1])
    with pytest.raises(PalateError, match="all ratings are equal"):
        targets(even, rate(even, Rating(**FEW), "games"), "games")
