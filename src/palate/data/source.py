"""Sources: from a path, a hub id, a world or a weighted mixture to records on one side of a split by prompt."""

from __future__ import annotations

import glob
import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from palate.data.columnar import is_saved, read_hub, read_saved
from palate.data.containers import container, read_file
from palate.data.formats import BadRow, Row, named, read_rows
from palate.data.formats.row import listed
from palate.data.mixing import mix, split_by_prompt
from palate.data.pairing import pair_labels
from palate.data.queries import fill
from palate.randomness import key
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
    """New name: old name, or a text with {old} names in it: {prompt: question, completion: "It is {answer}"}; "" is an
    empty text."""

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
    """New name: old name, or a text with {old} names in it; "" is an empty text."""

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

    on_bad_row: Literal["fail", "skip"] = "fail"
    """What a row that cannot be read does: stop the run, or be left out, told and written to skipped_rows.jsonl."""

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

    part: Part
    records: list[Record] = field(default_factory=lambda: list[Record]())
    formats: list[str] = field(default_factory=lambda: list[str]())
    notes: list[str] = field(default_factory=lambda: list[str]())
    bad: list[BadRow] = field(default_factory=lambda: list[BadRow]())
    rows: int = 0
    """Rows met, the bad ones among them."""
    broken: PalateError | None = None
    """Why nothing could be read after the last row."""

    @property
    def skipped(self) -> str:
        """In words, which rows were left out; empty when none was."""
        if not self.bad:
            return ""
        count = f"{len(self.bad):,} of {self.rows:,} rows"
        return f"{count} of {self.part.path} were skipped, the first: {self.bad[0].message}"


def load(data: Data, seed: int, side: Side = "train") -> list[Record]:
    """The records of one side of the split; without `held_out` all of them are on the training side.

    The same settings and seed give the same records in the same order. Raises PalateError for whatever is wrong with
    the source, and when nothing is left. Rows that `on_bad_row: skip` leaves out are told in the log.
    """
    readings = read(data, seed)
    for reading in readings:
        if reading.bad:
            _log.warning("%s", reading.skipped)
    return arrange(data, readings, seed, side)


def read(data: Data, seed: int) -> list[Reading]:
    """What each part of the data holds, in the order of the source. Raises PalateError as `load` does."""
    tolerant = data.on_bad_row == "skip"
    readings = [read_part(part, data.rows, _key(data, seed), tolerant) for part in data.parts()]
    for reading in readings:
        if reading.broken:
            raise reading.broken
        if not reading.records:
            raise PalateError(reading.skipped or f"{reading.part.path}: no records. Give a source with at least one.")
        for note in reading.notes:
            _log.warning("%s", note)
    return readings


def arrange(data: Data, readings: Sequence[Reading], seed: int, side: Side = "train") -> list[Record]:
    """One side of the split of what was read, mixed and in the order of the seed."""
    mine = _key(data, seed)
    weights = [part.weight for part in data.parts()]
    records = mix([reading.records for reading in readings], weights, data.rows, data.shuffle, mine)
    if data.held_out and side != "all":
        train, held_out = split_by_prompt(records, data.held_out)
        records = train if side == "train" else held_out
    if data.pair_labels:
        return list(pair_labels(records, mine))
    return records


def _key(data: Data, seed: int) -> int:
    return key("data", data.seed if data.seed is not None else seed)


def read_part(part: Part, rows: int | None, seed: int, tolerant: bool = False) -> Reading:
    """All records of one part in the order of the source. `tolerant` keeps faults in the reading and raises none."""
    reading = Reading(part)
    if part.path.startswith("world:"):
        reading.records = _ask_world(part, rows, seed)
        reading.formats = [part.path]
        return reading
    try:
        for how, record in read_rows(_counted(part, reading), part.format, reading.bad if tolerant else None):
            reading.records.append(record)
            if how.name not in reading.formats:
                reading.formats.append(how.name)
                if how.note:
                    reading.notes.append(f"{part.path}: {how.note}.")
    except PalateError as fault:
        if not tolerant:
            raise
        reading.broken = fault
    return reading


def _counted(part: Part, reading: Reading) -> Iterator[Row | BadRow]:
    baseline = _baseline(part)
    for row in open_rows(part):
        reading.rows += 1
        yield row if isinstance(row, BadRow) else _as_asked(row, part, baseline)


def open_rows(part: Part) -> Iterator[Row | BadRow]:
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
    pattern = path / "**" / "*" if path.is_dir() else path
    if path.is_dir() and is_saved(path):
        return sorted(p for p in path.rglob("*") if p.is_file())
    if glob.has_magic(str(pattern)):
        files = sorted(p for p in _matching(pattern) if p.is_file() and container(p))
        if not files:
            raise PalateError(f"{part.path}: no data files found. Known endings: jsonl, json, csv, tsv, txt, parquet.")
        return files
    if _HUB_ID.fullmatch(part.path) and container(path) is None and not path.parent.is_dir():
        return []
    raise PalateError(f"{part.path}: no such file or folder.{_neighbour(path)} Check the path.")


def _matching(pattern: Path) -> Iterator[Path]:
    """Every path that fits a pattern. `**` enters each folder once, so links that form a loop end."""
    found = [Path(pattern.anchor)]
    for part in pattern.parts[len(found[0].parts) :]:
        if part == "**":
            found = [inner for outer in found for inner in _folders(outer)]
        elif glob.has_magic(part):
            found = [outer / name for outer in found for name in glob.glob(part, root_dir=outer)]
        else:
            found = [outer / part for outer in found]
    return (path for path in dict.fromkeys(found) if path.exists())


def _folders(top: Path) -> Iterator[Path]:
    """A folder and all below it, hidden ones left out."""
    seen: set[str] = set()
    for folder, inner, _ in os.walk(top, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        yield Path(folder)


def _neighbour(path: Path) -> str:
    return nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def _as_asked(row: Row, part: Part, baseline: Mapping[str, Any]) -> Row | BadRow:
    """A row with the columns called as the settings say, and the baseline's answer beside them."""
    columns = dict(row.columns)
    if baseline and "output_1" not in columns:
        columns["output_1"] = baseline.get(str(columns.get("instruction")))
    if not part.columns:
        return Row(columns, row.place)
    made: dict[str, Any] = {}
    for new, old in part.columns.items():
        try:
            made[new] = _renamed(old, columns)
        except PalateError as fault:
            return BadRow(row.place, f"columns.{new}: {fault}", columns)
    gone = {old for old in part.columns.values() if "{" not in old}
    return Row({**{k: v for k, v in columns.items() if k not in gone}, **made}, row.place)


def _renamed(old: str, columns: dict[str, Any]) -> Any:
    if "{" in old:
        return fill(old, columns)
    if not old and "" not in columns:
        return ""
    if old not in columns:
        hint = nearest(old, [str(c) for c in columns])
        raise PalateError(f"there is no column {old!r}.{hint} Known: {listed(columns)}.")
    return columns[old]


def _baseline(part: Part) -> dict[str, Any]:
    if "baseline" not in part.options:
        return {}
    answers: dict[str, Any] = {}
    for row in open_rows(Part(path=str(part.options["baseline"]))):
        if isinstance(row, BadRow):
            raise PalateError(row.message)
        answers[str(row.get("instruction"))] = row.columns.get("output_1", row.columns.get("output"))
    return answers


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
