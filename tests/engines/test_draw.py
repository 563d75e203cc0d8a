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
    tokens = draw(probability.log().expand(draws, -1), uniform_B)
    counts = torch.bincount(tokens, minlength=5).double()
    possible = probability > 0
    expected = probability.double() * draws
    assert counts[3] == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 18.47


def test_successive_tokens_of_one_answer_are_independent() -> None:
    """Joint frequencies of tokens t and t + 1 over a uniform of four; 15 degrees of freedom, 0.1 % point 37.7."""
    keys = np.array([randomness.key("pairs", i) for i in range(16_000)], dtype=np.uint64)
    logp_BV = torch.zeros(len(keys), 4).log_softmax(-1)
    first, second = (draw(logp_BV, torch.from_numpy(randomness.uniforms(keys, t))) for t in (6, 7))
    counts = torch.bincount(first * 4 + second, minlength=16).double()
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 37.7


def test_the_borders_of_the_unit_interval_draw_possible_tokens() -> None:
    logp_BV = torch.tensor([[0.0, 0.25, 0.5, 0.25, 0.0]]).log().expand(4, -1)
    uniform_B = torch.tensor([0.0, 0.25, 1.0 - 2.0**-53, 0.2499999], dtype=torch.float64)
    assert draw(logp_BV, uniform_B).tolist() == [1, 2, 3, 1]
