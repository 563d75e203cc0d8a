"""Behaviour gates: each method, from the same start, teaches short ways on the random walks at least this well.

The scores that a right implementation reaches were measured with another network and another graph (bench/walks.md has
ours beside the gates). A loss with a flipped sign, a mask that trains the prompt, or a reference that moves falls
below them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import walks
from palate.diagnosis.findings import unlearning

GATES = [name for name, method in walks.METHODS.items() if method.least is not None and "ilql" not in name]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("walks")


@pytest.mark.parametrize("name", GATES)
def test_the_method_teaches_short_ways(name: str, home: Path) -> None:
    least = walks.METHODS[name].least
    assert least is not None
    found = walks.teach(home, name, seed=1)
    assert found.sampled >= least


def test_implicit_q_learning_follows_its_values_the_more_it_is_asked_to(home: Path) -> None:
    found = [walks.teach(home, f"ilql, decoded at β {beta}", seed=1) for beta in (0, 1, 4, 100)]
    scores = [one.sampled for one in found]
    assert scores == sorted(scores)
    assert scores[2] >= 0.85
    assert scores[3] >= 0.93
    assert scores[0] < 0.6  # without its values it walks as the walks it saw


def test_dpo_collapses_at_a_high_rate_and_the_alarm_tells_it_from_success(home: Path) -> None:
    collapsed = walks.teach(home, "dpo β .1, rate 3e-4 (collapses)", seed=1)
    sound = walks.teach(home, "dpo + nll of chosen (rpo)", seed=1)
    start = walks.imitated(home, seed=1)
    assert collapsed.accuracy is not None
    assert sound.accuracy is not None
    assert collapsed.accuracy >= 0.99 > sound.accuracy >= 0.85  # the better policy orders fewer pairs
    assert collapsed.sampled <= 0.2 < 0.6 <= sound.sampled

    def heard(found: walks.Walked) -> str | None:
        assert found.change is not None
        return unlearning(found.change, {"invalid walks": (start.invalid, found.invalid)})

    assert heard(collapsed) == "alarm"
    assert heard(sound) is None
