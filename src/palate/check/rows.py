"""What is wrong, or odd, about the rows of a data set once they are tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from palate.data.encode import Encoding, TokenRow
from palate.data.segments import stop_tokens
from palate.models.tokenizer import Tokenizer
from palate.stages import _rows
from palate.stages._rows import Row

MANY_LEFT_OUT = 0.1
MOSTLY = 0.5


def answers(rows: Sequence[Row]) -> list[TokenRow]:
    """Every token row: a ranking has one for each of its answers."""
    return [one for row in rows for one in _rows.answers(row)]


def faults(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[str]:
    """What would teach a wrong thing in silence."""
    if tokenizer.pad == tokenizer.eos:
        return
    flat = answers(rows)
    ends = sum(row.tokens[-1] == tokenizer.pad for row in flat)
    if ends and any(len(_rows.answers(row)) > 1 for row in rows):
        yield (
            f"data: {ends:,} of {len(flat):,} answers end in the padding token {_spelled(tokenizer)}, so their reward "
            "would be read on padding. Take the padding out of the data."
        )
    elif ends:
        yield (
            f"data: {ends:,} of {len(flat):,} rows end in the padding token {_spelled(tokenizer)}, so padding would "
            "be trained. Take it out of the data."
        )


def warnings(rows: Sequence[Row], tokenizer: Tokenizer, encoding: Encoding, context: int, speaks: bool) -> list[str]:
    """What runs but may not be meant; `speaks` where the trained role writes answers."""
    flat = answers(rows)
    found: list[str] = []
    bos = tokenizer.bos if tokenizer.bos != tokenizer.eos else None
    double = sum(row.tokens.count(bos) > 1 for row in flat) if bos is not None else 0
    if double:
        found.append(f"data: {double:,} of {len(flat):,} rows hold the begin token more than once. Look at the texts.")
    padded = sum(tokenizer.pad in row.tokens for row in flat) if tokenizer.pad != tokenizer.eos else 0
    if padded:
        found.append(
            f"data: {padded:,} of {len(flat):,} rows hold the padding token {_spelled(tokenizer)} as text. "
            "Take it out of the data."
        )
    limit = min(encoding.max_length or context, context)
    ends = set(stop_tokens(tokenizer))
    cut = sum(len(row.tokens) >= limit and row.tokens[-1] not in ends for row in flat)
    if cut > MOSTLY * len(flat):
        found.append(
            f"encoding: {cut:,} of {len(flat):,} rows are cut at {limit:,} tokens and lose their end. "
            "Raise max_length, or set long_rows: drop."
        )
    if speaks and not any(_ends(row, ends) for row in flat):
        found.append(
            "encoding: no end token is trained in any row, so the model would not learn to stop. "
            "Set eos: true, or allow longer rows."
        )
    return found


def _ends(row: TokenRow, ends: set[int]) -> bool:
    return any(mark and token in ends for token, mark in zip(row.tokens, row.trained, strict=True))


def _spelled(tokenizer: Tokenizer) -> str:
    return tokenizer.decode([tokenizer.pad], skip_special=False)
