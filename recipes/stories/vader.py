"""How positive a text is by the VADER lexicon (Hutto and Gilbert 2014): a judge that has nothing to do with training.

The lexicon gives words and smileys the mean of ten people's ratings between −4 and 4. A text's score is
sum / √(sum² + 15), the published "compound", where a rated word within three words of a negation counts −0.74 times
its rating. The further rules of the paper (degree adverbs, capitals, exclamation marks, "but", idioms) are left out:
they change how strong a feeling is, hardly ever which it is.
"""

from __future__ import annotations

import math
import os
import string
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

NORM = 15.0
"""The published constant under the root: about the largest sum that one expects."""

FLIP = -0.74
"""What a negation does to a rating, by the paper's experiment."""

REACH = 3
"""How many words before a rated one may negate it."""

_MODAL = ("ca", "could", "might", "must", "need", "should", "wo", "would")
_VERBS = (*_MODAL, "ai", "are", "did", "does", "do", "had", "has", "have", "is", "was", "were")
_ALONE = ("no", "not", "never", "none", "neither", "nor", "nothing", "nobody", "nowhere", "without", "cannot")

NEGATIONS = frozenset((*_ALONE, "hardly", "rarely", "seldom", *(f"{verb}nt" for verb in _VERBS)))
"""Words that negate, without their apostrophes; they do nothing else, whatever the lexicon says of "no"."""


def lexicon(archive: Path) -> dict[str, float]:
    """Word to mean rating, out of the zipped table (word, mean, deviation, single ratings; tabs between)."""
    with zipfile.ZipFile(archive) as files:
        table = files.read("vader_lexicon/vader_lexicon.txt").decode("utf-8")
    columns = (line.split("\t") for line in table.splitlines() if line.strip())
    return {word: float(mean) for word, mean, *_ in columns}


def words(text: str) -> list[str]:
    """Words in lower case without the punctuation around them; what is nothing but punctuation stays as it is."""
    return [piece.strip(string.punctuation) or piece for piece in text.lower().split()]


def compound(text: str, ratings: Mapping[str, float]) -> float:
    """Between −1 and 1; 0 where no word is rated."""
    said = words(text)
    total = 0.0
    for place, word in enumerate(said):
        rating = 0.0 if word in NEGATIONS else ratings.get(word, 0.0)
        negated = any(_negates(before) for before in said[max(0, place - REACH) : place])
        total += rating * (FLIP if negated else 1.0)
    return total / math.sqrt(total * total + NORM)


def _negates(word: str) -> bool:
    return word.replace("'", "").replace("’", "") in NEGATIONS


@lru_cache(maxsize=1)
def _ratings() -> dict[str, float]:
    return lexicon(Path(os.environ.get("PALATE_DATA", "../shared/data")) / "sentiment" / "vader_lexicon.zip")


def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """The compound of each completion alone: a happy prompt earns nothing."""
    return [compound(text, _ratings()) for text in completions]
