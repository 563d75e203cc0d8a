"""One draw: against a distribution written the slow way, and by counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from palate import randomness
from palate.engines.draw import draw, drawn_from
from palate.engines.engine import Sampling

NO_ENDS = torch.zeros(0, dtype=torch.long)


def by_definition(logits: list[float], temperature: float, top_k: int, top_p: float, banned: set[int]) -> list[float]:
    """The distribution that is drawn from, token by token in plain Python."""
    weight = {i: x / temperature for i, x in enumerate(logits) if i not in banned and x > -math.inf}
    if top_k:
        least = sorted(weight.values(), reverse=True)[min(top_k, len(weight)) - 1]
        weight = {i: w for i, w in weight.items() if w >= least}
    top = max(weight.values())
    mass = {i: math.exp(w - top) for i, w in weight.items()}
    total = math.fsum(mass.values())
    kept: dict[int, float] = {}
    for i in sorted(mass, key=lambda i: (-mass[i], i)):
        if top_p < 1 and math.fsum(kept.values()) / total >= top_p:
            break
        kept[i] = mass[i]
    total = math.fsum(kept.values())
    return [kept.get(i, 0.0) / total for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.8), (1, 0.5), (50, 0.999)])
def test_the_distribution_is_the_one_by_definition(temperature: float, top_k: int, top_p: float) -> None:
    rows = [
        [0.0, 1.0, 2.0, 3.0, -1.0, 0.5],
        [2.0, 2.0, 2.0, 0.0, 0.0, -5.0],
        [-math.inf, 4.0, -math.inf, 0.0, 1.0, 1.5],
        [8.0, -8.0, 0.0, 0.1, 0.2, 0.3],
    ]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logp_BV = drawn_from(torch.tensor(rows), sampling, torch.tensor([3]), early=True)
    for row, logp_V in zip(rows, logp_BV, strict=True):
        expected = by_definition(row, temperature, top_k, top_p, {3})
        assert logp_V.exp().tolist() == pytest.approx(expected, abs=1e-6)
        assert [p == 0.0 for p in logp_V.exp().tolist()] == [p == 0.0 for p in expected]


def test_ends_can_be_drawn_once_it_is_no_longer_early() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    late = drawn_from(logits, Sampling(), torch.tensor([1]), early=False)
    assert late[0].tolist() == pytest.approx(logits[0].log_softmax(-1).tolist())
    assert drawn_from(logits, Sampling(), torch.tensor([1]), early=True)[0, 1] == -math.inf


def test_draws_come_as_often_as_the_distribution_says() -> None:
    """Chi-square over five tokens, four degrees of freedom: 18.47 is the 0.1 % point."""
    probability = torch.tensor([0.5, 0.02, 0.2, 0.0, 0.28])
    draws = 20_000
    keys = np.array([randomness.key("draw", i) for i in range(draws)], dtype=np.uint64)
    uniform_B = torch.from_numpy(randomness.uniforms(keys, 0))
    tokens = draw(probability.expand(draws, -1), uniform_B)
    counts = torch.bincount(tokens, minlength=5).double()
    possible = probability > 0
    expected = probability.double() * draws
    assert counts[3] == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 18.47


def test_successive_tokens_of_one_answer_are_independent() -> None:
    """Joint frequencies of tokens t and t + 1 over a uniform of four; 15 degrees of freedom, 0.1 % point 37.7."""
    keys = np.array([randomness.key("pairs", i) for i in range(16_000)], dtype=np.uint64)
    quarter_BV = torch.full((len(keys), 4), 0.25)
    first, second = (draw(quarter_BV, torch.from_numpy(randomness.uniforms(keys, t))) for t in (6, 7))
    counts = torch.bincount(first * 4 + second, minlength=16).double()
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 37.7


def test_the_borders_of_the_unit_interval_draw_possible_tokens() -> None:
    probability_BV = torch.tensor([[0.0, 0.25, 0.5, 0.25, 0.0]]).expand(4, -1)
    uniform_B = torch.tensor([0.0, 0.25, 1.0 - 2.0**-53, 0.2499999], dtype=torch.float64)
    assert draw(probability_BV, uniform_B).tolist() == [1, 2, 3, 1]


def in_one_sum(probability_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """The draw by one cumulative sum over the whole vocabulary, in float64."""
    cumulative_BV = probability_BV.double().cumsum(-1)
    return torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True)[:, 0]


@pytest.mark.parametrize("size", [5, 63, 64, 65, 128, 1000, 6001])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_two_levels_draw_what_one_sum_draws(size: int, spread: float) -> None:
    """All but where u lies within rounding of a border: then the neighbour with mass."""
    noise = np.random.default_rng(size).normal(size=(400, size)).astype(np.float32)
    probability_BV = (torch.from_numpy(noise) * spread).softmax(-1)
    uniform_B = torch.from_numpy(np.random.default_rng(1).random(400))
    found, expected = draw(probability_BV, uniform_B), in_one_sum(probability_BV, uniform_B)
    below_BV = probability_BV.double().cumsum(-1) / probability_BV.double().sum(-1, keepdim=True)
    gap_B = (below_BV - uniform_B[:, None]).abs().amin(-1)
    assert bool((found == expected)[gap_B > 3e-7].all())
    assert float((found == expected).double().mean()) > 0.98
    assert bool((probability_BV.gather(1, found[:, None]) > 0).all())


def test_impossible_tokens_are_not_drawn_at_any_border() -> None:
    """Mass in the middle of a block, at its edges and in the last incomplete one; u at and next to every border."""
    size = 150
    for places in ([0], [63, 64], [70, 127, 128], [5, 149], [149]):
        probability_V = torch.zeros(size)
        probability_V[places] = torch.arange(1.0, len(places) + 1)
        probability_V /= probability_V.sum()
        borders = torch.cat([torch.zeros(1).double(), probability_V.double().cumsum(0)[places]])
        around = torch.cat([borders, borders - 2.0**-53, borders + 2.0**-53]).clamp(0, 1 - 2.0**-53)
        assert set(draw(probability_V.expand(len(around), -1), around).tolist()) == set(places)


def test_rows_that_are_no_numbers_give_an_id_all_the_same() -> None:
    """The engine refuses them by their log-probability, once for all rows."""
    assert 0 <= int(draw(torch.full((1, 70), float("nan")), torch.tensor([0.5], dtype=torch.float64))) < 70


def test_only_early_rows_cannot_end() -> None:
    logits_BV = torch.zeros(2, 3)
    logp_BV = drawn_from(logits_BV, Sampling(), torch.tensor([1]), early=torch.tensor([True, False]))
    assert logp_BV.isneginf().tolist() == [[False, True, False], [False, False, False]]
    assert not bool(logits_BV.isneginf().any()), "the model's own logits are left as they are"
