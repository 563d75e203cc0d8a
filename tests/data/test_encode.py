"""Encoding: the mask is exact, the prompt's ids are the rollout's, lengths are kept, nothing is silent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.data.encode import (
    Encoding,
    encode_demonstrations,
    encode_prompts,
    encode_rankings,
    trained_counts,
)
from palate.data.queries import TLDR_FORMAT, fill
from palate.models.tokenizer import train_bpe
from palate.records import Demonstration, Message, Prompt, Ranking, Unpaired, preference
from palate.settings import PalateError

TEXTS = ["User: hello there\nAssistant: good day to you, and good night", "the soup is warm. the bread is old."]
TOKENIZER = train_bpe(TEXTS * 3, 320)
BOS, EOS = TOKENIZER.bos, TOKENIZER.eos

words = st.text(alphabet="abc d.\n茶ü", max_size=12)
turn_texts = st.lists(words, min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0)


def talk(*said):
    return tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(said))


def row_of(record, **settings):
    (row,) = encode_demonstrations([record], TOKENIZER, Encoding(**settings)).rows
    return row


def trained_text(row):
    return TOKENIZER.decode([t for t, on in zip(row.tokens, row.trained, strict=True) if on], skip_special=False)


@given(words, words)
def test_text_trains_exactly_the_answer_and_its_end(prompt, completion):
    row = row_of(Demonstration(prompt, completion=completion))
    assert trained_text(row) == completion + "<eos>"
    assert row.tokens[-1] == EOS
    start = TOKENIZER.encode(prompt) or [BOS]
    assert row.tokens[: len(start)] == start


@given(turn_texts)
def test_conversations_train_exactly_the_assistant_turns(said):
    record = Demonstration(talk(*said[:-1]), completion=talk(*said)[-1:])
    every = "".join(f" {text}<eos>" for text in said[1::2])
    assert trained_text(row_of(record)) == every
    assert trained_text(row_of(record, loss_on="last")) == f" {said[-1]}<eos>"
    row = row_of(record, loss_on="all")
    assert row.trained == [False] + [True] * (len(row.tokens) - 1)
    assert TOKENIZER.decode(row.tokens, skip_special=False) == TOKENIZER.render(talk(*said), False)


@given(turn_texts, st.booleans())
def test_prompt_ids_in_training_are_the_prompt_ids_at_rollout(said, plain):
    prompt, completion = (said[0], said[1]) if plain else (talk(*said[:-1]), talk(*said)[-1:])
    if not prompt:
        return
    (asked,) = encode_prompts([Prompt(prompt)], TOKENIZER, Encoding()).rows
    row = row_of(Demonstration(prompt, completion=completion))
    assert row.tokens[: len(asked.tokens)] == asked.tokens
    (ranked,) = encode_rankings([preference(prompt, completion, completion)], TOKENIZER, Encoding()).rows
    assert [r.tokens for r in ranked.rows] == [row.tokens, row.tokens]


def test_rankings_mark_only_the_answers():
    record = Ranking(talk("a", "b", "c"), {}, "g", (talk("", "x")[1:], talk("", "yy")[1:]), (1, 0), 2.5)
    (ranked,) = encode_rankings([record], TOKENIZER, Encoding(loss_on="all")).rows
    assert [trained_text(r) for r in ranked.rows] == [" x<eos>", " yy<eos>"]
    assert (ranked.prompt_key, ranked.ranks, ranked.margin) == ("g", [1, 0], 2.5)


@pytest.mark.parametrize("text", ["soup", "<bos>soup", "<bos><bos>soup"])
def test_the_begin_token_is_there_once_or_not_at_all(text):
    row = row_of(Demonstration(text, completion="<bos>x"), bos=True)
    assert row.tokens.count(BOS) == 1
    assert row.tokens[0] == BOS
    assert trained_text(row) == "x<eos>"
    assert row_of(Demonstration("soup", completion="x")).tokens.count(BOS) == 0


def test_a_tokenizer_that_begins_by_itself_is_followed():
    from tokenizers.processors import TemplateProcessing

    own = train_bpe(TEXTS, 300)
    own.inner.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", own.bos)]
    )
    (row,) = encode_demonstrations([Demonstration("a", completion="b")], own, Encoding()).rows
    assert row.tokens == [own.bos, *own.encode("a"), *own.encode("b"), own.eos]


def test_the_end_token_is_not_doubled_and_can_be_left_out():
    assert trained_text(row_of(Demonstration("a", completion="b<eos>"))) == "b<eos>"
    assert trained_text(row_of(Demonstration("a", completion="b"), eos=False)) == "b"


@pytest.mark.parametrize(("summary", "expected"), [("short", " short<eos>"), (" short", " short<eos>")])
def test_leading_space_of_references(summary, expected):
    assert trained_text(row_of(Demonstration("q", completion=summary), leading_space=True)) == expected


def test_long_rows_are_cut_dropped_or_refused():
    record = Demonstration("a", completion="b c d e f g")
    whole = row_of(record)
    cut = row_of(record, max_length=4)
    assert cut.tokens == whole.tokens[:4]
    assert EOS not in cut.tokens
    both = [record, Demonstration("a", completion="b")]
    assert encode_demonstrations(both, TOKENIZER, Encoding(max_length=4, long_rows="drop")).summary == (
        "left out 1 of 2 records: 1 rows longer than 4 tokens"
    )
    with pytest.raises(PalateError, match=r"record 0 \('a'\): the row has \d+ tokens, 4 fit"):
        row_of(record, max_length=4, long_rows="refuse")
    assert len(encode_demonstrations([record], TOKENIZER, Encoding(), context=3).rows[0].tokens) == 3


def test_rows_without_a_trained_token_are_counted_or_refused():
    records = [Demonstration("a b c d e f", completion="x"), Demonstration("a", completion="x")]
    encoded = encode_demonstrations(records, TOKENIZER, Encoding(max_length=4))
    assert len(encoded.rows) == 1
    assert encoded.left_out == {"rows without a trained token": 1}
    assert trained_counts(records, TOKENIZER, Encoding(max_length=4)) == [0, 2]
    with pytest.raises(PalateError, match="no token of this row would be trained"):
        encode_demonstrations(records, TOKENIZER, Encoding(max_length=4, untrained="refuse"))
    with pytest.raises(PalateError, match="no record is left to train on: 1 rows without"):
        encode_demonstrations(records[:1], TOKENIZER, Encoding(max_length=4))


def test_long_prompts():
    prompt = "a b c d e f g h"
    ids = TOKENIZER.encode(prompt)

    def asked(how, **more):
        encoding = Encoding(max_prompt_length=4, long_prompts=how, **more)
        return encode_prompts([Prompt(prompt), Prompt("a")], TOKENIZER, encoding)

    assert asked("keep_start").rows[0].tokens == ids[:4]
    assert asked("keep_end").rows[0].tokens == ids[-4:]
    assert asked("keep_end", bos=True).rows[0].tokens == [BOS, *ids[-3:]]
    assert asked("drop").left_out == {"prompts longer than 4 tokens": 1}
    for how in ("refuse", "cut_post"):
        with pytest.raises(PalateError, match=r"the prompt has \d+ tokens, 4 fit"):
            asked(how)
    with pytest.raises(PalateError, match="2 fit"):
        encode_prompts([Prompt(prompt)], TOKENIZER, Encoding(), context=2)


def test_cut_post_shortens_the_post_in_training_and_at_rollout():
    query = fill(TLDR_FORMAT, {"subreddit": "s", "title": "t", "post": "the soup\nthe bread\nthe day"})
    limit = len(TOKENIZER.encode(query)) - 1
    encoding = Encoding(max_prompt_length=limit, long_prompts="cut_post")
    (asked,) = encode_prompts([Prompt(query)], TOKENIZER, encoding).rows
    assert asked.text == query.replace("\nthe day", "")
    (row,) = encode_demonstrations([Demonstration(query, completion=" x")], TOKENIZER, encoding).rows
    assert row.tokens[: len(asked.tokens)] == asked.tokens
    assert trained_text(row) == " x<eos>"


def test_prompts_of_plain_texts():
    texts = [Demonstration("", completion=t) for t in ("the soup. the bread is old. no", "no stop here")]
    encoding = Encoding(query_length=12, query_start=".", query_end=".")
    encoded = encode_prompts(texts, TOKENIZER, encoding)
    assert [row.text for row in encoded.rows] == [" the bread is old."]
    assert encoded.left_out == {"texts without a place to begin or end a prompt": 1}
    short = encode_prompts(texts, TOKENIZER, Encoding(query_length=3))
    assert [row.tokens for row in short.rows] == [TOKENIZER.encode(t.completion)[:3] for t in texts]
    with pytest.raises(PalateError, match="Set query_length"):
        encode_prompts(texts, TOKENIZER, Encoding())
    with pytest.raises(PalateError, match=r"query_start/query_end: 'zq' is \d tokens"):
        encode_prompts(texts, TOKENIZER, Encoding(query_length=3, query_start="zq"))


def test_a_query_stands_in_its_format_fresh_or_stored():
    encoding = Encoding(query_length=3, query_format="read: {query} TL;DR:")
    sides = TOKENIZER.encode("read: "), TOKENIZER.encode(" TL;DR:")
    text = Demonstration("", completion="the soup. the bread is old. no")
    (fresh,) = encode_prompts([text], TOKENIZER, encoding).rows
    assert fresh.tokens == [*sides[0], *TOKENIZER.encode(text.completion)[:3], *sides[1]]
    columns = {"prompt_tokens": [5, 6], "completion_tokens": [[7], [9, 10]]}
    label = Ranking("#5 #6", columns, completions=("#7", "#9 #10"), ranks=(0, 1))
    (asked,), (ranked,) = (encode([label], TOKENIZER, encoding).rows for encode in (encode_prompts, encode_rankings))
    assert asked.tokens == [*sides[0], 5, 6, *sides[1]]
    assert [row.tokens for row in ranked.rows] == [[*asked.tokens, 7], [*asked.tokens, 9, 10]]
    with pytest.raises(ValueError, match="query_format"):
        Encoding(query_format="TL;DR:")


def test_prompts_that_come_again_have_keys_of_their_own():
    rows = encode_prompts([Prompt("a", {"n": 1}), Prompt("b"), Prompt("a")], TOKENIZER, Encoding()).rows
    assert len({row.key for row in rows}) == 3
    assert rows[0].columns == {"n": 1}
    assert rows[0].key == encode_prompts([Prompt("a")], TOKENIZER, Encoding()).rows[0].key


def test_stored_tokens_are_used_as_they_are():
    columns = {"prompt_tokens": [5, 6], "completion_tokens": [[7, 8], [9, 10]]}
    record = Ranking("#5 #6", columns, "", ("#7 #8", "#9 #10"), (1, 0))
    (ranked,) = encode_rankings([record], TOKENIZER, Encoding(bos=True)).rows
    assert [r.tokens for r in ranked.rows] == [[5, 6, 7, 8], [5, 6, 9, 10]]
    assert [r.trained for r in ranked.rows] == [[False, False, True, True]] * 2
    (asked,) = encode_prompts([record], TOKENIZER, Encoding()).rows
    assert (asked.tokens, asked.text) == ([5, 6], TOKENIZER.decode([5, 6]))
    columns["prompt_tokens"] = [50000]
    with pytest.raises(PalateError, match="stored token 50000 is beyond this tokenizer's"):
        encode_rankings([record], TOKENIZER, Encoding())


def test_records_of_another_kind_are_refused():
    with pytest.raises(PalateError, match="expected a demonstration, got an unpaired record"):
        encode_demonstrations([Unpaired("a", completion="b")], TOKENIZER, Encoding())
    with pytest.raises(PalateError, match="expected ranked answers, got a prompt without an answer"):
        encode_rankings([Prompt("a")], TOKENIZER, Encoding())
    with pytest.raises(PalateError, match=r"record 0 .*half of a character"):
        encode_demonstrations([Demonstration("a\ud800", completion="b")], TOKENIZER, Encoding())
    with pytest.raises(PalateError, match="there were none"):
        encode_demonstrations([], TOKENIZER, Encoding())


def test_a_tokenizer_without_an_end_token_is_refused():
    endless = train_bpe(TEXTS, 300)
    endless.eos = None
    with pytest.raises(PalateError, match="it has no end token"):
        encode_demonstrations([Demonstration("a", completion="b")], endless, Encoding())
    (row,) = encode_demonstrations([Demonstration("a", completion="b")], endless, Encoding(eos=False)).rows
    assert row.tokens == [*endless.encode("a"), *endless.encode("b")]
