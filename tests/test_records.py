"""Records are plain values; a prompt's key speaks of its content alone."""

from palate.records import (
    Demonstration,
    Message,
    Prompt,
    Ranking,
    as_messages,
    fingerprint,
    preference,
    text_of,
)


def test_key_is_the_content_or_the_group() -> None:
    assert Prompt("hi").key == Demonstration("hi", completion="there").key == Prompt("hi", {"x": 1}).key
    assert Prompt("hi").key != Prompt("ho").key
    assert Prompt("hi", group="tree-1").key == Prompt("ho", group="tree-1").key == "tree-1"


def test_text_and_the_same_words_as_messages_are_different_prompts() -> None:
    turns = (Message("user", "hi"),)
    assert Prompt(turns).key != Prompt(text_of(turns)).key
    assert fingerprint(turns) == fingerprint(as_messages([{"role": "user", "content": "hi"}]))


def test_lone_surrogates_have_a_fingerprint() -> None:
    assert len(fingerprint("\ud800")) == 16


def test_pairs_of_a_ranking_leave_ties_out() -> None:
    ranking = Ranking("p", completions=("a", "b", "c", "d"), ranks=(1, 0, 1, 2))
    assert sorted(ranking.pairs) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert preference("p", "good", "bad").pairs == [(0, 1)]
