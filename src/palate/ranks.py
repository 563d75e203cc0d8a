"""Which of a run's processes this one is, as the launcher said it; known before torch is loaded."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from palate.settings import PalateError

_PATIENCE = 5.0
"""Seconds for the rank that speaks; a launcher mostly ends the silent ones sooner."""


def rank() -> int:
    """This process's number among those of the run, from 0."""
    return _number("RANK", 0)


def size() -> int:
    """How many processes the run has."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number among those on the same machine: which GPU is its own."""
    return _number("LOCAL_RANK", 0)


def end_quietly(code: int) -> NoReturn:
    """End this rank without a word, after the one that speaks: a launcher ends all ranks as soon as one has ended."""
    time.sleep(_PATIENCE)
    sys.exit(code)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdigit():
        raise PalateError(f"{name}: expected a whole number from the launcher, got {text!r}. Start with torchrun.")
    return int(text)
