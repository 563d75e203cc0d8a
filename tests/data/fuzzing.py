"""Damaged data files, thousands of them, through every reader: `python tests/data/fuzzing.py 10000`.

Each file starts as a whole one of some format in some container. Its rows are damaged (wrong types, absurd numbers,
deep nesting, missing, doubled and strange keys), or its bytes (flips, cuts, splices, control characters), or both. What
a reader may do with it: give records, or raise PalateError with one line that says where. What it may not do: raise
anything else, take long, or name no place.
"""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import zstandard

from palate.data.source import Data, load
from palate.settings import PalateError

SECONDS = 5
"""A file that takes longer counts as a hang."""

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello — ü 茶"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
ROWS: list[dict[str, Any]] = [
    {"text": "once upon a time"},
    {"text": "good", "label": 1},
    {"messages": TURNS},
    {"conversations": SHARED, "system": "be kind"},
    {"prompt": "what?"},
    {"prompt": "a", "completion": "b"},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:], "margin": 1.0},
    {"chosen": "a b", "rejected": "a c"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"messages": TURNS[:1], "chosen": "a", "rejected": "b", "rank_gap": 1, "tree": "t"},
    {"prompt": "a", "completion": "b", "label": True},
    {"messages": TURNS, "label": False},
    {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 0]},
    {"prompt": "a", "completions": ["b", "c"], "ranking": [1, 0]},
    {"prompt": "a", "completion": "b", "rating": 4.5},
    {"prompt": "a", "original": "b", "corrected": "c", "spans": [[0, 1]]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {"instruction": "a"},
    {"instruction": "a", "chosen": "b", "rejected": "c"},
    {"instruction": "a", "output": ["c", "d"]},
    {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.2},
    {"question": "a", "answer": "b"},
    {"instruction": "a", "instances": [{"input": "b", "output": "c"}]},
    {"source": ["a"], "target": ["b"]},
    {"info": {"subreddit": "a", "title": "b", "post": "c"}, "summaries": [{"text": "d"}, {"text": "e"}], "choice": 0},
    {"subreddit": "a", "title": "b", "post": "c", "summary": "d"},
    {"prompt": "a", "label": "a summary"},
    {"query": [1, 50259], "sample0": [2], "sample1": [3], "best": 1},
    {"model_a": "a", "model_b": "b", "winner": "tie", "conversation_a": TURNS, "conversation_b": TURNS},
    {"image": "x.png", "question": "a", "chosen": "b", "rejected": "c"},
]
"""A row of every format that palate knows."""


class Hang(BaseException):
    """A reader took too long. Not an Exception, so that no reader can swallow it."""


# Rows


def _deep(dice: random.Random) -> Any:
    value: Any = "x"
    for _ in range(dice.choice([3, 70, 400])):
        value = [value] if dice.random() < 0.5 else {"content": value}
    return value


def _strange(dice: random.Random) -> Any:
    """A value that no column expects."""
    text = dice.choice(
        [
            "",
            " ",
            "\x00\x1b[2J",
            "\ud800",
            "[{}]",
            '{"role": 1}',
            "null",
            "nan",
            "x" * dice.choice([500, 500, 500, 100_000]),
            "{query}",
        ]
    )
    number = dice.choice([-1, 0, 10**18, 10**400, 1e308, float("nan"), float("inf"), -0.0, 2**63])
    turn = {"role": dice.choice(["user", "nobody", 3, None, "x" * 3000]), dice.choice(["content", "value", "x"]): text}
    nested = dice.choice([[], {}, [[]], [None], [turn], turn, [turn, 3], {"text": [text]}, [[text, number]]])
    return dice.choice([None, True, text, number, nested, _deep(dice)])


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items):
        yield from _places(inside, (*path, key))


def spoil_row(row: dict[str, Any], dice: random.Random) -> None:
    """One value of a row, somewhere inside, is replaced, removed, renamed or joined by another."""
    *outer, last = dice.choice(list(_places(row)) or [("new",)])
    target: Any = row
    for step in outer:
        target = target[step]
    what = dice.randrange(5)
    if what == 0 or not isinstance(target, dict):
        target[last] = _strange(dice)
    elif what == 1:
        target.pop(last, None)
    elif what == 2:
        target[dice.choice(["Prompt", "", "x" * 2000, "\x1b[31m", "a\nb", "label"])] = target.pop(last, None)
    elif what == 3:
        target |= {f"column {i}": i for i in range(dice.choice([3, 3, 3, 1000]))}
    else:
        for name in dice.sample(sorted({name for seed in ROWS for name in seed}), 3):
            target[name] = _strange(dice)


# Bytes


def _flip(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 2, 8])):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _cut(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def _drop(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    del data[start : start + dice.randrange(1, 30)]


def _splice(data: bytearray, dice: random.Random) -> None:
    """A piece of the file once more, somewhere else."""
    start, place = dice.randrange(len(data)), dice.randrange(len(data))
    data[place:place] = data[start : start + dice.randrange(1, 200)]


def _insert(data: bytearray, dice: random.Random) -> None:
    pieces = [
        b"\x00",
        b"\x1b[2J",
        b"\r",
        b"\n",
        b'"',
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"[" * 3000,
        b"9" * 5000,
        b"{" * 90,
    ]
    place = dice.randrange(len(data) + 1)
    data[place:place] = dice.choice([*pieces, b"\xef\xbb\xbf", b",", b"\t", b"-", b"e999", b'"a":1,"a":2,'])


def _noise(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    data[start : start + 16] = dice.randbytes(16)


SPOILERS: tuple[Callable[[bytearray, random.Random], None], ...] = (_flip, _flip, _cut, _drop, _splice, _insert, _noise)


def spoil_bytes(path: Path, dice: random.Random) -> None:
    """One to three damages to the bytes of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 2, 3])):
        if data:
            dice.choice(SPOILERS)(data, dice)
    path.write_bytes(data)


# Containers


def _spelled(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows as a table has them: text in every cell, JSON where a cell holds more."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{c: v if isinstance(v := row.get(c), str) else json.dumps(v) for c in columns} for row in rows]


def _table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    stream, cells = io.StringIO(newline=""), _spelled(rows)
    writer = csv.DictWriter(stream, list(cells[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(cells)
    return _bytes(stream.getvalue())


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


TEXTS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "jsonl": lambda rows: _bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
    "json": lambda rows: _bytes(json.dumps(rows, ensure_ascii=False, indent=1)),
    "csv": lambda rows: _table(rows, ","),
    "tsv": lambda rows: _table(rows, "\t"),
    "txt": lambda rows: _bytes("".join(str(next(iter(row.values()), "")) + "\n" for row in rows)),
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.compress,
}


def _columnar(rows: list[dict[str, Any]], write: Callable[[pyarrow.Table], Any]) -> None:
    """Write the rows as columns; as text where they have no type that can be written (too deep, mixed, empty)."""
    try:
        write(pyarrow.Table.from_pylist(rows))
    except Exception:  # of any kind, from pyarrow or datasets
        plain = [{k: v.encode("utf-8", "replace").decode() for k, v in row.items()} for row in _spelled(rows)]
        write(pyarrow.Table.from_pylist(plain))


def _arrow(table: pyarrow.Table, path: Path, whole: bool) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink:
        door = pyarrow.ipc.new_file if whole else pyarrow.ipc.new_stream
        with door(sink, table.schema) as writer:
            writer.write_table(table)


def write_seed(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in a container, whole; returns what a recipe would name."""
    path = folder / f"data.{kind}"
    plain, dot, packed = kind.partition(".")
    if plain in TEXTS:
        path.write_bytes(PACKERS[dot + packed](TEXTS[plain](rows)))
    elif kind == "parquet":
        _columnar(rows, lambda table: pyarrow.parquet.write_table(table, path))
    elif kind == "saved":
        _columnar(rows, lambda table: datasets.Dataset(table).save_to_disk(str(path)))
    else:
        _columnar(rows, lambda table: _arrow(table, path, whole=len(rows) % 2 == 0))
    return path


KINDS = [*(kind + packed for kind in TEXTS for packed in PACKERS), *["parquet", "arrow"] * 3, "saved"]


def damaged(folder: Path, dice: random.Random) -> Path:
    """A damaged file (or folder, of a saved dataset) of some kind, freshly written."""
    kind, rows = dice.choice(KINDS), [copy.deepcopy(dice.choice(ROWS))] * dice.choice([1, 2, 5])
    rows = [copy.deepcopy(row) for row in rows]
    by_rows = dice.random() < 0.5
    for _ in range(dice.choice([1, 2]) if by_rows else 0):
        spoil_row(dice.choice(rows), dice)
    path = write_seed(folder, kind, rows)
    if not by_rows or dice.random() < 0.2:
        inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        spoil_bytes(dice.choice(inside), dice)
    return path


# The verdict


@dataclass
class Figures:
    """What came of the files."""

    files: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    slowest: str = ""
    kinds: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def _complaint(said: str, path: Path) -> str:
    """What is wrong with an error line; empty when it is as it should be."""
    placed = re.match(re.escape(str(path)) + r"(/[^:]*)?(:\d+|: row \d+)?: \S", said)
    if not placed:
        return "names no place"
    if not said.isprintable():
        return "holds what a terminal would obey"
    if len(said) > 1500:
        return f"is {len(said)} characters long"
    return "" if re.search(r"[.?] [A-Z].*\.$", said) else "says no next move"


def _alarm(*_: Any) -> None:
    raise Hang


def read_one(path: Path, seed: int, figures: Figures) -> None:
    """Read one damaged file, every other time with bad rows skipped, and note what came of it."""
    skips = seed % 2 == 1
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    began = time.perf_counter()
    try:
        records = load(Data(path=str(path), on_bad_row="skip" if skips else "fail"), 0)
        assert records, "neither records nor an error"
        figures.accepted += 1
    except PalateError as fault:
        figures.refused += 1
        said = str(fault)
        said = said.partition("the first: ")[2] if skips and " were skipped, the first: " in said else said
        if complaint := _complaint(said, path):
            figures.failures.append(f"file {seed} ({path.name}): the error {complaint}: {said[:300]!r}")
    except (Exception, Hang) as fault:  # just what must not happen
        figures.failures.append(f"file {seed} ({path.name}): {type(fault).__name__}: {str(fault)[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - began
    if seconds > figures.slowest_seconds:
        figures.slowest_seconds, figures.slowest = round(seconds, 3), f"file {seed} ({path.name})"
    kind = path.name.removeprefix("data.")
    figures.kinds[kind] = figures.kinds.get(kind, 0) + 1
    figures.files += 1


def fuzz(count: int, first: int = 0) -> Figures:
    """Read `count` damaged files; the same numbers give the same files."""
    figures = Figures()
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as room:
        for seed in range(first, first + count):
            folder = Path(room) / "one"
            folder.mkdir()
            read_one(damaged(folder, random.Random(seed)), seed, figures)
            shutil.rmtree(folder)
    return figures


def main(count: int, first: int = 0) -> int:
    """Print the figures as JSON; exit code 1 when a reader did what it may not."""
    limit = 16 << 30  # a damaged length that asks for the whole memory is refused by the system, not by luck
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    datasets.disable_progress_bars()
    figures = fuzz(count, first)
    print(json.dumps(asdict(figures), indent=1))
    return int(bool(figures.failures))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
