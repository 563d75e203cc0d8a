"""Games out of files: who met whom and who won, from votes, from rankings with a column of names, or from both."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, cast

from palate.data.formats import BY_NAME, BadRow, Row, detect
from palate.data.formats.row import listed, shown
from palate.data.source import Data, Part, open_rows
from palate.judges.ratings import Game
from palate.records import Ranking
from palate.settings import PalateError, nearest

SIDES = (("a", "b"), ("model_a", "model_b"), ("player_a", "player_b"))
"""Columns that name the two players of a vote."""
WRITERS = ("players", "player", "models", "model", "policies")
"""Columns with the name of who wrote each completion, one of them for each."""
PREFERRED = (("chosen_player", "rejected_player"), ("chosen_model", "rejected_model"))
"""The same for a pair, in two columns."""
_ORDERS = ("ranks", "ranking", "scores")

_WINS = {
    **dict.fromkeys(("a", "model_a", "player_a"), 1.0),
    **dict.fromkeys(("b", "model_b", "player_b"), 0.0),
    **dict.fromkeys(("tie", "draw", "tie (bothbad)", "both_bad", "bothbad"), 0.5),
}
"""Words for the winner other than a name, with the score of the first player."""


@dataclass(frozen=True)
class Written:
    """Answers to one prompt with the players who wrote them, as indices into `League.players`."""

    record: Ranking
    writers: tuple[int, ...]


@dataclass(frozen=True)
class League:
    """All that was read. A unit is one row: its games were judged together."""

    players: tuple[str, ...]
    units: tuple[tuple[Game, ...], ...]
    written: tuple[Written, ...]
    """The texts of those rows that have any."""

    @property
    def games(self) -> list[Game]:
        """All games in the order of the file."""
        return [game for unit in self.units for game in unit]


@dataclass(frozen=True)
class _Meeting:
    """One row: who met, with ranks (0 the best) or the first one's score, and the answers where there are any."""

    place: str
    players: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    score: float = 0.5
    record: Ranking | None = None

    def games(self, index: Mapping[str, int]) -> tuple[Game, ...]:
        """Every pair of the row's answers, those of one player with each other left out: they say nothing of him."""
        at = [index[name] for name in self.players]
        if not self.ranks:
            return ((at[0], at[1], self.score),)
        r = self.ranks
        pairs = [(i, j) for i, j in combinations(range(len(r)), 2) if at[i] != at[j]]
        return tuple((at[i], at[j], 0.5 if r[i] == r[j] else float(r[i] < r[j])) for i, j in pairs)


def read_league(path: str, known: Sequence[str] = ()) -> League:
    """The games of a file, or of all files of a folder or pattern, in their order.

    `known` closes the list of players: any other name is then a fault. PalateError names the row and the next move.
    """
    if not Data(path=path).files():  # what else is read elsewhere by such a name lies on the hub
        raise PalateError(f"{path}: no such file or folder. Check the path.")
    meetings = [_meeting(row) for row in open_rows(Part(path=path))]
    closed = dict.fromkeys(name for given in known if (name := " ".join(given.split())))
    names = tuple(closed) or tuple(sorted({name for m in meetings for name in m.players}))
    for m in meetings:
        for name in m.players:
            if name not in names:
                raise PalateError(f"{m.place}: {name!r} is not among the players.{_did_you_mean(name, names)}")
    index = {name: i for i, name in enumerate(names)}
    units = tuple(unit for m in meetings if (unit := m.games(index)))
    if not units:
        raise PalateError(f"{path}: no row has two players who meet. Give games between at least two.")
    written = (Written(m.record, tuple(index[name] for name in m.players)) for m in meetings if m.record)
    return League(names, units, tuple(written))


def _did_you_mean(name: str, names: Collection[str]) -> str:
    return f"{nearest(name, names)} Known: {listed(names)}."


def _meeting(row: Row | BadRow) -> _Meeting:
    if isinstance(row, BadRow):
        raise PalateError(row.message)
    sides = next((pair for pair in SIDES if row.has(*pair)), None)
    if sides is not None:
        return _vote(row, *sides)
    return _ranked(row)


def _vote(row: Row, a: str, b: str) -> _Meeting:
    """{a, b, winner | score}, with the answers where an arena's columns for them are there."""
    players = (_name(row, row.get(a), a), _name(row, row.get(b), b))
    if players[0] == players[1]:
        raise row.fault(f"{a}, {b}", f"{players[0]!r} meets itself", "Name two players or remove the row")
    score = _score(row, players)
    asked = row.first("prompt", "question", "instruction")
    if not row.has("conversation_a", "conversation_b") and not row.has(asked, "response_a", "response_b"):
        return _Meeting(row.place, players, score=score)
    word = "tie" if score == 0.5 else "a" if score > 0.5 else "b"
    record = next(iter(BY_NAME["arena"].read(Row({**row.columns, "winner": word}, row.place))))
    return _Meeting(row.place, players, score=score, record=cast(Ranking, record))


def _score(row: Row, players: tuple[str, str]) -> float:
    if row.has("winner", "score"):
        raise row.fault("winner, score", "both are there, and one could contradict the other", "Keep one")
    if not row.has("winner") and not row.has("score"):
        move = f"Add winner ({players[0]!r}, {players[1]!r} or 'tie') or score (of the first, from 0 to 1)"
        raise row.fault("winner", f"neither winner nor score; this row has the columns {listed(row.columns)}", move)
    if row.has("score"):
        score = row.number("score")
        if not 0 <= score <= 1:
            move = "Give what the first player scored: 1 a win, 0.5 a tie, 0 a loss"
            raise row.fault("score", f"expected a number from 0 to 1, got {score:g}", move)
        return score
    winner = _name(row, row.get("winner"), "winner")
    meanings = {1.0 - players.index(winner)} if winner in players else set[float]()
    if winner.lower() in _WINS:
        meanings.add(_WINS[winner.lower()])
    if len(meanings) != 1:
        if meanings:
            raise row.fault("winner", f"{winner!r} is a player's name and a side or a tie", "Write score instead")
        move = f"{nearest(winner, players)} Write one of the two names, a, b or tie"
        raise row.fault("winner", f"{winner!r} is neither {players[0]!r} nor {players[1]!r} nor a tie", move)
    return meanings.pop()


def _name(row: Row, value: Any, field: str) -> str:
    """A player's name: text, or a whole number that serves as an id."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = " ".join(row.string(value, field).split())
    if not name:
        raise row.fault(field, "an empty name", "Name the player")
    if not name.isprintable():
        raise row.fault(field, f"{shown(name)} holds characters that cannot be printed", "Rename the player")
    return name


def _names(row: Row, field: str) -> tuple[str, ...]:
    return tuple(_name(row, value, f"{field}[{i}]") for i, value in enumerate(row.items(field)))


def _ranked(row: Row) -> _Meeting:
    """A ranking with names: of completions, or of the players themselves."""
    field = next((f for f in WRITERS if row.has(f)), None)
    if field is not None and not _pair_columns(row):
        players = _names(row, field)
        row = _named_order(row, players, field)
        if row.has(row.first(*_ORDERS)) and not row.has("completions"):
            order = {f: row.columns[f] for f in _ORDERS if row.has(f)}
            bare = Row({"prompt": "-", "completions": list(players), **order}, row.place)
            return _Meeting(row.place, players, cast(Ranking, next(iter(BY_NAME["ranking"].read(bare)))).ranks)
    record = _record(row)
    players = _writers(row, record)
    if len(players) != len(record.completions):
        count = len(record.completions)
        raise row.fault(field or "players", f"expected {count}, one per completion, got {len(players)}", "Mend the row")
    return _Meeting(row.place, players, record.ranks, record=record)


def _pair_columns(row: Row) -> tuple[str, str] | None:
    return next((p for p in PREFERRED if row.has(*p)), None)


def _record(row: Row) -> Ranking:
    found = list(detect(row).read(row))
    if len(found) != 1 or not isinstance(found[0], Ranking):
        move = "Give {a, b, winner}, {a, b, score}, or rankings with a column `players`; docs/rank.md shows each"
        raise row.fault("columns", f"{listed(row.columns)} say nothing about who beat whom", move)
    return found[0]


def _writers(row: Row, record: Ranking) -> tuple[str, ...]:
    """Who wrote each completion of a record, in the record's order."""
    pair = _pair_columns(row)
    if pair is not None and len(record.completions) == 2:
        return tuple(_name(row, row.get(f), f) for f in pair)
    # A format may have put the better answer first and the names with it, so its own columns are asked.
    columns = Row(record.columns, row.place)
    field = next((f for f in WRITERS if columns.has(f)), None)
    if field is None:
        move = (
            f"Add `players`, one name per completion (also read: {', '.join(WRITERS[1:])}, chosen_model/rejected_model)"
        )
        raise row.fault("players", f"no column among {listed(row.columns)} says who wrote each completion", move)
    return _names(columns, field)


def _named_order(row: Row, players: tuple[str, ...], field: str) -> Row:
    """The row with an order of names, `ranking: [best, [tied, tied]]`, turned into one of places."""
    if not row.has("ranking"):
        return row
    order = [entry if isinstance(entry, list) else [entry] for entry in row.items("ranking")]
    flat = [member for entry in order for member in cast(list[Any], entry)]
    if not any(isinstance(member, str) for member in flat):
        return row

    def place(member: Any) -> int:
        name = _name(row, member, "ranking")
        if name not in players:
            move = f"{nearest(name, players)} Known here: {listed(players)}"
            raise row.fault("ranking", f"{name!r} is not among the row's {field}", move)
        return players.index(name)

    places = [[place(member) for member in cast(list[Any], entry)] for entry in order]
    return replace(row, columns={**row.columns, "ranking": places})
