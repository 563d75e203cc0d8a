"""Encoding for preference methods: pairs, thumbs, ratings and corrections to token rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from palate.data.encode import (
    Encoded,
    Encoder,
    Encoding,
    LeftOut,
    TokenRow,
    called,
    each,
)
from palate.data.segments import Speaker
from palate.records import Correction, Demonstration, Ranking, Rated, Record, Unpaired
from palate.settings import PalateError


@dataclass(frozen=True)
class PairRow:
    """A chosen and a rejected answer as whole rows, marked on their answer tokens.

    `probability` is how likely chosen is the better one. `corrected` marks, for each of the two, the tokens that a
    correction changed (nothing where there was none). `reference` are the reference's log-probabilities of each row's
    tokens, once they were computed.
    """

    chosen: TokenRow
    rejected: TokenRow
    probability: float = 1.0
    margin: float | None = None
    corrected: tuple[list[bool], list[bool]] | None = None
    reference: tuple[list[float], ...] | None = None

    @property
    def rows(self) -> list[TokenRow]:
        """Both answers, the chosen one first."""
        return [self.chosen, self.rejected]


@dataclass(frozen=True)
class LabelRow:
    """An answer with a thumb up (True) or down."""

    row: TokenRow
    label: bool
    reference: tuple[list[float], ...] | None = None

    @property
    def rows(self) -> list[TokenRow]:
        """The one answer."""
        return [self.row]


@dataclass(frozen=True)
class RatedRow:
    """A sequence of actions (the trained tokens) and what it earned, given on its last action."""

    row: TokenRow
    rating: float
    reference: tuple[list[float], ...] | None = field(default=None)

    @property
    def rows(self) -> list[TokenRow]:
        """The one sequence."""
        return [self.row]


def encode_pairs(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[PairRow]:
    """Every comparable pair of each ranking (all C(K, 2) of them; ties are left out)."""
    encoder = Encoder(speaker, encoding, context)

    def one(record: Record) -> list[PairRow]:
        ranked = encoder.ranking(record)
        assert isinstance(record, Ranking)
        pairs = record.pairs
        if not pairs:
            raise LeftOut("rankings whose answers all tie")
        sure = 1.0 if record.probability is None else record.probability
        return [PairRow(ranked.rows[i], ranked.rows[j], sure, record.margin) for i, j in pairs]

    found = each(records, one)
    return Encoded([pair for pairs in found.rows for pair in pairs], found.left_out)


def encode_labels(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[LabelRow]:
    """Answers with thumbs; a pair of answers becomes one thumb up and one thumb down."""
    encoder = Encoder(speaker, encoding, context)

    def one(record: Record) -> list[LabelRow]:
        if isinstance(record, Ranking) and len(record.pairs) == 1:
            ((good, bad),) = record.pairs
            rows = encoder.ranking(record).rows
            return [LabelRow(rows[good], True), LabelRow(rows[bad], False)]
        if not isinstance(record, Unpaired):
            raise PalateError(f"expected answers with labels, got {called(record)}. Name data of another format.")
        return [LabelRow(encoder.answer(record.prompt, record.completion), record.label)]

    found = each(records, one)
    return Encoded([row for rows in found.rows for row in rows], found.left_out)


def encode_returns(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[RatedRow]:
    """Rated answers; in a conversation every assistant turn is an action (`loss_on`), the rating is its return."""
    encoder = Encoder(speaker, encoding, context)

    def one(record: Record) -> RatedRow:
        if not isinstance(record, Rated):
            raise PalateError(f"expected answers with ratings, got {called(record)}. Name data of another format.")
        said = Demonstration(record.prompt, record.columns, record.group, completion=record.completion)
        return RatedRow(encoder.demonstration(said), record.rating)

    return each(records, one)


def encode_corrections(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[PairRow]:
    """Corrected answers (chosen) beside the originals (rejected), marked where the correction changed tokens.

    The marks come from a difference of the two token sequences (RLHF-V's `difflib` alignment, blocks of at least three
    tokens kept equal).
    """
    encoder = Encoder(speaker, encoding, context)

    def one(record: Record) -> PairRow:
        if not isinstance(record, Correction):
            raise PalateError(f"expected corrected answers, got {called(record)}. Name data of another format.")
        chosen = encoder.answer(record.prompt, record.corrected)
        rejected = encoder.answer(record.prompt, record.original)
        return PairRow(chosen, rejected, corrected=changed(chosen, rejected))

    return each(records, one)


def changed(chosen: TokenRow, rejected: TokenRow) -> tuple[list[bool], list[bool]]:
    """Which answer tokens of each row the other one replaced or lacks."""
    marks = ([False] * len(chosen.tokens), [False] * len(rejected.tokens))
    places = [[t for t, said in enumerate(row.trained) if said] for row in (chosen, rejected)]
    said = [[row.tokens[t] for t in at] for row, at in zip((chosen, rejected), places, strict=True)]
    for spans, mark, at in zip(_spans(*said), marks, places, strict=True):
        for start, end in spans:
            for t in at[start:end]:
                mark[t] = True
    return marks


def _spans(first: Sequence[int], second: Sequence[int]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for kind, a, b, c, d in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if kind != "equal":
            found[0].append((a, b))
            found[1].append((c, d))
    return found
