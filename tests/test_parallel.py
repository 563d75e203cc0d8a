"""A world of one is the same object as any other; what several ranks do together is in tests/ranks/."""

from __future__ import annotations

import pytest
import torch

from palate.parallel import World, joined, local, part_like, whole, whole_like
from palate.settings import NotFinite, PalateError


def test_a_world_of_one_adds_to_itself() -> None:
    here = World()
    assert here.is_main
    assert here.sum(2.5) == 2.5
    assert torch.equal(here.sum(torch.arange(3)), torch.arange(3))
    assert here.sum({"tokens": 3.0}) == {"tokens": 3.0}
    assert here.first(lambda: 7) == 7
    assert here.any(True)
    assert not here.any(False)
    here.barrier()


def test_means_are_sums_over_counts_and_nothing_counted_has_no_mean() -> None:
    assert World().sum_means({"loss": (6.0, 4.0), "never seen": (0.0, 0.0)}) == {"loss": 1.5}


def test_only_rank_zero_is_main() -> None:
    assert not World(rank=1, size=2).is_main


@pytest.mark.parametrize(("parts", "size"), [(1, 2), (2, 2), (5, 2), (7, 3), (3, 1)])
def test_parts_are_dealt_once_and_every_rank_gets_equally_many(parts: int, size: int) -> None:
    dealt = [World(rank=rank, size=size).deal(list(range(parts))) for rank in range(size)]
    assert len({len(mine) for mine in dealt}) == 1
    assert sorted(part for mine in dealt for part, matters in mine if matters) == list(range(parts))
    assert all(part == 0 for mine in dealt for part, matters in mine if not matters)


def test_a_rank_takes_its_share_of_rows_but_no_more_than_fit() -> None:
    assert World(size=2).rows_each(rows=8, most=64) == 4
    assert World(size=2).rows_each(rows=100, most=8) == 8
    assert World(size=4).rows_each(rows=2, most=8) == 1
    assert World().rows_each(rows=8, most=64) == 8


def test_alone_nothing_is_cut() -> None:
    full = torch.arange(6.0).view(2, 3)
    assert local(full) is full
    assert whole(full) is full
    assert part_like(full, full + 1).equal(full + 1)
    assert whole_like(full, full + 2).equal(full + 2)


def test_a_fault_on_this_rank_is_raised_at_the_end_of_the_block() -> None:
    with pytest.raises(NotFinite, match="here"), World().together(NotFinite):
        raise NotFinite("here")


def test_several_processes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(PalateError, match=r"WORLD_SIZE is 2 but MASTER_ADDR is not set\. Start the run with torchrun"),
        joined(),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(PalateError, match="WORLD_SIZE: expected a whole number"), joined():
        pass


def test_the_norm_of_a_gradient_is_that_of_all_its_numbers_in_double_precision() -> None:
    """Also where millions of squares are added, of which a sum in float32 loses the end."""
    shapes = [(700, 3000), (2_000_000,), (5,), (), (0, 4)]
    generator = torch.Generator().manual_seed(2)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    exact = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None) ** 0.5
    parameters.append(torch.nn.Parameter(torch.zeros(3)))  # one that no loss reached
    assert World().norm(parameters) == pytest.approx(exact, rel=1e-6)
    assert World().norm([]) == 0.0
