"""A cheap reward for benchmarks: how cheerful a text is, by the human ratings of the VADER lexicon."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from palate.data.source import DATA_FOLDER

MEAN, STD = 1.28, 2.00
"""Moments of `raw` on 512 answers of the start model of bench/curves.yaml (`python -m bench.curves moments`)."""

_WORD = re.compile(r"[a-z']+")


@lru_cache(maxsize=1)
def ratings() -> Mapping[str, float]:
    """Mean human rating of each single word, from −4 to 4 (Hutto & Gilbert 2014), out of $PALATE_DATA."""
    folder = Path(os.environ.get("PALATE_DATA") or DATA_FOLDER) / "sentiment"
    with zipfile.ZipFile(folder / "vader_lexicon.zip") as archive:
        lines = archive.read("vader_lexicon/vader_lexicon.txt").decode("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    return {row[0]: float(row[1]) for row in rows}


def raw(text: str) -> float:
    """The sum of the ratings of a text's words; a word without one counts nothing."""
    known = ratings()
    return sum(known.get(word, 0.0) for word in _WORD.findall(text.lower()))


def cheer(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """`raw` of each answer, scaled so that the start model's answers have mean 0 and deviation 1 (detail 21)."""
    return [(raw(text) - MEAN) / STD for text in completions]
