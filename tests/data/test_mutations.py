"""Broken rows: whatever a row holds, it becomes records or one PalateError that names the place; never a traceback."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.data.check import check
from palate.data.encode import Encoding, encode_prompts, trained_counts
from palate.data.formats import FORMATS, Row, read_rows
from palate.models.tokenizer import train_bpe
from palate.settings import PalateError

TOKENIZER = train_bpe(["one two three"], 300)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SEEDS = [
    {"text": "once"},
    {"messages": TURNS},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:], "margin": 1.0},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"chosen": "a b", "rejected": "a c"},
    {"messages": TURNS[:1], "chosen": "a", "rejected": {"from": "gpt", "value": "b"}, "rank_gap": 1, "tree": "t"},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    {"prompt": "a", "completions": ["b", "c"], "ranking": [1, [0]]},
    {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 0]},
    {"prompt": "a", "original": "b", "corrected": "c", "spans": [[0, 1]]},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
    {"instruction": "a", "output": ["c", "d"]},
    {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.2},
    {"instruction": "a", "instances": [{"input": "b", "output": "c"}]},
    {"source": ["a"], "target": ["b"]},
    {"info": {"subreddit": "a", "title": "b", "post": "c"}, "summaries": [{"text": "d"}, {"text": "e"}], "choice": 0},
    {"query": [1, 50259], "sample0": [2], "sample1": [3], "best": 1},
    {"model_a": "a", "model_b": "b", "winner": "tie", "conversation_a": TURNS, "conversation_b": TURNS},
    {"image": {}, "text": '{"question": "a", "chosen": "b", "rejected": "c"}'},
]

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("\ud800"), st.just("[{}]")
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """Every place inside a nested value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from places(inside, (*path, key))


@st.composite
def mutants(draw):
    row = copy.deepcopy(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([p for p in places(row) if p] or [("new",)]))
        target = row
        for step in path[:-1]:
            target = target[step]
        if isinstance(target, dict) and draw(st.booleans()):
            target.pop(path[-1], None)
        else:
            target[path[-1]] = draw(values)
    return row


def read_all(row, name):
    return [record for _, record in read_rows([Row(row, "file.jsonl:3")], name)]


def outcome(call):
    """(what was returned, what was said): every exception but a PalateError goes through."""
    try:
        return call(), ""
    except PalateError as fault:
        return [], str(fault)


@settings(max_examples=400)
@given(mutants())
def test_a_mutated_row_never_gives_a_traceback(row):
    records, fault = outcome(lambda: read_all(row, "auto"))
    assert records or fault.startswith("file.jsonl:3: ")
    check(records)
    known = [r for r in records if "prompt_tokens" not in r.columns]
    trained_counts(known, TOKENIZER, Encoding(max_length=50))
    for record in known:
        encoded, fault = outcome(lambda r=record: encode_prompts([r], TOKENIZER, Encoding(query_length=4)).rows)
        assert encoded or "record 0" in fault or "no record is left" in fault


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(sorted({k for row in SEEDS for k in row})), values), st.sampled_from(FORMATS))
def test_any_row_under_any_format_never_gives_a_traceback(row, format):
    records, fault = outcome(lambda: read_all(row, format.name))
    assert records or fault.startswith("file.jsonl:3: ")


@pytest.mark.parametrize("row", SEEDS, ids=lambda row: "-".join(row))
def test_the_unmutated_rows_are_read(row):
    assert read_all(row, "auto")
