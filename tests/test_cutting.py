"""Cutting a batch: by rows and tokens, rows of like beginnings together, every rank with work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.batches import Comparisons, Pairs, Rows, Tokens
from palate.cutting import FROZEN, Microbatch, affordable, cut, lengths, neighbours
from palate.models.make import Make, make
from palate.parallel import World


def tokens(*texts: list[int], left: int = 0) -> Tokens:
    width = max(len(text) for text in texts) + left
    real = torch.tensor([[left <= t < left + len(text) for t in range(width)] for text in texts])
    ids = torch.full((len(texts), width), 77)
    for row, text in enumerate(texts):
        ids[row, left : left + len(text)] = torch.tensor(text, dtype=torch.long)
    return Tokens(ids, real, real)


def ragged(*counts: int) -> Tokens:
    return tokens(*([n] * count for n, count in enumerate(counts)))


def sizes(batch: Rows, most: Microbatch, world: World | None = None) -> list[int]:
    return [part.size for part in cut(batch, most, world or World())]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (Microbatch(), [6]),
        (Microbatch(tokens=30), [6]),
        (Microbatch(tokens=10), [2, 1, 3]),
        (Microbatch(tokens=9), [1, 1, 1, 2, 1]),
        (Microbatch(tokens=1), [1] * 6),
        (Microbatch(rows=4), [4, 2]),
        (Microbatch(rows=2, tokens=10), [2, 1, 2, 1]),
        (Microbatch(rows=64, tokens=1000), [6]),
    ],
)
def test_a_part_takes_rows_while_both_limits_hold_and_at_least_one(most: Microbatch, expected: list[int]) -> None:
    assert sizes(ragged(5, 5, 10, 4, 4, 2), most) == expected


def test_parts_are_consecutive_and_lose_nothing() -> None:
    batch = ragged(5, 3, 9, 1, 7, 2)
    parts = cut(batch, Microbatch(tokens=9), World())
    assert torch.cat([part.tokens_BT for part in parts]).equal(batch.tokens_BT)
    assert all(sum(lengths(part)) <= 9 or part.size == 1 for part in parts)


@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (100, 1, 1, 1), (1, 1, 1, 100), (3, 4), (8,)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("most", [Microbatch(), Microbatch(tokens=6), Microbatch(rows=2), Microbatch(tokens=10_000)])
def test_every_rank_has_work_where_there_are_rows_for_it(counts: tuple[int, ...], ranks: int, most: Microbatch) -> None:
    found = [sizes(ragged(*counts), most, World(rank, ranks)) for rank in range(ranks)]
    assert all(one == found[0] for one in found), "every rank cuts alike"
    assert len(found[0]) >= min(ranks, len(counts))


def test_padding_is_no_token_wherever_it_is() -> None:
    texts = [1, 2, 3], [4], [5, 6]
    assert lengths(tokens(*texts)) == lengths(tokens(*texts, left=4)) == [3, 1, 2]


@dataclass(frozen=True)
class Points(Rows):
    x_B: Tensor


def test_rows_without_tokens_count_as_one_each() -> None:
    assert sizes(Points(torch.arange(5.0)), Microbatch(tokens=2)) == [2, 2, 1]
    batch = Points(torch.arange(5.0))
    assert neighbours(batch) is batch


@pytest.mark.parametrize("left", [0, 3])
def test_rows_that_begin_alike_lie_together_in_a_stable_order(left: int) -> None:
    texts = [9, 1, 1], [300, 2], [9, 1], [300, 2], [9, 1, 0, 5], [7]
    found = neighbours(Labelled(**vars(tokens(*texts, left=left)), name_B=torch.arange(6)))
    assert found.name_B.tolist() == [5, 2, 4, 0, 1, 3], "a beginning before what goes on from it; 300 is beyond a byte"


@dataclass(frozen=True)
class Labelled(Tokens):
    name_B: Tensor


def pairs() -> Pairs:
    one = tokens([1, 2, 3], [1, 2], [5], [5, 6, 7, 8], [1, 2, 2], [1, 9])
    three = (x.unflatten(0, (3, 2)) for x in (one.tokens_BT, one.real_BT, one.action_BT))
    return Pairs(*three, torch.ones(3), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, 2, 4).bool())


def rankings() -> Comparisons:
    one = pairs()
    present, rank = torch.tensor([[True, True], [True, True], [True, False]]), torch.tensor([[0, 1]] * 3)
    real = one.real_BKT & present[..., None]
    return Comparisons(one.tokens_BKT, real, present, rank, one.margin_B, one.action_BKT & present[..., None])


@pytest.mark.parametrize(("make_batch", "counts"), [(pairs, [5, 5, 5]), (rankings, [5, 5, 3])])
def test_answers_of_one_row_stay_together_and_count_together(make_batch: Callable[[], Any], counts: list[int]) -> None:
    batch = make_batch()
    assert lengths(batch) == counts
    assert sizes(batch, Microbatch(tokens=9)) == ([1, 1, 1] if counts[2] == 5 else [1, 2])
    assert neighbours(batch).margin_B.tolist() == [2.0, 0.0, 1.0]


def test_limits_join_and_are_told() -> None:
    both = Microbatch(rows=8, tokens=5000).within(Microbatch(tokens=4096))
    assert both == Microbatch(8, 4096)
    assert both.said() == "8 rows and 4,096 tokens"
    assert both.settings() == "microbatch_size: 8 and tokens_per_microbatch: 4096"
    assert Microbatch().said() == "all rows"


def test_what_memory_affords_is_a_function_of_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine, that is; a larger model or less memory never takes more, and a CPU never more than its best."""
    small = make(Make(hidden_size=32, layers=2, heads=2, vocabulary=300, context=64), ["a text"], 3).trunk
    large = make(Make(hidden_size=64, layers=6, heads=2, vocabulary=300, context=64), ["a text"], 3).trunk
    assert affordable(small) == affordable(small) == 4096
    found: list[int] = []
    for megabytes in (1, 50, 200, 800):
        monkeypatch.setattr("palate.cutting._memory", lambda megabytes=megabytes: megabytes << 20)
        assert affordable(large) <= affordable(small)
        assert affordable(large) & (affordable(large) - 1) == 0
        found.append(affordable(large))
    assert found == sorted(found)
    assert found[0] == 256 < found[-1]
    large.recomputes = True
    monkeypatch.setattr("palate.cutting._memory", lambda: 50 << 20)
    assert affordable(large) > found[1], "recomputed activations leave room"
    assert FROZEN > 1
