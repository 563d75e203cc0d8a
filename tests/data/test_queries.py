"""Query building against the golden cases of the reference systems."""

import json
from pathlib import Path

import pytest

from palate.data.queries import (
    NEWS_FORMAT,
    STORED_PAD,
    TLDR_FORMAT,
    books_query,
    cut_sentence,
    fill,
    left_pad,
    own_pad,
    query_fields,
    tldr_query,
)
from palate.settings import PalateError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "ppo_details.json").read_text())


def letters(text):
    return [ord(c) for c in text]


@pytest.mark.parametrize("name", ["short", "exact", "newline", "nonewline", "multi"])
def test_process_query_golden(name):
    inputs, expected = GOLDEN["process_query"]["inputs"], GOLDEN["process_query"]["outputs"][name]
    query, tokens = tldr_query(inputs["examples"][name], letters, inputs["length"], inputs["format"])
    padded = left_pad(tokens, inputs["length"], -1)
    assert query == expected["query"]
    assert padded.count(-1) == expected["n_pad"]
    assert len(padded) == expected["length"]
    assert next(i for i, t in enumerate(padded) if t != -1) == expected["first_nonpad"]


def test_books_query_golden():
    inputs, outputs = GOLDEN["books_query_prep"]["inputs"], GOLDEN["books_query_prep"]["outputs"]
    fixed = [inputs[k] for k in ("query_length", "start_token", "end_token", "pad")]
    assert [books_query(tokens, *fixed) for tokens in inputs["tokens"]] == outputs["queries"]


def test_without_marks_the_beginning_is_taken():
    assert cut_sentence([5, 6, 7], 2, None, None) == [5, 6]


def test_a_query_that_cannot_be_cut_is_refused():
    with pytest.raises(PalateError, match="max_prompt_length"):
        tldr_query({"subreddit": "a", "title": "b", "post": "c"}, letters, 10)


def test_braces_in_a_post_mean_nothing():
    assert fill("{a}-{b}", {"a": "{b}", "b": "{x.__class__}"}) == "{b}-{x.__class__}"
    with pytest.raises(PalateError, match="there is no field 'c'"):
        fill("{c}", {"a": 1})


@pytest.mark.parametrize(
    ("template", "fields"),
    [(TLDR_FORMAT, {"subreddit": "s", "title": "t", "post": "p\n\nTL;DR: q"}), (NEWS_FORMAT, {"article": "x\n\ny"})],
)
def test_a_finished_query_gives_its_fields_back(template, fields):
    found = query_fields(fill(template, fields))
    assert found is not None
    assert found[:2] == (fields, template)
    assert query_fields("anything else") is None


def test_stored_pads_become_the_tokenizers_own():
    assert own_pad([7, STORED_PAD, 3, STORED_PAD], 0) == [7, 0, 3, 0]
