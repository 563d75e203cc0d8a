"""Tokenizers: any text round-trips, special tokens are distinct, the template is plain and sandboxed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from palate.models.tokenizer import Tokenizer, train_bpe
from palate.records import Message
from palate.settings import PalateError

TEXTS = ["the soup is hot and the wine is red", "a red wine, 1987, doesn't suit the soup"] * 5
TOKENIZER = train_bpe(TEXTS, 320)


@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special=False) == text


def test_the_special_tokens_are_three_and_apart():
    assert len({TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.eos}) == 3
    assert TOKENIZER.size <= 320
    assert max(TOKENIZER.encode("the soup 🍲")) < TOKENIZER.size


def test_encoding_adds_nothing_and_knows_special_tokens_in_the_text():
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.encode("the<eos>") == [*TOKENIZER.encode("the"), TOKENIZER.eos]
    assert TOKENIZER.decode([*TOKENIZER.encode("the"), TOKENIZER.eos]) == "the"
    assert TOKENIZER.decode([TOKENIZER.size + 5, *TOKENIZER.encode("soup")]) == "soup"


def test_training_twice_gives_the_same_tokenizer():
    assert train_bpe(TEXTS, 320).inner.get_vocab() == TOKENIZER.inner.get_vocab()
    assert TOKENIZER.same_words(train_bpe(TEXTS, 320))
    assert not TOKENIZER.same_words(train_bpe(["quite another text, zzz zzz zzz"], 320))


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(PalateError, match=r"vocabulary: 100 is too small.*at least 259"):
        train_bpe(TEXTS, 100)


def test_the_plain_template_grows_by_appending():
    turns = [
        Message("system", "Be kind."),
        Message("user", "Soup?"),
        Message("assistant", "Yes."),
        Message("user", "!"),
    ]
    asked = TOKENIZER.render(turns[:2], add_generation_prompt=True)
    answered = TOKENIZER.render(turns[:3], add_generation_prompt=False)
    assert asked == "System: Be kind.\nUser: Soup?\nAssistant:"
    assert answered == asked + " Yes.<eos>"
    assert TOKENIZER.render(turns, add_generation_prompt=False).startswith(answered)


def test_a_template_of_its_own_is_kept_and_its_refusal_explained(tmp_path):
    other = train_bpe(TEXTS, 300)
    other.inner.chat_template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}ok"
    other.save(tmp_path)
    again = Tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert again.render([Message("user", "x")], False) == "ok"
    with pytest.raises(PalateError, match=r"refuses the roles \(system\): user first"):
        again.render([Message("system", "x")], False)


HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{{ messages[0].__init__.__globals__['__builtins__'] }}": "",
    "{% include '/etc/passwd' %}": "no loader",
    "{% for i in range(10**9) %}x{% endfor %}": "fill the memory",
    "{% for i in range(1000000) %}x{% endfor %}": "Range too big",
    "{% for a in range(9999) %}{%- for m in messages -%}{% for b in range(9999) %}": "inside another, may never end",
    "{{ 'a' * 9999999999 }}": "fill the memory",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 1 / 0 }}": "division by zero",
    "{% for": "end of template",
    "{{ raise_exception('no') }}": "no",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_refused_in_one_line(tmp_path, template):
    """As it comes with a model folder."""
    other = train_bpe(TEXTS, 300)
    other.inner.chat_template = template
    other.save(tmp_path)
    again = Tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    with pytest.raises(PalateError, match=rf"chat template of .*refuses the roles \(user\): .*{HOSTILE[template]}"):
        again.render([Message("user", "x")], False)


def test_loops_that_end_are_rendered():
    other = train_bpe(TEXTS, 300)
    other.inner.chat_template = (
        "{% for i in range(3) %}{{ i }}{% endfor %}"
        "{% for i in range(2) %}{% for m in messages %}{{ range(2) | list }}{{ m['content'] }}{% endfor %}{% endfor %}"
    )
    assert other.render([Message("user", "**")], False) == "012[0, 1]**[0, 1]**"


def test_template_syntax_in_what_is_said_is_text():
    said = "{{ 7 * 7 }} {% for i in range(9) %}x{% endfor %} {# gone? #} ${x} {0.__class__}"
    assert TOKENIZER.render([Message("user", said)], False) == f"User: {said}"


def test_without_an_end_token_a_policy_is_told_what_to_do():
    other = train_bpe(TEXTS, 300)
    other.inner.eos_token = None
    bare = Tokenizer(other.inner)
    assert bare.eos is None
    with pytest.raises(PalateError, match=r"no end-of-sequence token.*end_token"):
        _ = bare.end


def test_saved_and_loaded_it_reads_the_same(tmp_path):
    TOKENIZER.save(tmp_path)
    again = Tokenizer(AutoTokenizer.from_pretrained(tmp_path))
    assert again.same_words(TOKENIZER)
    assert (again.pad, again.bos, again.eos, again.size) == (
        TOKENIZER.pad,
        TOKENIZER.bos,
        TOKENIZER.eos,
        TOKENIZER.size,
    )
    for text in (*TEXTS, "<eos>  1234\n\nUNSEEN ünïcode 🍷"):
        assert again.encode(text) == TOKENIZER.encode(text)
