"""What the text looks like: length, endings, variety, repetition, and overlap with references (ROUGE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palate.settings import PalateError


@dataclass(frozen=True)
class TextSummary:
    """One set of answers in numbers; lengths are in tokens, shares in [0, 1]."""

    length_mean: float
    length_min: int
    length_max: int
    eos_rate: float
    empty_rate: float
    distinct_1: float
    distinct_2: float
    distinct_answers: float
    self_repetition: float


def summarise(completions: Sequence[str], lengths: Sequence[int], finished: Sequence[bool]) -> TextSummary:
    """The numbers of `TextSummary` for at least one answer; `lengths` in tokens, `finished` = ended by
    itself.
    """
    count = len(completions)
    if not count or len(lengths) != count or len(finished) != count:
        raise ValueError("a text summary needs at least one answer, and a length and an ending for each")
    return TextSummary(
        length_mean=sum(lengths) / count,
        length_min=min(lengths),
        length_max=max(lengths),
        eos_rate=sum(finished) / count,
        empty_rate=sum(not c.strip() for c in completions) / count,
        distinct_1=distinct(completions, 1),
        distinct_2=distinct(completions, 2),
        distinct_answers=len({c.strip() for c in completions}) / count,
        self_repetition=sum(self_repetition(c) for c in completions) / count,
    )


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n consecutive words."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(completions: Sequence[str], n: int) -> float:
    """Different n-grams of words over all n-grams of the whole set. Li et al. 2016 (distinct-n); 0 without
    any.

    It falls as the set grows, so compare sets of one size only.
    """
    found = [gram for c in completions for gram in ngrams(c.split(), n)]
    return len(set(found)) / len(found) if found else 0.0


def self_repetition(completion: str, n: int = 3) -> float:
    """The share of one answer's word n-grams that it has already said; 0 for answers shorter than n words."""
    found = ngrams(completion.split(), n)
    return 1 - len(set(found)) / len(found) if found else 0.0


@dataclass(frozen=True)
class Rouge:
    """Mean F1 of ROUGE-1, -2 and -L, and their average as summarisation papers report it."""

    rouge1: float
    rouge2: float
    rougeL: float

    @property
    def average(self) -> float:
        """The mean of the three."""
        return (self.rouge1 + self.rouge2 + self.rougeL) / 3


def rouge(predictions: Sequence[str], references: Sequence[str]) -> Rouge:
    """ROUGE F1 averaged over rows, lower-cased [a-z0-9]+ words without stemming. Lin 2004.

    PalateError when the optional package rouge-score is not installed; ValueError on unequal or empty lists.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError("ROUGE needs one reference per prediction, at least one")
    scorer = _rouge_scorer()
    rows: list[dict[str, Any]] = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    one, two, longest = (sum(float(row[n].fmeasure) for row in rows) / len(rows) for n in _ROUGE)
    return Rouge(one, two, longest)


_ROUGE = ["rouge1", "rouge2", "rougeL"]


def _rouge_scorer() -> Any:
    try:
        # Late on purpose: the package is an optional extra.
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise PalateError(
            "rouge: the package rouge-score is missing. Run `pip install 'palate[eval]'` or set rouge=false."
        ) from None
    return RougeScorer(_ROUGE, use_stemmer=False)
