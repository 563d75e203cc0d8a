"""Laws of the objectives: what a mask hides is never seen, nothing overflows, gradients are the derivatives.

The formulas against their definitions are in tests/laws/test_sabotaged_twins.py and in the golden tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palate import losses

Formula = Callable[..., Tensor]
LAW = settings(deadline=None, derandomize=True, database=None, max_examples=40)
HALF = [torch.float32, torch.bfloat16, torch.float16]
GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -1e30]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spoiled(x: Tensor, mask: Tensor, garbage: float) -> Tensor:
    """A leaf with garbage in every cell off the mask."""
    return x.masked_fill(~mask, garbage).requires_grad_()


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss.sum(), leaves))


# Losses as an algorithm builds them: inputs kept within the mask, the formula, the sum within the mask.
def masked_cross_entropy(mask: Tensor, logp: Tensor) -> Tensor:
    return losses.cross_entropy(logp, mask)


def masked_surrogate(mask: Tensor, logp: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    return losses.keep(losses.clipped_surrogate(*(losses.keep(x, mask) for x in (logp, old, advantage)), 0.2), mask)


def masked_value_error(mask: Tensor, value: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    return losses.keep(losses.clipped_value_error(*(losses.keep(x, mask) for x in (value, old, returns)), 0.2), mask)


def masked_ranking(mask: Tensor, scores: Tensor) -> Tensor:
    return losses.ranking(scores, torch.tensor([2, 0, 1, 1, 3, 0]).expand(scores.shape), mask)


def masked_centring(mask: Tensor, scores: Tensor) -> Tensor:
    return losses.centring(scores, mask)


def masked_sum(mask: Tensor, logp: Tensor) -> Tensor:
    return losses.answer_logp(logp, mask)


def masked_mean(mask: Tensor, logp: Tensor) -> Tensor:
    return losses.answer_logp(logp, mask, average=True)


def masked_shared_length(mask: Tensor, logp: Tensor) -> Tensor:
    return losses.ld_logp(logp, mask, torch.tensor([2, 3]), 0.4)


def masked_spans(mask: Tensor, logp: Tensor) -> Tensor:
    return losses.ddpo_score(logp, mask, mask.long().cumsum(-1) % 2 == 0, 1.7)


def masked_sequence_ratio(mask: Tensor, logp: Tensor, old: Tensor) -> Tensor:
    return losses.sequence_log_ratio(logp, old, mask) + 0 * losses.keep(old, mask)  # a leaf without a gradient


def masked_q_learning(mask: Tensor, value: Tensor, q: Tensor, other: Tensor, reward: Tensor, logp: Tensor) -> Tensor:
    heads, targets = torch.stack([q, other, q - other], -1), torch.stack([other, q, q + other], -1)
    after = losses.next_value(value, mask)
    found = losses.ilql(heads, targets, value, after, reward, logp, mask, 0.7, 0.9, 0.1, 1.0, 0.5, mask.long())
    return found["total"] + 0 * losses.keep(reward, mask)  # a leaf without a gradient


MASKED = [
    masked_cross_entropy,
    masked_surrogate,
    masked_value_error,
    masked_ranking,
    masked_centring,
    masked_sum,
    masked_mean,
    masked_shared_length,
    masked_spans,
    masked_sequence_ratio,
    masked_q_learning,
]


def inputs_of(formula: Formula, rows: int) -> list[Tensor]:
    return [random(rows, 6, seed=seed) for seed in range(formula.__code__.co_argcount - 1)]


@pytest.mark.parametrize("formula", MASKED, ids=lambda f: f.__name__)
@LAW
@given(bits=st.lists(st.booleans(), min_size=12, max_size=12), garbage=st.sampled_from(GARBAGE))
def test_masked_cells_may_hold_anything(formula: Formula, bits: list[bool], garbage: float) -> None:
    mask = torch.tensor(bits).view(2, 6)
    found: list[list[Tensor]] = []
    for filling in (0.0, garbage):
        leaves = [spoiled(x, mask, filling) for x in inputs_of(formula, 2)]
        loss = formula(mask, *leaves)
        found.append([loss, *gradients(loss, *leaves)])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)
        assert torch.isfinite(dirty).all()
    for slope in found[1][1:]:
        assert (slope[~mask] == 0).all()


@pytest.mark.parametrize("formula", [f for f in MASKED if f is not masked_ranking], ids=lambda f: f.__name__)
@LAW
@given(left=st.integers(0, 4), right=st.integers(0, 4))
def test_padding_side_and_amount_never_matter(formula: Formula, left: int, right: int) -> None:
    mask, inputs = torch.ones(2, 6, dtype=torch.bool), inputs_of(formula, 2)
    padded = [torch.nn.functional.pad(x, (left, right), value=math.nan) for x in inputs]
    wide = torch.nn.functional.pad(mask, (left, right), value=False)
    torch.testing.assert_close(formula(wide, *padded).sum(), formula(mask, *inputs).sum(), rtol=1e-12, atol=1e-12)


@LAW
@given(places=st.permutations(range(8)))
def test_unused_places_of_a_ranking(places: list[int]) -> None:
    scores, ranks = random(1, 5), torch.tensor([[0, 1, 1, 2, 3]])
    wide, wide_ranks = torch.full((1, 8), math.nan, dtype=torch.float64), torch.full((1, 8), -7)
    here = torch.zeros(1, 8, dtype=torch.bool)
    wide[0, places[:5]], wide_ranks[0, places[:5]], here[0, places[:5]] = scores[0], ranks[0], True
    torch.testing.assert_close(losses.ranking(wide, wide_ranks, here), losses.ranking(scores, ranks))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("far", [800.0, -800.0])
def test_nothing_overflows_at_800(dtype: torch.dtype, far: float) -> None:
    """Each formula at ±800 against 0 and against ∓800, value and gradient."""
    for other in (0.0, -far):
        x = torch.full((2, 3), far, dtype=dtype, requires_grad=True)
        y = torch.full((2, 3), other, dtype=dtype, requires_grad=True)
        up, ranks = torch.ones(2, 3), torch.tensor([[0, 1, 1]] * 2)
        logits = torch.stack([x, y], -1)
        mixed = torch.stack([x[0], y[1]])
        found = {
            "row_logp": losses.row_logp(logits, torch.tensor([[0, 1, 1]] * 2), 0.7),
            "row_entropy": losses.row_entropy(logits, 0.7),
            "surrogate": losses.clipped_surrogate(x, y, up, 0.2),
            "surrogate down": losses.clipped_surrogate(x, y, -up, 0.2),
            "value error": losses.clipped_value_error(x, y, up, 0.2),
            "pair": losses.bradley_terry(x, y, 1.0),
            "soft pair": losses.soft_bradley_terry(x, y, 0.3),
            "ranking": losses.ranking(mixed.T, torch.tensor([[0, 1]] * 3)),
            "ties": losses.ranking(x, ranks),
            "centring": losses.centring(mixed),
            "best of": losses.best_of(mixed, torch.tensor([0, 1])),
        }
        for name, value in found.items():
            assert value.dtype == torch.float32, name
            assert torch.isfinite(value).all(), name
            for slope in torch.autograd.grad(value.sum(), (x, y), allow_unused=True, retain_graph=True):
                assert slope is None or torch.isfinite(slope).all(), name


def test_a_ratio_that_ran_away_is_pulled_back() -> None:
    """Past its bound the ratio has the slope of the bound: a bad token that became certain still loses."""
    logp = torch.tensor([800.0], requires_grad=True)
    loss = losses.clipped_surrogate(logp, torch.zeros(1), -torch.ones(1), 0.2)
    (slope,) = gradients(loss, logp)
    assert slope.item() == pytest.approx(math.exp(math.log(torch.finfo(torch.float32).max) / 2), rel=1e-4)
    assert losses.clipped_surrogate(logp, torch.zeros(1), torch.ones(1), 0.2).item() == pytest.approx(-1.2)


@LAW
@given(x=st.floats(-40, 40))
def test_the_bound_is_exact_inside_the_range(x: float) -> None:
    assert losses.bounded(torch.tensor(x), torch.zeros(())).item() == torch.tensor(x).item()


def test_precision_follows_the_input() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert losses.widen(torch.ones(1, dtype=dtype)).dtype == torch.float32
    assert losses.widen(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert losses.widen(torch.ones(1, dtype=torch.int64)).dtype == torch.float32
    ours = losses.bradley_terry(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert ours.dtype == torch.float64


def test_gradients_are_derivatives() -> None:
    """Autograd against central differences, away from the corners of the clips."""

    def leaf(*shape: int, seed: int) -> Tensor:
        return random(*shape, seed=seed).requires_grad_()

    a, b, c, tokens = leaf(2, 4, seed=1), leaf(2, 4, seed=2), leaf(2, 4, seed=3), torch.tensor([[0, 2, 1, 2]] * 2)
    ranks = torch.tensor([[0, 1, 2, 2], [3, 0, 1, 2]])
    checks: list[tuple[Formula, tuple[Tensor, ...]]] = [
        (lambda x: losses.token_logp(x, tokens, 0.7), (leaf(2, 4, 3, seed=4),)),
        (lambda x: losses.row_entropy(x, 0.7), (leaf(2, 4, 3, seed=4),)),
        (lambda x, y, z: losses.clipped_surrogate(x, y, z, 0.2, 0.3), (a, b, c)),
        (lambda x, y, z: losses.clipped_value_error(x, y, z, 0.2), (a, b, c)),
        (lambda x, y, z: losses.bradley_terry(x, y, z), (a, b, c)),
        (lambda x, y, z: losses.soft_bradley_terry(x, y, z.sigmoid(), 0.5), (a, b, c)),
        (lambda x: losses.ranking(x, ranks), (a,)),
        (losses.centring, (a,)),
        (lambda x: losses.best_of(x, torch.tensor([1, 3])), (a,)),
        (losses.rating_error, (a, b)),
        (losses.comparison_error, (a, b, c)),
    ]
    for formula, leaves in checks:
        assert torch.autograd.gradcheck(formula, leaves)


@LAW
@given(scores=st.lists(st.floats(-20, 20), min_size=2, max_size=2))
def test_one_family(scores: list[float]) -> None:
    """Bradley–Terry, a ranking of two, the best of two and a certain soft label are one function."""
    chosen, rejected = torch.tensor(scores, dtype=torch.float64)[:, None]
    pair = torch.stack([chosen, rejected], -1)
    expected = losses.bradley_terry(chosen, rejected)
    for same in (
        losses.ranking(pair, torch.tensor([[0, 1]])),
        losses.best_of(pair, torch.tensor([0])),
        losses.soft_bradley_terry(chosen, rejected, 1.0),
        losses.soft_bradley_terry(rejected, chosen, 0.0),
    ):
        torch.testing.assert_close(same, expected, rtol=1e-9, atol=1e-12)


def test_both_tails_are_exact() -> None:
    """softplus would miss log1p(e^−20.5) = 1.3e-9 at a gap of −20.5."""
    gap = torch.tensor([-20.5], dtype=torch.float64)
    exact = 20.5 + math.log1p(math.exp(-20.5))
    assert losses.bradley_terry(gap, torch.zeros_like(gap)).item() == pytest.approx(exact, rel=1e-15)


def test_a_prompt_without_a_comparable_pair_gives_nothing() -> None:
    scores = random(3, 4).requires_grad_()
    ranks = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 3], [0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    loss = losses.ranking(scores, ranks, mask)
    assert loss.tolist() == [0.0, 0.0, 0.0]
    assert not gradients(loss, scores)[0].any()
    assert losses.centring(scores, mask)[1:].tolist() == [0.0, 0.0]


def test_absent_answers_are_never_the_best() -> None:
    scores = torch.tensor([[0.3, -0.2, -math.inf]], dtype=torch.float64, requires_grad=True)
    loss = losses.best_of(scores, torch.tensor([1]))
    torch.testing.assert_close(loss, losses.best_of(scores[:, :2], torch.tensor([1])))
    assert gradients(loss, scores)[0][0, 2] == 0


def test_tokens_beyond_the_vocabulary() -> None:
    """Ids the tokenizer does not have: as logits of −∞ they take no part, as tokens they cannot be drawn."""
    logits = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    masked = logits.masked_fill(torch.arange(5) >= 4, -math.inf)
    torch.testing.assert_close(losses.row_entropy(masked), losses.row_entropy(logits[..., :4]))
    tokens = torch.tensor([[1, 50259, -100]])
    logp = losses.token_logp(masked, tokens)
    assert logp[0].tolist() == [0.0, -math.inf, -math.inf]
    loss = losses.cross_entropy(logp, torch.tensor([[True, False, False]]))
    entropy = losses.row_entropy(masked)
    assert torch.isfinite(gradients(loss + entropy.sum(), logits)[0]).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature"):
        losses.token_logp(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), temperature)


def test_an_infinite_clip_is_no_clip() -> None:
    new, old, advantage = (random(30, seed=s) for s in (1, 2, 3))
    torch.testing.assert_close(losses.clipped_surrogate(new, old, advantage, math.inf), -(new - old).exp() * advantage)
    torch.testing.assert_close(
        losses.clipped_value_error(new, old, advantage, math.inf), 0.5 * (new - advantage).square()
    )
