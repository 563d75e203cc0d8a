"""Encoding for preference methods: pairs, thumbs, ratings and corrections to token rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

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
from palate.records import Correction, Demonstration, Ranking, Rated, Record, Text, Unpaired, text_of
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
        for i, name in enumerate(_titles(record)):
            _require_words(record, name, record.completions[i])
        sure = 1.0 if record.probability is None else record.probability
        return [PairRow(ranked.rows[i], ranked.rows[j], sure, record.margin) for i, j in pairs]

    given = list(records)
    _require_prompts(given)
    found = each(given, one)
    return Encoded([pair for pairs in found.rows for pair in pairs], found.left_out)


def _require_prompts(records: Sequence[Record]) -> None:
    """Refuse records whose answers share no beginning among others that have a prompt: two texts about two things.

    Where no record has a prompt there is none to be had, and answers of one text are told apart elsewhere.
    """
    told = [(n, r) for n, r in enumerate(records) if isinstance(r, Ranking) and "prompt_tokens" not in r.columns]
    bare = [(n, r) for n, r in told if not r.prompt and len(set(r.completions)) > 1]
    if bare and len(bare) < len(told):
        number, first = bare[0]
        raise PalateError(
            f"record {number} ({text_of(first.completions[0])[:40]!r}): its answers share no prompt, as in "
            f"{len(bare):,} of {len(told):,} records. Both must begin alike; mend or remove such rows."
        )


def _titles(record: Ranking) -> list[str]:
    """What each answer of a ranking is called to people."""
    if record.pairs == [(0, 1)] and len(record.completions) == 2:
        return ["the chosen answer", "the rejected answer"]
    return [f"answer {i}" for i in range(len(record.completions))]


def _require_words(record: Record, name: str, said: Text) -> None:
    """Refuse an answer that says nothing; one stored as tokens is looked at elsewhere."""
    words = said if isinstance(said, str) else "".join(turn.content for turn in said)
    if "completion_tokens" not in record.columns and not words.strip():
        raise PalateError(f"{name} is empty, so it teaches nothing. Remove the row; `palate data check` counts them.")


def encode_labels(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[LabelRow]:
    """Answers with thumbs; a pair of answers becomes one thumb up and one thumb down."""
    encoder = Encoder(speaker, encoding, context)

    def one(record: Record) -> list[LabelRow]:
        if isinstance(record, Ranking) and len(record.pairs) == 1:
            ((good, bad),) = record.pairs
            rows = encoder.ranking(record).rows
            for i, name in enumerate(_titles(record)):
                _require_words(record, name, record.completions[i])
            return [LabelRow(rows[good], True), LabelRow(rows[bad], False)]
        if not isinstance(record, Unpaired):
            raise PalateError(f"expected answers with labels, got {called(record)}. Name data of another format.")
        _require_words(record, "the answer", record.completion)
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
        _require_words(record, "the answer", record.completion)
        said = Demonstration(record.prompt, record.columns, record.group, completion=record.completion)
        return RatedRow(encoder.demonstration(said), record.rating)

    return each(records, one)


def encode_corrections(
    records: Iterable[Record],
    speaker: Speaker,
    encoding: Encoding,
    context: int | None = None,
    insertions: bool = True,
) -> Encoded[PairRow]:
    """Corrected answers (chosen) beside the originals (rejected), marked where the correction changed tokens.

    The marks of the corrected answer are its annotated spans where it has some. All others come from a difference of
    the two token sequences (`changed`). A preference pair is read as a correction of its rejected answer.
    """
    encoder = Encoder(speaker, encoding, context)

    def one(record: Record) -> PairRow:
        told = _as_correction(record)
        _require_words(record, "the corrected answer", told.corrected)
        _require_words(record, "the original answer", told.original)
        chosen = encoder.answer(told.prompt, told.corrected)
        rejected = encoder.answer(told.prompt, told.original)
        marks, others = changed(chosen, rejected, insertions)
        if told.spans:
            marks = _annotated(chosen, told, speaker)
        return PairRow(chosen, rejected, corrected=(marks, others))

    return each(records, one)


def encode_replacements(
    records: Iterable[Record], speaker: Speaker, encoding: Encoding, context: int | None = None
) -> Encoded[PairRow]:
    """As `encode_corrections`, but what was only inserted or only left out is not marked."""
    return encode_corrections(records, speaker, encoding, context, insertions=False)


def _as_correction(record: Record) -> Correction:
    if isinstance(record, Ranking) and len(record.pairs) == 1:
        ((good, bad),) = record.pairs
        said = record.completions
        return Correction(record.prompt, record.columns, record.group, original=said[bad], corrected=said[good])
    if not isinstance(record, Correction):
        raise PalateError(f"expected corrected answers, got {called(record)}. Name data of another format.")
    return record


def _annotated(chosen: TokenRow, told: Correction, speaker: Speaker) -> list[bool]:
    """Which tokens of the corrected answer have a character inside one of its spans."""
    text = told.corrected if isinstance(told.corrected, str) else told.corrected[-1].content
    for i, (start, end) in enumerate(told.spans):
        if not 0 <= start <= end <= len(text):
            raise PalateError(
                f"spans[{i}]: it runs from {start} to {end}, outside the corrected answer of {len(text)} characters. "
                "Count characters of `corrected` from 0."
            )
    places = [t for t, said in enumerate(chosen.trained) if said]
    ends = _ends([chosen.tokens[t] for t in places], speaker)
    whole = speaker.decode([chosen.tokens[t] for t in places], skip_special=False)
    first = whole.find(text)
    if first < 0:  # a row that was cut holds the text's beginning alone
        first = next(i for i in range(len(whole) + 1) if text.startswith(whole[i:]))
    if first == len(whole):
        raise PalateError("spans: the tokenizer changes this answer's text. Leave spans out, for a difference instead.")
    marks = [False] * len(chosen.tokens)
    for t, before, end in zip(places, [0, *ends], ends, strict=False):
        start = min(before, end - 1)  # the later bytes of a character add nothing to the text, and belong to it
        marks[t] = any(start < first + stop and first + begin < end for begin, stop in told.spans if begin < stop)
    return marks


def _ends(tokens: Sequence[int], speaker: Speaker) -> list[int]:
    """Where each token's text ends in the text of them all."""
    alone = [speaker.decode([t], skip_special=False) for t in tokens]
    if "".join(alone) == speaker.decode(tokens, skip_special=False):
        return list(accumulate(len(piece) for piece in alone))
    return [len(speaker.decode(tokens[: n + 1], skip_special=False)) for n in range(len(tokens))]


def changed(chosen: TokenRow, rejected: TokenRow, insertions: bool = True) -> tuple[list[bool], list[bool]]:
    """Which answer tokens of each row the other one replaced or, with `insertions`, lacks altogether.

    Only runs of three tokens or more that both have in common count as unchanged, as in RLHF-V's released code: a
    comma in the middle of another sentence is chance. The released code leaves insertions out.
    """
    marks = ([False] * len(chosen.tokens), [False] * len(rejected.tokens))
    places = [[t for t, said in enumerate(row.trained) if said] for row in (chosen, rejected)]
    said = [[row.tokens[t] for t in at] for row, at in zip((chosen, rejected), places, strict=True)]
    for mine, theirs in _spans(*said):
        if insertions or (mine and theirs):
            for mark, at, span in zip(marks, places, (mine, theirs), strict=True):
                for i in span:
                    mark[at[i]] = True
    return marks


_LEAST_MATCH = 3
"""Tokens in a row that have to be the same."""


def _spans(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[range, range]]:
    """What lies between the runs that both have in common, in each of them; one side may be empty."""
    i = j = 0
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    for block in blocks:
        last = block.a == len(first) and block.b == len(second)
        if block.size >= _LEAST_MATCH or last:
            if i < block.a or j < block.b:
                yield range(i, block.a), range(j, block.b)
            i, j = block.a + block.size, block.b + block.size
