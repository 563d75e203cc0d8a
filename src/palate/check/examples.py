"""Rows as they are trained on, decoded so that a person can see which tokens are trained and which are there."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from palate.batches import Tokens
from palate.check.found import Counts, Example, Piece
from palate.data.encode import RankedRow, TokenRow
from palate.data.encode_pairs import LabelRow, PairRow, RatedRow
from palate.models.tokenizer import Tokenizer

_PICTURES = {"\n": "⏎\n", "\t": "⇥"}


def example(
    title: str,
    ids: Sequence[int],
    trained: Sequence[bool],
    tokenizer: Tokenizer,
    pads: int = 0,
    reads: int | None = None,
    notes: Sequence[str] = (),
) -> Example:
    """One row for people; `pads` is how many cells of padding stand behind it in its batch."""
    counts = Counts(
        tokens=len(ids),
        trained=sum(trained),
        bos=_of(ids, tokenizer.bos),
        eos=_of(ids, tokenizer.eos),
        pad=pads,
    )
    pieces = tuple(_pieces(ids, trained, tokenizer))
    return Example(title, pieces, tuple(ids), tuple(trained), counts, reads, tuple(notes))


def token_row(title: str, row: TokenRow, tokenizer: Tokenizer, width: int) -> Example:
    """A demonstration in a batch of `width` columns."""
    return example(title, row.tokens, row.trained, tokenizer, max(0, width - len(row.tokens)))


def answer_rows(
    title: str, row: TokenRow | PairRow | LabelRow | RatedRow, tokenizer: Tokenizer, width: int
) -> list[Example]:
    """A row as it is trained on, each of its answers with what was said of it."""
    if isinstance(row, PairRow):
        said = [f"{title}, chosen", f"{title}, rejected"]
        shown = [token_row(name, one, tokenizer, width) for name, one in zip(said, row.rows, strict=True)]
        marks = [sum(mark) for mark in row.corrected or ()]
        notes = [f"{marked} of its tokens were changed by the correction" for marked in marks] or ["", ""]
        return [replace(one, notes=(*one.notes, note)) if note else one for one, note in zip(shown, notes, strict=True)]
    if isinstance(row, LabelRow):
        return [token_row(f"{title}, thumb {'up' if row.label else 'down'}", row.row, tokenizer, width)]
    if isinstance(row, RatedRow):
        return [token_row(f"{title}, rated {row.rating:g}", row.row, tokenizer, width)]
    return [token_row(title, row, tokenizer, width)]


def ranked_row(title: str, row: RankedRow, tokenizer: Tokenizer, width: int) -> list[Example]:
    """The best and the worst answer of a ranking, each with the token at which a reward model reads it."""
    order = sorted(range(len(row.rows)), key=lambda k: row.ranks[k])
    found: list[Example] = []
    for which, k in (("best", order[0]), ("worst", order[-1])):
        one, last = row.rows[k], len(row.rows[k].tokens) - 1
        spelled = spelling(tokenizer, one.tokens[last])
        note = f"read at its last real token, {last + 1} of {len(one.tokens)}: {spelled}"
        name = f"{title}, the {which} of {len(row.rows)} answers"
        pads = max(0, width - len(one.tokens))
        found.append(example(name, one.tokens, one.trained, tokenizer, pads, last, [note]))
    if len(order) > len(found):
        places = ", ".join(str(len(row.rows[k].tokens)) for k in order)
        found[-1] = replace(found[-1], notes=(*found[-1].notes, f"all answers, best first, are read at token {places}"))
    return found


def of_batch(batch: Tokens, tokenizer: Tokenizer) -> Counts:
    """The cells of a padded batch."""
    return Counts(
        tokens=int(batch.real_BT.sum()),
        trained=int(batch.action_BT.sum()),
        bos=_cells(batch, tokenizer.bos),
        eos=_cells(batch, tokenizer.eos),
        pad=int((~batch.real_BT).sum()),
    )


def _cells(batch: Tokens, token: int | None) -> int:
    hits_BT: Tensor = batch.tokens_BT == (-1 if token is None else token)
    return int((hits_BT & batch.real_BT).sum())


def _of(ids: Sequence[int], token: int | None) -> int:
    return 0 if token is None else list(ids).count(token)


def _pieces(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Runs of tokens that are alike; the text of a run is what it adds to the text of everything before it."""
    special = special_ids(tokenizer)
    start, before = 0, ""
    for end in range(1, len(ids) + 1):
        kind = (trained[start], ids[start] in special)
        if end < len(ids) and (trained[end], ids[end] in special) == kind:
            continue
        after = tokenizer.decode(ids[:end], skip_special=False)
        added = after[len(before) :] if after.startswith(before) else tokenizer.decode(ids[start:end], False)
        yield Piece(visible(added), kind[0], kind[1], end - start)
        start, before = end, after


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that stand for no text: begin, end, padding, turn marks."""
    own = [tokenizer.bos, tokenizer.eos, tokenizer.pad]
    return frozenset([*tokenizer.inner.all_special_ids, *(i for i in own if i is not None)])


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """One token in quotes, or as it is where it is special."""
    text = visible(tokenizer.decode([token], skip_special=False)).replace("\n", "")
    return text if token in special_ids(tokenizer) else f"'{text}'"


def visible(text: str) -> str:
    """Text with every character that would not show written out; a line break shows and still breaks."""
    return "".join(_PICTURES.get(c) or (c if c == " " or _shows(c) else _name(c)) for c in text)


def _shows(character: str) -> bool:
    return character.isprintable() and not unicodedata.combining(character)


def _name(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return character if unicodedata.combining(character) else f"‹U+{code:04X}›"
