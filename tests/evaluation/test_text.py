"""Text measures by hand, and ROUGE against the golden case and a slow oracle."""

import json
import sys
from itertools import combinations
from pathlib import Path

import pytest

from palate.evaluation.text import distinct, ngrams, rouge, self_repetition, summarise
from palate.settings import PalateError

ROUGE = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["rouge"]


def test_rouge_of_the_golden_file():
    found = rouge([ROUGE["prediction"]], [ROUGE["reference"]])
    expected = ROUGE["expected"]
    assert found.rouge1 == pytest.approx(expected["rouge1"]["f"], abs=1e-9)
    assert found.rouge2 == pytest.approx(expected["rouge2"]["f"], abs=1e-9)
    assert found.rougeL == pytest.approx(expected["rougeL"]["f"], abs=1e-9)
    assert found.average == pytest.approx(sum(expected[n]["f"] for n in expected) / 3, abs=1e-9)


def longest_common(a, b):
    return next(
        n
        for n in range(min(len(a), len(b)), -1, -1)
        if {tuple(a[i] for i in c) for c in combinations(range(len(a)), n)}
        & {tuple(b[i] for i in c) for c in combinations(range(len(b)), n)}
    )


def test_rouge_averages_rows_and_its_longest_part_is_a_common_subsequence():
    predictions, references = ["a b c d", "x y"], ["a c b d e", "p q"]
    lcs = longest_common(predictions[0].split(), references[0].split())
    precision, recall = lcs / 4, lcs / 5
    assert rouge(predictions, references).rougeL == pytest.approx(precision * recall / (precision + recall))


def test_rouge_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(PalateError, match=r"pip install 'palate\[eval\]'"):
        rouge(["a"], ["a"])


def test_rouge_needs_a_reference_each():
    with pytest.raises(ValueError, match="one reference per prediction"):
        rouge(["a", "b"], ["a"])


def test_ngrams_and_distinct_by_hand():
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert ngrams(["a"], 2) == []
    assert distinct(["a a b", "a b"], 1) == 2 / 5
    assert distinct(["a a b", "a b"], 2) == 2 / 3
    assert distinct(["", "one"], 2) == 0


def test_self_repetition_counts_what_was_already_said():
    assert self_repetition("one two three four five") == 0
    assert self_repetition("go on go on go on go on") == pytest.approx(1 - 2 / 6)
    assert self_repetition("too short") == 0


def test_summary_by_hand():
    found = summarise(["a b", "a b", "  ", "c"], [3, 3, 1, 8], [True, True, True, False])
    assert found.length_mean == 15 / 4
    assert (found.length_min, found.length_max) == (1, 8)
    assert found.eos_rate == 0.75
    assert found.empty_rate == 0.25
    assert found.distinct_answers == 0.75
    with pytest.raises(ValueError, match="at least one answer"):
        summarise([], [], [])
