"""Every formula has an oracle written the slow way, and the oracle rejects the formula's sabotaged twins.

A `Claim` is a check that calls a formula and compares it with plain Python, and the twins of that formula: the same
with its sign flipped, its mask dropped, its clip removed, or another mistake that has been made in a known system.
One harness runs the check on the real formula, which must pass, and on each twin, which must not.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from palate import credit, losses
from tests.laws.credit_claims import CLAIMS as CREDIT
from tests.laws.offline_claims import CLAIMS as OFFLINE
from tests.laws.preference_claims import CLAIMS as PREFERENCE
from tests.laws.twins import (
    MASK,
    Claim,
    Formula,
    altered,
    cells,
    claim,
    doubles,
    equal,
    filled,
    nls,
    pair_of,
    random,
    swapped,
    with_argument,
)

NOT_FORMULAS = {"widen", "bounded"}  # precision and range: tests/losses/test_losses.py


# --- losses ----------------------------------------------------------------------------------------------------------


def check_keep(keep: Formula) -> None:
    x = random(3, 6)
    equal(keep(filled(x), MASK), [[x[b, t] if MASK[b, t] else 0.0 for t in range(6)] for b in range(3)])


def softmax(logits: Tensor, temperature: float = 0.7) -> list[float]:
    powers = [math.exp(float(x) / temperature) for x in logits]
    return [power / sum(powers) for power in powers]


def check_row_logp(row_logp: Formula) -> None:
    logits, tokens = random(4, 5), torch.tensor([0, 4, 2, 2])
    expected = [math.log(softmax(row)[t]) for row, t in zip(logits, tokens.tolist(), strict=True)]
    equal(row_logp(logits, tokens, 0.7), doubles(expected))


def check_token_logp(token_logp: Formula) -> None:
    logits, tokens = random(2, 4, 5), torch.tensor([[0, 4, 2, 2], [1, 1, 3, 0]])
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for b in range(2):
        for t in range(1, 4):
            expected[b, t] = math.log(softmax(logits[b, t - 1])[int(tokens[b, t])])
    equal(token_logp(logits, tokens, 0.7), expected)


def check_row_entropy(row_entropy: Formula) -> None:
    logits = random(4, 5)
    expected = [-sum(p * math.log(p) for p in softmax(row)) for row in logits]
    equal(row_entropy(logits, 0.7), doubles(expected))


def check_cross_entropy(cross_entropy: Formula) -> None:
    logp = -random(3, 6).abs()
    equal(cross_entropy(filled(logp), MASK), [[-logp[b, t] if MASK[b, t] else 0.0 for t in range(6)] for b in range(3)])


def check_clipped_surrogate(clipped_surrogate: Formula) -> None:
    new, old, advantage = random(40, seed=1), random(40, seed=2), random(40, seed=3)
    for high, dual in ((None, None), (0.5, None), (0.5, 1.6)):
        above, expected = high or 0.2, []
        for n, o, a in zip(new.tolist(), old.tolist(), advantage.tolist(), strict=True):
            ratio = math.exp(n) / math.exp(o)
            gain = min(ratio * a, max(0.8, min(1 + above, ratio)) * a)
            expected.append(-max(gain, dual * a) if dual and a < 0 else -gain)
        equal(clipped_surrogate(new, old, advantage, 0.2, high, dual), doubles(expected))


def optimistic_surrogate(
    new: Tensor, old: Tensor, advantage: Tensor, clip: float, high: float | None, dual: float | None
) -> Tensor:
    return -losses.clipped_surrogate(new, old, -advantage, clip, high, dual)


def check_clipped_value_error(clipped_value_error: Formula) -> None:
    value, old, returns = random(40, seed=1), random(40, seed=2), random(40, seed=3)
    expected: list[float] = []
    for v, o, r in zip(value.tolist(), old.tolist(), returns.tolist(), strict=True):
        near = max(o - 0.2, min(o + 0.2, v))
        expected.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    equal(clipped_value_error(value, old, returns, 0.2), doubles(expected))


def check_bradley_terry(bradley_terry: Formula) -> None:
    chosen, rejected, margin = random(5, seed=1), random(5, seed=2), random(5, seed=3).abs()
    expected = [nls(float(c - r - m)) for c, r, m in zip(chosen, rejected, margin, strict=True)]
    equal(bradley_terry(chosen, rejected, margin), doubles(expected))


def check_soft_bradley_terry(soft: Formula) -> None:
    chosen, rejected, target = random(5, seed=1), random(5, seed=2), random(5, seed=3).sigmoid()
    gaps = [float(c - r) for c, r in zip(chosen, rejected, strict=True)]
    expected = [p * nls(d) + (1 - p) * nls(-d) for d, p in zip(gaps, target.tolist(), strict=True)]
    equal(soft(chosen, rejected, target), doubles(expected))


def pair_mean(row: int, wanted: Callable[[int, int], bool], value: Callable[[int, int], float]) -> float:
    found = [value(i, j) for i in cells(row) for j in cells(row) if wanted(i, j)]
    return sum(found) / len(found) if found else 0.0


def check_ranking(ranking: Formula) -> None:
    s, ranks = random(3, 6), torch.tensor([[0, 1, 1, 2, 0, 3], [2, 0, 1, 1, 0, 3], [0, 0, 0, 0, 1, 1]])
    expected = [
        pair_mean(b, lambda i, j, b=b: bool(ranks[b, i] < ranks[b, j]), lambda i, j, b=b: nls(float(s[b, i] - s[b, j])))
        for b in range(3)
    ]
    assert expected[2] == 0.0
    equal(ranking(filled(s), ranks, MASK), doubles(expected))


def check_centring(centring: Formula) -> None:
    s = random(3, 6)
    expected = [pair_mean(b, lambda i, j: i < j, lambda i, j, b=b: float(s[b, i] + s[b, j]) ** 2) for b in range(3)]
    equal(centring(filled(s), MASK), doubles(expected))


def check_best_of(best_of: Formula) -> None:
    scores, choice = random(3, 4), [2, 0, 3]
    expected = [-math.log(softmax(row, 1.0)[c]) for row, c in zip(scores, choice, strict=True)]
    equal(best_of(scores, torch.tensor(choice)), doubles(expected))


def check_rating_error(rating_error: Formula) -> None:
    equal(rating_error(torch.tensor([1.0, -2.0]), torch.tensor([3.0, -2.5])), torch.tensor([4.0, 0.25]))


def check_comparison_error(comparison_error: Formula) -> None:
    first, second, difference = torch.tensor([1.0, 0.0]), torch.tensor([2.0, -3.0]), torch.tensor([3.0, -1.0])
    equal(comparison_error(first, second, difference), torch.tensor([4.0, 4.0]))


# --- credit ----------------------------------------------------------------------------------------------------------


def check_gae(gae: Formula) -> None:
    reward, value, gamma, lam = random(3, 6, seed=1), random(3, 6, seed=2), 0.9, 0.8
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for b in range(3):
        at = cells(b)
        after = [float(value[b, t]) for t in at[1:]] + [0.0]
        delta = [float(reward[b, t]) + gamma * n - float(value[b, t]) for t, n in zip(at, after, strict=True)]
        for i, t in enumerate(at):
            expected[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
    equal(gae(filled(reward), filled(value), MASK, gamma, lam), expected)


def check_whiten(whiten: Formula) -> None:
    x = random(3, 6)
    inside = x[MASK].tolist()
    middle = sum(inside) / len(inside)
    variance = sum((v - middle) ** 2 for v in inside) / len(inside)
    for shift in (True, False):
        one = (x - middle) / math.sqrt(variance + 1e-8) + (0.0 if shift else middle)
        equal(whiten(filled(x), MASK, shift), torch.where(MASK, one, 0.0))


def check_kl(formula: Callable[[float], float]) -> Callable[[Formula], None]:
    def check(kl: Formula) -> None:
        logp, ref = random(30, seed=1), random(30, seed=2)
        expected = [formula(float(a - b)) for a, b in zip(logp, ref, strict=True)]
        equal(kl(logp, ref), doubles(expected))

    return check


def siblings(reward: Sequence[float], row: int, group: int) -> list[float]:
    return list(reward[row // group * group :][:group])


def check_within_group(within_group: Formula) -> None:
    reward, group = random(12).tolist(), 4
    for scale in (True, False):
        expected: list[float] = []
        for row, r in enumerate(reward):
            near = siblings(reward, row, group)
            variance = sum((x - sum(near) / group) ** 2 for x in near) / group + 1e-8
            expected.append((r - sum(near) / group) / (math.sqrt(variance) if scale else 1.0))
        equal(within_group(doubles(reward), group, scale), doubles(expected))


def check_leave_one_out(leave_one_out: Formula) -> None:
    reward, group = random(12).tolist(), 4
    expected = [r - (sum(siblings(reward, i, group)) - r) / (group - 1) for i, r in enumerate(reward)]
    found = leave_one_out(doubles(reward), group)
    equal(found, doubles(expected))


def check_last_true_index(last_true_index: Formula) -> None:
    mask = torch.cat([MASK, torch.zeros(1, 6, dtype=torch.bool)])
    equal(last_true_index(mask), torch.tensor([4, 5, 3, -1]))


def check_shape_reward(shape_reward: Formula) -> None:
    logp, ref, score = -random(3, 6, seed=1).abs(), -random(3, 6, seed=2).abs(), random(3, seed=3)
    for position, places in (("last", [4, 5, 3]), ("after", [5, 5, 4])):
        expected = torch.where(MASK, -0.3 * (logp - ref), 0.0)
        expected[range(3), places] += score
        equal(shape_reward(score, filled(logp), filled(ref, -2.5), MASK, 0.3, position), expected)


def check_truncate_after(truncate_after: Formula) -> None:
    tokens = torch.tensor([[9, 1, 9, 2, 9], [9, 9, 1, 1, 1], [1, 2, 3, 4, 9]])
    cut, found = truncate_after(tokens, 9, 2, -1)
    equal(cut, torch.tensor([[9, 1, 9, -1, -1], [9, 9, 1, 1, 1], [1, 2, 3, 4, 9]]))
    equal(found, torch.tensor([True, False, True]))


def check_missing_eos_penalty(missing_eos_penalty: Formula) -> None:
    score, finished = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([True, False, False])
    equal(missing_eos_penalty(score, finished, -1.0), torch.tensor([2.0, -1.0, -1.0]))
    equal(missing_eos_penalty(score, finished, 1.0, "subtract"), torch.tensor([2.0, -4.0, -0.5]))
    equal(missing_eos_penalty(score, finished, -1.0, "subtract"), torch.tensor([2.0, -4.0, -0.5]))


def check_gain_and_bias(gain_and_bias: Formula) -> None:
    reward = [0.5, -1.0, 4.0, 2.5]
    gain, bias = gain_and_bias(torch.tensor(reward), 0.5, 2.0)
    scaled = [gain * r + bias for r in reward]
    assert sum(scaled) / 4 == pytest.approx(0.5)
    assert math.sqrt(sum((s - 0.5) ** 2 for s in scaled) / 4) == pytest.approx(2.0)
    assert gain > 0


TRUNCATIONS = {
    "found flipped": pair_of(lambda cut, found: (cut, ~found), credit.truncate_after),
    "after ignored": altered(credit.truncate_after, after=0),
}
SCALES = {
    "sign flipped": pair_of(lambda gain, bias: (-gain, -bias), credit.gain_and_bias),
    "sample deviation": altered(credit.gain_and_bias, sample=True),
}
CLAIMS = [
    claim(losses.keep, check_keep, "mask"),
    claim(losses.row_logp, check_row_logp, cold=altered(losses.row_logp, temperature=1.0)),
    claim(losses.token_logp, check_token_logp, unshifted=losses.row_logp),
    claim(losses.row_entropy, check_row_entropy, cold=altered(losses.row_entropy, temperature=1.0)),
    claim(losses.cross_entropy, check_cross_entropy, "mask"),
    claim(
        losses.clipped_surrogate,
        check_clipped_surrogate,
        symmetric=altered(losses.clipped_surrogate, clip_high=None),
        clipped_once=altered(losses.clipped_surrogate, dual_clip=None),
        optimistic=optimistic_surrogate,
        upside_down=swapped(losses.clipped_surrogate),
    ),
    claim(losses.clipped_value_error, check_clipped_value_error, old_for_new=swapped(losses.clipped_value_error)),
    claim(
        losses.bradley_terry,
        check_bradley_terry,
        sides_swapped=swapped(losses.bradley_terry),
        margin_dropped=altered(losses.bradley_terry, margin=0.0),
        margin_added=with_argument(losses.bradley_terry, "margin", torch.neg),
    ),
    claim(
        losses.soft_bradley_terry,
        check_soft_bradley_terry,
        sides_swapped=swapped(losses.soft_bradley_terry),
        hard=altered(losses.soft_bradley_terry, target=1.0),
    ),
    claim(losses.ranking, check_ranking, "mask_BK", best_last=with_argument(losses.ranking, "rank_BK", torch.neg)),
    claim(losses.centring, check_centring, "mask_BK"),
    claim(losses.best_of, check_best_of),
    claim(losses.rating_error, check_rating_error),
    claim(losses.comparison_error, check_comparison_error, order_swapped=swapped(losses.comparison_error)),
    claim(credit.gae, check_gae, "mask_BT"),
    claim(credit.whiten, check_whiten, "mask"),
    claim(credit.kl_k1, check_kl(lambda d: d), other_way=swapped(credit.kl_k1)),
    claim(credit.kl_k2, check_kl(lambda d: d * d / 2)),
    claim(credit.kl_k3, check_kl(lambda d: math.exp(-d) - 1 + d), other_way=swapped(credit.kl_k3)),
    claim(
        credit.within_group,
        check_within_group,
        never_scaled=altered(credit.within_group, scale=False),
        one_group=altered(credit.within_group, group=12),
    ),
    claim(credit.leave_one_out, check_leave_one_out, itself_included=altered(credit.within_group, scale=False)),
    claim(credit.last_true_index, check_last_true_index, count_of_trues=lambda mask: mask.sum(-1) - 1),
    claim(
        credit.shape_reward,
        check_shape_reward,
        "mask_BT",
        kl_paid=with_argument(credit.shape_reward, "kl_coef", lambda beta: -beta),
        always_last=altered(credit.shape_reward, position="last"),
    ),
    claim(credit.missing_eos_penalty, check_missing_eos_penalty, "finished_B"),
    Claim(credit.truncate_after, check_truncate_after, TRUNCATIONS),
    Claim(credit.gain_and_bias, check_gain_and_bias, SCALES),
    *CREDIT,
    *PREFERENCE,
    *OFFLINE,
]
TWINS = [
    pytest.param(c, twin, id=f"{c.formula.__name__}: {name.replace('_', ' ')}")
    for c in CLAIMS
    for name, twin in c.twins.items()
]


@pytest.mark.parametrize("case", CLAIMS, ids=lambda c: c.formula.__name__)
def test_a_formula_is_its_definition(case: Claim) -> None:
    case.check(case.formula)


@pytest.mark.parametrize(("case", "twin"), TWINS)
def test_a_sabotaged_twin_is_rejected(case: Claim, twin: Formula) -> None:
    with pytest.raises(AssertionError):
        case.check(twin)


@pytest.mark.parametrize("module", [losses, credit], ids=["losses", "credit"])
def test_every_formula_has_a_claim(module: Any) -> None:
    """A formula belongs to the module or, if that is a package, to one of its files."""

    def belongs(function: Any) -> bool:
        return f"{function.__module__}.".startswith(f"{module.__name__}.")

    own = {n for n, f in vars(module).items() if inspect.isfunction(f) and belongs(f)}
    public = {name for name in own if not name.startswith("_")} - NOT_FORMULAS
    assert public == {c.formula.__name__ for c in CLAIMS if belongs(c.formula)}


def test_every_mask_has_its_twin() -> None:
    """A formula that takes a mask is also checked without it; the index of a mask *is* about the mask."""
    for case in CLAIMS:
        names = set(inspect.signature(case.formula).parameters)
        if names & {"mask", "mask_BK", "mask_BT"} and case.formula is not credit.last_true_index:
            assert "mask_dropped" in case.twins, case.formula
