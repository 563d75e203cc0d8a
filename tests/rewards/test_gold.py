"""The true taste of the tasting room as a reward."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from palate.records import Demonstration, text_of
from palate.rewards.gold import Reward
from palate.rewards.reward import Answers
from palate.settings import PalateError, build
from palate.worlds import tasting_room

Answered = Callable[..., Answers]


def test_the_score_is_the_worlds_utility(answered: Answered) -> None:
    shown = [r for r in tasting_room.records("demonstrations", rows=8, seed=0) if isinstance(r, Demonstration)]
    prompts, notes = [text_of(r.prompt) for r in shown], [text_of(r.completion) for r in shown]
    verdict = Reward().score(answered(notes, prompts))
    expected = [tasting_room.utility(p, n).total for p, n in zip(prompts, notes, strict=True)]
    assert verdict.score_B.tolist() == pytest.approx(expected)
    assert len(set(expected)) > 2
    assert list(verdict.parts) == ["gold"]


def test_an_unknown_world_is_refused() -> None:
    with pytest.raises(PalateError, match=r"no world is called 'tasting_rom'. Did you mean 'tasting_room'"):
        build("rewards", {"kind": "gold", "world": "tasting_rom"})
