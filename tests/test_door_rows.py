"""Values as rows: trlX's samples, dialogues and rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.door_rows import demonstrations, is_dialogue, write_rows
from palate.settings import PalateError


def test_a_text_is_a_completion_without_a_prompt() -> None:
    assert demonstrations(["a b", "c"]) == [{"prompt": "", "completion": "a b"}, {"prompt": "", "completion": "c"}]


def test_a_pair_is_prompt_and_output_and_a_longer_list_a_dialogue() -> None:
    pair, dialogue = demonstrations([["q", "a"], ["q", "a", "p", "b"]])  # type: ignore[misc]
    assert pair == {"prompt": "q", "completion": "a"}
    assert dialogue["prompt"] == [{"role": "user", "content": "q"}]
    assert [t["content"] for t in dialogue["completion"]] == ["a", "p", "b"]
    assert [t["role"] for t in dialogue["completion"]] == ["assistant", "user", "assistant"]


def test_rewards_become_ratings() -> None:
    rows = demonstrations(["a", {"prompt": "p", "completion": "c"}], [1, 2.5])
    assert [row["rating"] for row in rows] == [1.0, 2.5]  # type: ignore[index]


@pytest.mark.parametrize(
    ("samples", "rewards", "said"),
    [
        (["a"], [1.0, 2.0], r"rewards: 2 for 1 samples"),
        (["a", ["p"]], None, r"samples\[1\]: a dialogue is a list of texts"),
        (["a", ["p", "o", "p"]], None, r"samples\[1\]"),
        (["a", ["p", 3]], None, r"samples\[1\]"),
        (["a"], ["good"], r"rewards\[0\]: 'good' is not a number"),
        ("file.jsonl", [1.0], r"carry their own `rating`"),
    ],
)
def test_what_does_not_fit_is_named(samples: object, rewards: object, said: str) -> None:
    with pytest.raises(PalateError, match=said):
        demonstrations(samples, rewards)  # type: ignore[arg-type]


def test_only_lists_with_several_turns_are_dialogues() -> None:
    assert is_dialogue(["a", ["q", "a", "p", "b"]])
    assert not is_dialogue(["a", ["q", "a"], {"prompt": "x"}])
    assert not is_dialogue("file.jsonl")


def test_the_callers_rows_stay_as_they_are(tmp_path: Path) -> None:
    given = [{"prompt": "p", "tag": [1]}, {"prompt": "q", "tag": [2]}]
    before = json.dumps(given)
    write_rows(given, tmp_path / "rows.jsonl")
    demonstrations(given, [1.0, 2.0])
    assert json.dumps(given) == before
