"""A world of one is the same object as any other."""

from __future__ import annotations

import pytest
import torch

from palate.parallel import World, world
from palate.settings import PalateError


def test_a_world_of_one_adds_to_itself() -> None:
    here = World()
    assert here.is_main
    assert here.sum(2.5) == 2.5
    assert torch.equal(here.sum(torch.arange(3)), torch.arange(3))
    assert here.sum({"tokens": 3.0}) == {"tokens": 3.0}
    here.barrier()


def test_means_are_sums_over_counts_and_nothing_counted_has_no_mean() -> None:
    assert World().sum_means({"loss": (6.0, 4.0), "never seen": (0.0, 0.0)}) == {"loss": 1.5}


def test_only_rank_zero_is_main() -> None:
    assert not World(rank=1, size=2).is_main


def test_several_processes_are_refused_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PalateError, match="Start it without torchrun"):
        world()
