"""The lexicon score: human ratings, summed over words."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import lexicon


def test_a_text_is_worth_the_sum_of_its_words_ratings(palate_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALATE_DATA", str(palate_data))
    lexicon.ratings.cache_clear()
    happy, sad = lexicon.raw("happy"), lexicon.raw("sad")
    assert sad < 0 < happy
    assert lexicon.raw("Happy, the table. HAPPY and sad!") == pytest.approx(2 * happy + sad)
    assert lexicon.cheer([""], [""]) == [pytest.approx(-lexicon.MEAN / lexicon.STD)]
