"""Sources: from a path, a hub id, a world or a weighted mixture to records on one side of a split by prompt."""

from __future__ import annotations

import glob
import inspect
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from palate.data.containers import container, is_saved, read_file, read_hub, read_saved
from palate.data.formats import Row, named, read_rows
from palate.data.pairing import pair_labels
from palate.data.queries import fill
from palate.randomness import key, permutation, uniforms
from palate.records import Record
from palate.settings import PalateError, Settings, kinds, nearest

Side = Literal["train", "held_out", "all"]

DATA_FOLDER = "../shared/data"
"""What $PALATE_DATA in a path means when the variable is not set."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_log = logging.getLogger("palate.data")


class Part(Settings):
    """One source of rows."""

    path: str
    """A file, a folder, a pattern with *, a saved dataset, a hub id, or world:NAME/SHAPE; $PALATE_DATA is expanded."""

    format: str = "auto"
    """What the columns mean; auto decides by the first row. `palate list formats` shows the names."""

    columns: dict[str, str] = Field(default_factory=dict)
    """New name: old name, or a text with {old} names in it: {prompt: question, completion: "It is {answer}"}."""

    split: str = "train"
    """Which split of a hub id or a saved dataset."""

    subset: str | None = None
    """Which configuration of a hub id."""

    weight: float = Field(default=1.0, gt=0)
    """Share of a mixture that comes from here, relative to the other parts."""

    options: dict[str, Any] = Field(default_factory=dict)
    """What a world's generator takes beside shape, rows and seed; `baseline: FILE` for alpaca_eval preferences."""

    @model_validator(mode="after")
    def _know_the_format(self) -> Part:
        if self.format != "auto":
            try:
                named(self.format)
            except PalateError as fault:
                raise ValueError(str(fault)) from None
        return self


class Data(Settings):
    """Where records come from: one `path`, or a `mixture` of parts."""

    path: str | None = None
    """A file, a folder, a pattern with *, a saved dataset, a hub id, or world:NAME/SHAPE; $PALATE_DATA is expanded."""

    mixture: tuple[Part, ...] = ()
    """Several weighted parts instead of one path."""

    format: str = "auto"
    """What the columns mean; auto decides by the first row."""

    columns: dict[str, str] = Field(default_factory=dict)
    """New name: old name, or a text with {old} names in it."""

    split: str = "train"
    """Which split of a hub id or a saved dataset."""

    subset: str | None = None
    """Which configuration of a hub id."""

    options: dict[str, Any] = Field(default_factory=dict)
    """What a world's generator takes beside shape, rows and seed; `baseline: FILE` for alpaca_eval preferences."""

    rows: int | None = Field(default=None, ge=1)
    """At most this many records, before the split; for a world, how many to make; for a mixture, how many to draw."""

    seed: int | None = None
    """Fixes order, mixture and a world's draws; left out, the run's seed does. The split never depends on it."""

    shuffle: bool = True
    """Whether the records come in a random order, fixed by the seed."""

    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the prompts kept for evaluation: whole prompts and whole groups, never single rows."""

    pair_labels: bool = False
    """Make preference pairs of thumbs up and thumbs down for the same prompt, on each side of the split by itself."""

    @model_validator(mode="before")
    @classmethod
    def _a_path_alone(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_origin(self) -> Data:
        if (self.path is None) == (not self.mixture):
            raise ValueError("give either 'path' or 'mixture'.")
        for name in ("format", "columns", "split", "subset", "options") if self.mixture else ():
            if name in self.model_fields_set:
                raise ValueError(f"{name!r} belongs to each part of the mixture.")
        self.parts()
        return self

    def parts(self) -> tuple[Part, ...]:
        """The parts of the mixture; a single path is a mixture of one."""
        if self.path is None:
            return self.mixture
        taken = ("path", "format", "columns", "split", "subset", "options")
        return (Part(**{name: getattr(self, name) for name in taken}),)

    def files(self) -> list[str]:
        """The local files that are read, for caches that go by content."""
        local = [p for part in self.parts() if not part.path.startswith("world:") for p in _local_files(part)]
        return [str(p) for p in local]


@dataclass
class Reading:
    """Records of one part with what was noticed on the way."""

    records: list[Record] = field(default_factory=lambda: list[Record]())
    formats: list[str] = field(default_factory=lambda: list[str]())
    notes: list[str] = field(default_factory=lambda: list[str]())
    faults: list[PalateError] = field(default_factory=lambda: list[PalateError]())


def load(data: Data, seed: int, side: Side = "train") -> list[Record]:
    """The records of one side of the split; without `held_out` all of them are on the training side.

    The same settings and seed give the same records in the same order. Raises PalateError for whatever is wrong with
    the source, and when nothing is left.
    """
    mine = key("data", data.seed if data.seed is not None else seed)
    readings = [read_part(part, data.rows, mine) for part in data.parts()]
    for part, reading in zip(data.parts(), readings, strict=True):
        if not reading.records:
            raise PalateError(f"{part.path}: no records. Give a source with at least one.")
        for note in reading.notes:
            _log.warning("%s", note)
    records = mix([r.records for r in readings], data, mine)
    if data.held_out and side != "all":
        train, held_out = split_by_prompt(records, data.held_out)
        records = train if side == "train" else held_out
    if data.pair_labels:
        return list(pair_labels(records, mine))
    return records


def read_part(part: Part, rows: int | None, seed: int, tolerant: bool = False) -> Reading:
    """All records of one part in the order of the source. `tolerant` collects the faults of rows and goes on."""
    reading = Reading()
    if part.path.startswith("world:"):
        reading.records = _ask_world(part, rows, seed)
        reading.formats = [part.path]
        return reading
    found = read_rows(_renamed(part, open_rows(part)), part.format, reading.faults if tolerant else None)
    for how, record in found:
        reading.records.append(record)
        if how.name not in reading.formats:
            reading.formats.append(how.name)
            if how.note:
                reading.notes.append(f"{part.path}: {how.note}.")
    return reading


def open_rows(part: Part) -> Iterator[Row]:
    """The raw rows of a part, whatever it is kept in."""
    path = _expanded(part.path)
    if not glob.has_magic(str(path)) and path.is_dir() and is_saved(path):
        return read_saved(path, part.split)
    files = _local_files(part)
    if files:
        return (row for file in files for row in read_file(file))
    return read_hub(part.path, part.subset, part.split)


def _expanded(path: str) -> Path:
    if path.startswith("$PALATE_DATA"):
        path = os.environ.get("PALATE_DATA", DATA_FOLDER) + path.removeprefix("$PALATE_DATA")
    return Path(path).expanduser()


def _local_files(part: Part) -> list[Path]:
    """The files a path names, sorted; none for what looks like a hub id. PalateError where nothing is found."""
    path = _expanded(part.path)
    if path.is_file():
        return [path]
    pattern = str(path / "**" / "*") if path.is_dir() else str(path)
    if path.is_dir() and is_saved(path):
        return sorted(p for p in path.rglob("*") if p.is_file())
    if glob.has_magic(pattern):
        found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        files = [p for p in found if p.is_file() and container(p)]
        if not files:
            raise PalateError(f"{part.path}: no data files found. Known endings: jsonl, json, csv, tsv, txt, parquet.")
        return files
    if _HUB_ID.fullmatch(part.path) and container(path) is None and not path.parent.is_dir():
        return []
    raise PalateError(f"{part.path}: no such file or folder.{_neighbour(path)} Check the path.")


def _neighbour(path: Path) -> str:
    return nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _renamed(part: Part, rows: Iterator[Row]) -> Iterator[Row]:
    """Rows with the columns called as the settings say, and the baseline's answers beside them."""
    baseline = _baseline(part)
    for row in rows:
        columns = dict(row.columns)
        if baseline and "output_1" not in columns:
            columns["output_1"] = baseline.get(str(columns.get("instruction")))
        yield Row(_rename(row, columns, part.columns), row.place) if part.columns else Row(columns, row.place)


def _rename(row: Row, columns: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for new, old in names.items():
        if "{" in old:
            try:
                made[new] = fill(old, columns)
            except PalateError as fault:
                raise PalateError(f"{row.place}: columns.{new}: {fault}") from None
        elif old in columns:
            made[new] = columns[old]
        else:
            known = ", ".join(map(str, columns))
            hint = nearest(old, [str(c) for c in columns])
            raise PalateError(f"{row.place}: columns.{new}: there is no column {old!r}.{hint} Known: {known}.")
    gone = {old for old in names.values() if "{" not in old}
    return {**{k: v for k, v in columns.items() if k not in gone}, **made}


def _baseline(part: Part) -> dict[str, Any]:
    if "baseline" not in part.options:
        return {}
    rows = open_rows(Part(path=str(part.options["baseline"])))
    return {str(row.get("instruction")): row.columns.get("output_1", row.columns.get("output")) for row in rows}


def _ask_world(part: Part, rows: int | None, seed: int) -> list[Record]:
    name, _, shape = part.path.removeprefix("world:").partition("/")
    known = kinds("worlds")
    if name not in known or not shape:
        listed = ", ".join(known)
        raise PalateError(f"{part.path}: no such world.{nearest(name, known)} Write world:NAME/SHAPE. Known: {listed}.")
    if rows is None:
        raise PalateError(f"{part.path}: rows: a world needs to know how many to make. Set rows, for example 1000.")
    make = import_module(f"palate.worlds.{name}").records
    takes = inspect.signature(make)
    try:
        takes.bind(shape, rows, seed, **part.options)
    except TypeError as fault:
        raise PalateError(f"{part.path}: options: {fault}. Known: {', '.join(takes.parameters)}.") from None
    try:
        return list(make(shape, rows, seed, **part.options))
    except ValueError as fault:
        raise PalateError(f"{part.path}: {fault}") from None


def mix(pools: list[list[Record]], data: Data, seed: int) -> list[Record]:
    """One list out of the parts' records.

    Place i of a mixture takes its part by the i-th number of a counter, in proportion to the weights, and the next
    record of that part. With `rows` a part that runs dry starts over in a new order; without, the mixture ends there.
    """
    weights = np.array([part.weight for part in data.parts()])
    edges = np.cumsum(weights / weights.sum())
    orders = [_walk(pool, data, seed, number) for number, pool in enumerate(pools)]
    if len(pools) == 1:
        return orders[0].once(data.rows)
    counter = np.array([key(seed, "mixture")], dtype=np.uint64)
    mixed: list[Record] = []
    while data.rows is None or len(mixed) < data.rows:
        place = uniforms(counter, len(mixed))[0]
        order = orders[min(int(np.searchsorted(edges, place, side="right")), len(orders) - 1)]
        if data.rows is None and order.dry:
            break
        mixed.append(order.next())
    return mixed


@dataclass
class _Walk:
    """A part's records in order, and again in another order after the last one."""

    pool: list[Record]
    shuffled: bool
    seed: int
    number: int
    taken: int = 0
    order: list[int] = field(default_factory=lambda: list[int]())

    @property
    def dry(self) -> bool:
        return self.taken >= len(self.pool)

    def next(self) -> Record:
        turn, place = divmod(self.taken, len(self.pool))
        if place == 0:
            count = len(self.pool)
            fresh = permutation(count, self.seed, "order", self.number, turn)
            self.order = fresh if self.shuffled else list(range(count))
        self.taken += 1
        return self.pool[self.order[place]]

    def once(self, rows: int | None) -> list[Record]:
        return [self.next() for _ in range(min(len(self.pool), rows or len(self.pool)))]


def _walk(pool: list[Record], data: Data, seed: int, number: int) -> _Walk:
    return _Walk(pool, data.shuffle, seed, number)


def split_by_prompt(records: list[Record], share: float) -> tuple[list[Record], list[Record]]:
    """(train, held out): all records of one prompt or group land on one side.

    A side is a pure function of the prompt's key, so every stage of every run holds out the same prompts. When chance
    leaves a side empty, the prompt nearest to the border crosses it; a single prompt cannot be split.
    """
    names = list({record.key for record in records})
    places = uniforms(np.array([key("held out", name) for name in names], dtype=np.uint64), 0)
    if len(names) < 2:
        raise PalateError("held_out: all records belong to one prompt, which cannot be split. Set held_out: 0.")
    border = min(max(share, np.nextafter(places.min(), 1)), places.max())
    held = {name for name, place in zip(names, places, strict=True) if place < border}
    return [r for r in records if r.key not in held], [r for r in records if r.key in held]
