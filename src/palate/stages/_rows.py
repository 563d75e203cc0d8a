"""From a stage's data settings to token rows and batches, for each shape of record an algorithm may read."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palate.batches import Rows
from palate.data import collate, source
from palate.data.encode import (
    Encoding,
    PromptRow,
    RankedRow,
    TokenRow,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
)
from palate.data.encode_pairs import (
    LabelRow,
    PairRow,
    RatedRow,
    encode_corrections,
    encode_labels,
    encode_pairs,
    encode_replacements,
    encode_returns,
)
from palate.data.source import Data
from palate.models.tokenizer import Tokenizer
from palate.records import Record, Text, text_of
from palate.workspace import Workspace

Row = TokenRow | RankedRow | PairRow | LabelRow | RatedRow

_ENCODERS: dict[str, Callable[..., Any]] = {
    "demonstrations": encode_demonstrations,
    "rankings": encode_rankings,
    "pairs": encode_pairs,
    "labels": encode_labels,
    "returns": encode_returns,
    "corrections": encode_corrections,
    "replacements": encode_replacements,
}
_COLLATORS: dict[type, Callable[..., Rows]] = {
    TokenRow: collate.examples,
    RankedRow: collate.comparisons,
    PairRow: collate.pairs,
    LabelRow: collate.labelled,
    RatedRow: collate.trajectories,
}


SKIPPED = "skipped_rows.jsonl"
"""The file of a stage's folder that holds the rows `on_bad_row: skip` left out."""


def read(data: Data, here: Workspace) -> tuple[list[Record], list[Record]]:
    """The records to train on and the held-out ones (none when nothing is held out)."""
    readings = _told(data, here)
    train = source.arrange(data, readings, here.seed)
    return train, source.arrange(data, readings, here.seed, "held_out") if data.held_out else []


def read_side(data: Data, here: Workspace, side: source.Side) -> list[Record]:
    """The records of one side of the split."""
    return source.arrange(data, _told(data, here), here.seed, side)


def _told(data: Data, here: Workspace) -> list[source.Reading]:
    """What the data holds; rows that were skipped are counted, told once and written aside."""
    readings = source.read(data, here.seed)
    for reading in readings:
        if reading.bad:
            aside = here.folder / SKIPPED
            _write_aside(aside, reading)
            here.warn(f"{reading.skipped}; they are in {aside}")
    return readings


def _write_aside(path: Path, reading: source.Reading) -> None:
    """The bad rows of one source, beside those of other sources; a stage that starts again writes the same file."""
    origin = reading.part.path
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["source"] != origin]
    mine = [{"source": origin, "place": r.place, "fault": r.fault, "row": r.raw} for r in reading.bad]
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text("".join(f"{line}\n" for line in [*kept, *(json.dumps(row, default=str) for row in mine)]))
    os.replace(written, path)


def encode(
    records: Sequence[Record], reads: str, tokenizer: Tokenizer, encoding: Encoding, context: int, here: Workspace
) -> list[Row]:
    """Token rows of records of the shape `reads`; what was left out is said, never silent."""
    if not records:
        return []
    found = _ENCODERS[reads](records, tokenizer, encoding, context)
    if found.left_out:
        here.warn(found.summary)
    return found.rows


def surveyed(rows: Sequence[Row], survey: Callable[[Sequence[Row]], Sequence[Row]], here: Workspace) -> Sequence[Row]:
    """The rows as an algorithm's survey of them leaves them; what it warns of (`warnings.warn`) is said to the user."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        found = survey(rows)
    for one in said:
        here.warn(str(one.message))
    return found


def held_like(
    held: Sequence[Row], rows: Sequence[Row], found: Sequence[Row], survey: Callable[[Sequence[Row]], Sequence[Row]]
) -> Sequence[Row]:
    """Held-out rows on the scale of the training rows, where the survey put these (`rows`, now `found`) on another.

    They are surveyed behind the training rows, so that a few of them need no scale of their own.
    """
    return held if found is rows or not held else survey([*rows, *held])[len(found) :]


def prompts(
    records: Sequence[Record], tokenizer: Tokenizer, encoding: Encoding, room: int, here: Workspace
) -> list[PromptRow]:
    """Prompts of at most `room` tokens."""
    found = encode_prompts(records, tokenizer, encoding, room)
    if found.left_out:
        here.warn(found.summary)
    return found.rows


def enough(prompts: list[PromptRow], count: int) -> list[PromptRow]:
    """The prompts, repeated until there are `count`; a repetition has a key of its own, so its answer is another."""
    turns = -(-count // len(prompts))
    return [replace(p, key=f"{p.key}+{turn}") if turn else p for turn in range(turns) for p in prompts]


def length(row: Row) -> int:
    """Tokens of its longest answer, prompt included."""
    return max(len(one.tokens) for one in answers(row))


def answers(row: Row) -> list[TokenRow]:
    """The token rows of a row: one, or one for each of its answers."""
    return [row] if isinstance(row, TokenRow) else row.rows


def batch(rows: Sequence[Row], pad: int) -> Rows:
    """Rows as one batch, padded on the right."""
    return _COLLATORS[type(rows[0])](rows, pad)


def texts(records: Iterable[Record]) -> list[str]:
    """Every text of the records, for training a tokenizer from nothing."""
    found: list[str] = []
    for record in records:
        found.append(text_of(record.prompt))
        said: list[Text] = [getattr(record, "completion", ""), *getattr(record, "completions", ())]
        found += [text_of(one) for one in said]
    return [text for text in found if text]
