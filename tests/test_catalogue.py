"""Lists read from the source, and recipes that are found wherever palate is installed."""

from __future__ import annotations

import pytest

from palate.catalogue import TOPICS, listing, recipe, recipes
from palate.metrics import METRICS
from palate.settings import PalateError, find, kinds


@pytest.mark.parametrize("folder", ["algorithms", "rewards", "stages"])
def test_what_is_listed_is_what_kind_may_be(folder: str) -> None:
    listed = listing(folder)
    assert set(listed) <= set(kinds(folder))
    for kind, meaning in listed.items():
        assert find(folder, kind).model_fields
        assert meaning.endswith(".")


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_has_entries_with_a_meaning(topic: str) -> None:
    found = listing(topic)
    assert found
    assert all(found.values()), [name for name, meaning in found.items() if not meaning]


def test_metrics_are_listed_with_unit_and_mask() -> None:
    assert set(listing("metrics")) == set(METRICS)
    assert listing("metrics")["policy/clipfrac_avg"].startswith("[share] Share of tokens")


def test_recipes_are_found_by_name() -> None:
    assert all(recipe(name).read_text() for name in recipes())
    with pytest.raises(PalateError, match="no recipe is called 'tasting_rom'"):
        recipe("tasting_rom")


def test_an_unknown_topic_suggests_the_nearest() -> None:
    with pytest.raises(PalateError, match=r"nothing is called 'recipe'\. Did you mean 'recipes'\?"):
        listing("recipe")
