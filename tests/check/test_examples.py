"""Decoded rows: every token is there, marked as it is trained, and nothing is invisible."""

from __future__ import annotations

from pathlib import Path

import pytest

from palate.check import examples
from palate.check.found import RecipeFound
from palate.data import collate
from palate.data.encode import Encoding, TokenRow, encode_demonstrations, encode_rankings
from palate.models.load import load
from palate.models.tokenizer import Tokenizer
from palate.records import Demonstration, Ranking


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load(model).tokenizer


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", "a⏎\nb"),
        ("a\tb", "a⇥b"),
        ("bell\x07", "bell␇"),
        ("\x1b[31mred", "␛[31mred"),
        ("left\u202eright", "left‹U+202E›right"),
        ("no\u00a0break", "no‹U+00A0›break"),
        ("zero\u200bwidth", "zero‹U+200B›width"),
        ("é, e\u0301 and 漢字", "é, e\u0301 and 漢字"),
        ("plain words", "plain words"),
    ],
)
def test_nothing_is_invisible(text: str, shown: str) -> None:
    assert examples.visible(text) == shown


def test_marks_are_the_action_mask(tokenizer: Tokenizer) -> None:
    records = [
        Demonstration("say 1:", completion=" 1."),
        Demonstration("tell:\n", completion=" a longer answer\twith it"),
    ]
    rows = encode_demonstrations(records, tokenizer, Encoding()).rows
    batch = collate.examples(rows, tokenizer.pad)
    width = batch.tokens_BT.shape[1]
    for i, row in enumerate(rows):
        one = examples.token_row("row", row, tokenizer, width)
        real = batch.real_BT[i]
        assert list(one.trained) == batch.action_BT[i][real].tolist()
        assert list(one.ids) == batch.tokens_BT[i][real].tolist()
        assert one.counts.pad == int((~real).sum())
        assert one.counts.trained == int(batch.action_BT[i].sum())
        assert sum(piece.tokens for piece in one.pieces) == len(row.tokens)
        trained = sum(piece.tokens for piece in one.pieces if piece.trained)
        assert trained == one.counts.trained
        spelled = tokenizer.decode(row.tokens, skip_special=False)
        assert "".join(piece.text for piece in one.pieces) == examples.visible(spelled)
    assert examples.of_batch(batch, tokenizer).eos == 2
    assert examples.of_batch(batch, tokenizer).pad == int((~batch.real_BT).sum())


def test_padding_is_counted_by_the_mask_and_not_by_its_id(tokenizer: Tokenizer) -> None:
    """A padded cell may hold any id, the end token's too."""
    assert tokenizer.eos is not None
    rows = [TokenRow([5, 6, tokenizer.eos], [False, True, True]), TokenRow([5], [False])]
    batch = collate.examples(rows, pad=tokenizer.eos)
    counts = examples.of_batch(batch, tokenizer)
    assert (counts.tokens, counts.trained, counts.eos, counts.pad) == (4, 2, 1, 2)


def test_special_tokens_are_counted_and_apart(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos is not None
    assert tokenizer.eos is not None
    ids = [tokenizer.bos, *tokenizer.encode("say"), tokenizer.eos, tokenizer.eos]
    one = examples.example("row", ids, [False] * len(ids), tokenizer, pads=3)
    assert (one.counts.bos, one.counts.eos, one.counts.pad) == (1, 2, 3)
    assert [(piece.text, piece.special) for piece in one.pieces] == [
        ("<bos>", True),
        ("say", False),
        ("<eos><eos>", True),
    ]


def test_a_split_character_stays_whole_inside_a_piece(tokenizer: Tokenizer) -> None:
    """Byte-level tokens may hold a part of a character; a run is decoded as one."""
    ids = tokenizer.encode("漢字")
    assert len(ids) > 2
    (piece,) = examples.example("row", ids, [True] * len(ids), tokenizer).pieces
    assert piece.text == "漢字"


def test_each_ranked_answer_is_read_at_its_last_real_token(tokenizer: Tokenizer) -> None:
    ranking = Ranking("say 1:", completions=(" no", " 1.", " perhaps one"), ranks=(2, 0, 1))
    (row,) = encode_rankings([ranking], tokenizer, Encoding()).rows
    best, worst = examples.ranked_row("row", row, tokenizer, 40)
    assert "the best of 3 answers" in best.title
    assert list(best.ids) == row.rows[1].tokens
    assert list(worst.ids) == row.rows[0].tokens
    assert best.reads == len(best.ids) - 1
    assert best.ids[best.reads] == tokenizer.eos
    lengths = ", ".join(str(len(row.rows[k].tokens)) for k in (1, 2, 0))
    assert worst.notes[-1] == f"all answers, best first, are read at token {lengths}"


def test_the_place_read_is_never_padding(tokenizer: Tokenizer) -> None:
    row = TokenRow(tokenizer.encode("say 1: 1"), [False] * 3 + [True] * (len(tokenizer.encode("say 1: 1")) - 3))
    one = examples.token_row("row", row, tokenizer, 20)
    assert one.counts.pad == 20 - len(row.tokens)
    assert one.counts.tokens == len(row.tokens)


def test_answers_of_a_check_say_where_they_begin_and_where_the_score_lands(seen: RecipeFound) -> None:
    one = seen.stages[2].seen.examples[0]
    begins = one.trained.index(True)
    said = sum(one.trained)
    assert one.notes[0].startswith(f"the answer begins at token {begins + 1}, has {said} tokens")
    assert one.reads == len(one.ids) - 1
    assert any(note.startswith("reward model is read at its token") for note in one.notes)
    full = (
        "cut at max_new_tokens" in one.notes[0]
    )  # score_position: after; an answer of full length keeps it on its last
    assert one.notes[1].startswith("the score lands on token" if full else "the score lands on the state after token")
