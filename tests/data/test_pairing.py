"""Pairs out of thumbs."""

import pytest

from palate.data.pairing import pair_labels
from palate.records import Unpaired
from palate.settings import PalateError


def thumbs(prompt, ups, downs):
    good = [Unpaired(prompt, completion=f"{prompt} up {i}", label=True) for i in range(ups)]
    return good + [Unpaired(prompt, completion=f"{prompt} down {i}", label=False) for i in range(downs)]


def test_every_answer_is_used_once_and_only_within_its_prompt():
    pairs = list(pair_labels(thumbs("a", 5, 3) + thumbs("b", 1, 4) + thumbs("c", 2, 0), 0))
    assert len(pairs) == 3 + 1
    used = [answer for pair in pairs for answer in pair.completions]
    assert len(set(used)) == len(used)
    for pair in pairs:
        assert all(answer.startswith(pair.prompt) for answer in pair.completions)
        assert "up" in pair.completions[0]
        assert "down" in pair.completions[1]


def test_the_seed_decides_who_meets_whom():
    records = thumbs("a", 20, 20)
    assert list(pair_labels(records, 1)) == list(pair_labels(records, 1))
    assert list(pair_labels(records, 1)) != list(pair_labels(records, 2))


def test_nothing_to_pair_is_an_error():
    with pytest.raises(PalateError, match="no prompt has both"):
        list(pair_labels(thumbs("a", 2, 0), 0))
