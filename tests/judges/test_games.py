"""Games out of rows: every shape that is read, and every fault with its place and next move."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from palate.judges.games import League, read_league
from palate.settings import PalateError

ABC = ["ana", "bob", "cid"]
ASKED = {"prompt": "Name a fruit.", "completions": ["apple", "pear", "stone"]}


def league(folder: Path, *rows: Any, known: tuple[str, ...] = ()) -> League:
    path = folder / "games.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_league(str(path), known)


def named(found: League) -> list[list[tuple[str, str, float]]]:
    """Units with names in place of indices."""
    return [[(found.players[a], found.players[b], score) for a, b, score in unit] for unit in found.units]


def fault(folder: Path, *rows: Any, known: tuple[str, ...] = ()) -> str:
    with pytest.raises(PalateError) as caught:
        league(folder, *rows, known=known)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("row", "score"),
    [
        ({"a": "ana", "b": "bob", "winner": "ana"}, 1),
        ({"a": "ana", "b": "bob", "winner": " bob "}, 0),
        ({"a": "ana", "b": "bob\n", "winner": "bob\u00a0"}, 0),
        ({"a": "ana", "b": "bob", "winner": "b"}, 0),
        ({"a": "ana", "b": "bob", "winner": "Tie"}, 0.5),
        ({"a": "ana", "b": "bob", "winner": None, "score": 0.7}, 0.7),
        ({"player_a": "ana", "player_b": "bob", "score": 1}, 1),
        ({"model_a": "ana", "model_b": "bob", "winner": "model_b", "turn": 1}, 0),
        ({"model_a": "ana", "model_b": "bob", "winner": "tie (bothbad)"}, 0.5),
    ],
)
def test_a_vote(row: dict[str, Any], score: float, tmp_path: Path) -> None:
    assert named(league(tmp_path, row)) == [[("ana", "bob", score)]]


def test_whole_numbers_serve_as_names(tmp_path: Path) -> None:
    assert named(league(tmp_path, {"a": 7, "b": 12, "winner": 12})) == [[("7", "12", 0)]]


def test_a_table(tmp_path: Path) -> None:
    with (tmp_path / "votes.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["a", "b", "score"], ["ana", "bob", "1"], ["bob", "cid", "0.5"]])
    assert named(read_league(str(tmp_path / "votes.csv"))) == [[("ana", "bob", 1)], [("bob", "cid", 0.5)]]


def test_a_folder_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    for name, winner in (("2.jsonl", "b"), ("1.jsonl", "a")):
        (tmp_path / name).write_text(json.dumps({"a": "x", "b": "y", "winner": winner}) + "\n")
    assert [game[2] for game in read_league(str(tmp_path)).games] == [1, 0]


RANKED = [[("ana", "bob", 1.0), ("ana", "cid", 1.0), ("bob", "cid", 0.5)]]


@pytest.mark.parametrize(
    "row",
    [
        {**ASKED, "ranks": [0, 1, 1], "players": ABC},
        {**ASKED, "ranks": [1, 2, 2], "models": ABC},
        {**ASKED, "scores": [9, 3, 3], "model": ABC},
        {**ASKED, "ranking": [0, [1, 2]], "player": ABC},
        {**ASKED, "ranking": ["ana", ["cid", "bob"]], "players": ABC},
        {"players": ABC, "ranking": ["ana", ["bob", "cid"]]},
        {"players": ABC, "ranks": [1, 2, 2]},
        {"players": json.dumps(ABC), "scores": "[9, 3, 3]"},
    ],
)
def test_a_ranking_is_every_pair_in_one_unit(row: dict[str, Any], tmp_path: Path) -> None:
    found = league(tmp_path, row)
    assert named(found) == RANKED
    assert len(found.written) == ("completions" in row)


def test_pairs_and_published_rows(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": "yes", "rejected": "no"}
    sides = {"chosen_model": "ana", "rejected_model": "bob"}
    summary = {
        "info": {"subreddit": "s", "title": "t", "post": "p"},
        "summaries": [{"text": "one", "policy": "bob"}, {"text": "two", "policy": "ana"}],
        "choice": 1,
    }
    for row in ({**pair, **sides}, {**pair, **sides, "model": "judge"}, {**pair, "players": ["ana", "bob"]}, summary):
        assert named(league(tmp_path, row)) == [[("ana", "bob", 1.0)]]


def test_texts_stay_with_their_writers(tmp_path: Path) -> None:
    vote = {"a": "bob", "b": "ana", "score": 0.2, "prompt": "p", "response_a": "no", "response_b": "yes"}
    found = league(tmp_path, vote, {**ASKED, "ranks": [2, 0, 1], "players": ABC})
    texts = [
        [(c, found.players[w]) for c, w in zip(row.record.completions, row.writers, strict=True)]
        for row in found.written
    ]
    assert texts == [[("no", "bob"), ("yes", "ana")], [("apple", "ana"), ("pear", "bob"), ("stone", "cid")]]
    assert found.games[0] == (1, 0, 0.2)


def test_answers_of_one_player_are_no_games(tmp_path: Path) -> None:
    """Rankings of several samples of one model are common; what it does to itself says nothing of it."""
    row = {**ASKED, "ranks": [0, 1, 2], "players": ["ana", "bob", "ana"]}
    assert named(league(tmp_path, row)) == [[("ana", "bob", 1.0), ("bob", "ana", 1.0)]]
    alone = {**ASKED, "ranks": [0, 1, 2], "players": ["ana", "ana", "ana"]}
    assert named(league(tmp_path, alone, row)) == named(league(tmp_path, row))
    assert "no row has two players who meet" in fault(tmp_path, alone)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"a": "ana", "b": "bob", "winner": "ann"}, "winner: 'ann' is neither 'ana' nor 'bob' nor a tie. Did you mean"),
        ({"a": "ana", "b": "bob"}, "neither winner nor score"),
        ({"a": "ana", "b": "bob", "winner": "a", "score": 1}, "Keep one"),
        ({"a": "ana", "b": "bob", "score": 1.5}, "expected a number from 0 to 1, got 1.5"),
        ({"a": "ana", "b": "bob", "score": -1}, "expected a number from 0 to 1, got -1"),
        ({"a": "ana", "b": "bob", "score": "won"}, "score: expected a number"),
        ({"a": "ana", "b": "ana", "winner": "a"}, "'ana' meets itself"),
        ({"a": "b", "b": "a", "winner": "a"}, "'a' is a player's name and a side or a tie"),
        ({"a": "ana", "b": " ", "winner": "a"}, "b: an empty name"),
        ({"a": "ana", "b": ["bob"], "winner": "a"}, "b: expected text"),
        ({"a": "ana", "b": "\x1b[31mbob", "winner": "a"}, "holds characters that cannot be printed"),
        ({**ASKED, "ranks": [0, 1, 2]}, "players: no column among prompt, completions, ranks says who wrote"),
        ({**ASKED, "ranks": [0, 1, 2], "players": ["ana", "bob"]}, "expected 3, one per completion, got 2"),
        ({**ASKED, "ranks": [0, 1], "players": ABC}, "ranks: expected 3"),
        ({**ASKED, "ranks": [0, 1, 2], "players": "ana"}, "players: expected a list"),
        ({**ASKED, "ranking": [0, 3, 1], "players": ABC}, "ranking: expected a whole number from 0 to 2"),
        ({**ASKED, "ranking": ["ana", "bo", "cid"], "players": ABC}, "'bo' is not among the row's players. Did you"),
        ({"players": ABC, "ranking": ["ana", "eve", "cid"]}, "ranking: 'eve' is not among the row's players. Known"),
        ({"players": ABC, "ranking": ["ana", "bob"]}, "does not place the answers [2]"),
        ({"players": ABC, "ranking": ["ana", "bob", "bob"]}, "places answer 1 twice"),
        ({"prompt": "p", "completion": "c"}, "prompt, completion say nothing about who beat whom"),
        ({"height": 3}, "no known format has the columns height"),
        ("{not json", "not JSON"),
    ],
)
def test_a_fault_names_place_and_next_move(row: Any, told: str, tmp_path: Path) -> None:
    message = fault(tmp_path, {"a": "ana", "b": "bob", "winner": "a"}, row)
    assert message.startswith("games.jsonl:2: ")
    assert told in message


def test_a_closed_list_of_players_finds_typos(tmp_path: Path) -> None:
    good = {"a": "gpt-4", "b": "llama", "winner": "a"}
    typo = {"a": "gpt4", "b": "llama", "winner": "a"}
    assert league(tmp_path, good, known=(" llama", "", "gpt-4", "llama")).players == ("llama", "gpt-4")
    message = fault(tmp_path, good, typo, known=("llama", "gpt-4"))
    assert message == ("games.jsonl:2: 'gpt4' is not among the players. Did you mean 'gpt-4'? Known: llama, gpt-4.")
