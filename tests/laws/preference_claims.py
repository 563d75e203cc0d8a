"""Claims about the objectives of pairs and of single labelled answers: definitions on plain numbers, and twins."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import torch

from palate import losses
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
    random,
    sign_flipped,
    swapped,
    with_argument,
)

BETA = 0.3
PAIRS = tuple(2 * random(8, seed=seed) - 3 for seed in range(1, 5))
"""Log-probabilities of eight pairs: chosen, rejected, and the same of the reference."""


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def per_pair(oracle: Callable[..., float]) -> list[float]:
    """The oracle of (chosen, rejected, ref_chosen, ref_rejected) for each pair."""
    return [oracle(*row) for row in zip(*(x.tolist() for x in PAIRS), strict=True)]


def check_pairs(oracle: Callable[..., float], *more: Any) -> Callable[[Formula], None]:
    return lambda formula: equal(formula(*PAIRS, BETA, *more), doubles(per_pair(oracle)))


def gain(c: float, r: float, qc: float, qr: float) -> float:
    return (c - r) - (qc - qr)


def of_gain(oracle: Callable[[float], float]) -> Callable[..., float]:
    return lambda *pair: oracle(BETA * gain(*pair))


def of_rewards(oracle: Callable[[float, float], float]) -> Callable[..., float]:
    return lambda c, r, qc, qr: oracle(BETA * (c - qc), BETA * (r - qr))


def pair_claim(formula: Formula, check: Callable[[Formula], None], **twins: Formula) -> Claim:
    """Twins of every loss of pairs: sides swapped, reference dropped, β dropped."""
    return claim(
        formula,
        check,
        sides_swapped=lambda c, r, qc, qr, *more: formula(r, c, qr, qc, *more),
        reference_dropped=lambda c, r, qc, qr, *more: formula(c, r, 0 * qc, 0 * qr, *more),
        beta_dropped=altered(formula, beta=1.0),
        **twins,
    )


# --- pairs -----------------------------------------------------------------------------------------------------------


def check_dpo(dpo: Formula) -> None:
    check_pairs(of_gain(nls))(dpo)
    check_pairs(of_gain(lambda g: 0.8 * nls(g) + 0.2 * nls(-g)), 0.2)(dpo)
    belief = torch.linspace(0, 1, 8, dtype=torch.float64)
    expected = [(1 - e) * nls(g) + e * nls(-g) for g, e in zip(per_pair(of_gain(float)), belief.tolist(), strict=True)]
    equal(dpo(*PAIRS, BETA, belief), doubles(expected))


def check_simple(formula: Formula, oracle: Callable[[float, float], float], *more: Any) -> None:
    """Losses without a reference."""
    expected = [oracle(c, r) for c, r in zip(*(x.tolist() for x in PAIRS[:2]), strict=True)]
    equal(formula(*PAIRS[:2], *more), doubles(expected))


def check_implicit_reward(implicit_reward: Formula) -> None:
    check_simple(implicit_reward, lambda c, r: BETA * (c - r), BETA)


def check_cpo(cpo: Formula) -> None:
    check_simple(cpo, lambda c, r: 0.9 * nls(BETA * (c - r)) + 0.1 * nls(BETA * (r - c)), BETA, 0.1)


def check_simpo(simpo: Formula) -> None:
    check_simple(simpo, lambda c, r: nls(2.5 * c - 2.5 * r - 1.4), 2.5, 1.4)


def check_slic(slic: Formula) -> None:
    check_simple(slic, lambda c, r: max(0.0, 2.0 - c + r) - 0.3 * c, 2.0, 0.3)


def check_wpo_weight(wpo_weight: Formula) -> None:
    check_simple(wpo_weight, lambda c, r: min(1.0, math.exp(c) * math.exp(r)))
    assert wpo_weight(torch.tensor(0.4), torch.tensor(0.1)) == 1.0  # what an aligned log-probability may reach
    leaf = torch.tensor([-1.0], requires_grad=True)
    assert not wpo_weight(leaf, leaf).requires_grad


def odds(logp: float) -> float:
    return math.log(math.exp(logp) / (1 - math.exp(logp)))


def check_log_odds(log_odds: Formula) -> None:
    logp = -random(8).abs() - 0.1
    equal(log_odds(logp), doubles([odds(x) for x in logp.tolist()]))
    assert math.isfinite(log_odds(torch.zeros(())))


def check_log1mexp(log1mexp: Formula) -> None:
    a = -random(8).abs() - 0.1
    equal(log1mexp(a), doubles([math.log(1 - math.exp(x)) for x in a.tolist()]))
    equal(log1mexp(doubles([-1e-11, -30.0])), doubles([math.log(1e-11), -math.exp(-30)]))
    assert log1mexp(doubles([-30.0])).item() < -9e-14


def check_orpo(orpo: Formula) -> None:
    chosen, rejected = -random(8, seed=1).abs() - 0.1, -random(8, seed=2).abs() - 0.1
    expected = [nls(odds(c) - odds(r)) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    equal(orpo(chosen, rejected), doubles(expected))


def check_exo_pair(exo: Formula) -> None:
    def divergence(g: float) -> float:
        p = sigmoid(g)
        return p * math.log(p / 0.9) + (1 - p) * math.log((1 - p) / 0.1)

    check_pairs(of_gain(divergence), 0.1)(exo)


def check_aot(sides: Callable[..., tuple[float, float]]) -> Callable[[Formula], None]:
    """The first of the two numbers of each pair, sorted, against the second, sorted."""

    def check(aot: Formula) -> None:
        both = [sides(*row) for row in zip(*(x.tolist() for x in PAIRS), strict=True)]
        first, second = (sorted(x) for x in zip(*both, strict=True))
        gaps = [BETA * (a - b) for a, b in zip(first, second, strict=True)]
        equal(aot(*PAIRS, BETA, 0.1), doubles([0.9 * nls(g) + 0.1 * nls(-g) for g in gaps]))

    return check


def modulated(g: float) -> float:
    m = sigmoid(g / 0.5)
    return (1 - m) * nls(g) + m * math.exp(-g)


def fallen(c: float, r: float, qc: float, qr: float) -> float:
    return nls(BETA * (gain(c, r, qc, qr) - 2.0 * max(0.0, qc - c)))


def alpha_divergence(u: complex) -> complex:
    alpha = 0.3
    return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


GENERATORS: dict[str, Callable[[complex], complex]] = {
    "reverse_kl": lambda u: u * cmath.log(u),
    "forward_kl": lambda u: -cmath.log(u),
    "js": lambda u: u * cmath.log(u) - (u + 1) * cmath.log((u + 1) / 2),
    "alpha": alpha_divergence,
}


def check_f_dpo(f_dpo: Formula) -> None:
    """f′ by a complex step through the generator f, so that its table is not copied."""
    for name, f in GENERATORS.items():

        def slope(log_ratio: float, f: Callable[[complex], complex] = f) -> float:
            return f(complex(math.exp(log_ratio), 1e-30)).imag / 1e-30

        def expected(c: float, r: float, qc: float, qr: float, slope: Callable[[float], float] = slope) -> float:
            return nls(BETA * (slope(c - qc) - slope(r - qr)))

        equal(f_dpo(*PAIRS, BETA, name, 0.3), doubles(per_pair(expected)))
    equal(f_dpo(*PAIRS, BETA, "alpha", 1.0), f_dpo(*PAIRS, BETA, "forward_kl"))
    equal(f_dpo(*PAIRS, BETA, "alpha", 0.0), f_dpo(*PAIRS, BETA, "reverse_kl"))


# --- whole answers ---------------------------------------------------------------------------------------------------


def check_answer_logp(answer_logp: Formula) -> None:
    logp = random(3, 6)
    sums = [sum(float(logp[b, t]) for t in cells(b)) for b in range(3)]
    equal(answer_logp(filled(logp), MASK), doubles(sums))
    equal(answer_logp(filled(logp), MASK, True), doubles([s / len(cells(b)) for b, s in enumerate(sums)]))
    equal(answer_logp(filled(logp), torch.zeros_like(MASK), True), torch.zeros(3, dtype=torch.float64))


def check_ld_logp(ld_logp: Formula) -> None:
    logp, shared = random(3, 6), [2, 4, 5]
    expected = [
        sum(float(logp[b, t]) * (1.0 if i < shared[b] else 0.4) for i, t in enumerate(cells(b))) for b in range(3)
    ]
    equal(ld_logp(filled(logp), MASK, torch.tensor(shared), 0.4), doubles(expected))


def check_ddpo_score(ddpo_score: Formula) -> None:
    logp, corrected = random(3, 6), torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()
    sums, counts = [0.0] * 3, [0.0] * 3
    for b in range(3):
        for t in cells(b):
            weight = 1.7 if corrected[b, t] else 1.0
            sums[b], counts[b] = sums[b] + weight * float(logp[b, t]), counts[b] + weight
    equal(ddpo_score(filled(logp), MASK, corrected, 1.7), doubles([s / n for s, n in zip(sums, counts, strict=True)]))
    equal(ddpo_score(filled(logp), MASK, corrected, 1.7, normalise=False), doubles(sums))


# --- single answers --------------------------------------------------------------------------------------------------

GOOD = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]).bool()


def labelled(formula: Formula, oracle: Callable[[float, bool], float], *more: Any) -> None:
    ratio = [c - r for c, r in zip(*(x.tolist() for x in PAIRS[:2]), strict=True)]
    expected = [oracle(x, good) for x, good in zip(ratio, GOOD.tolist(), strict=True)]
    equal(formula(*PAIRS[:2], GOOD, *more), doubles(expected))


def check_kto(kto: Formula) -> None:
    def oracle(r: float, good: bool) -> float:
        return 1.2 * (1 - sigmoid(BETA * (r - 0.7))) if good else 1.5 * (1 - sigmoid(BETA * (0.7 - r)))

    labelled(kto, oracle, torch.tensor(0.7, dtype=torch.float64), BETA, 1.2, 1.5)


def check_kto_kl(kto_kl: Formula) -> None:
    logp, ref = doubles([-1.0, -5.0, -2.0]), doubles([-2.0, -4.5, -4.0])
    equal(kto_kl(logp, ref), doubles([2.5 / 3])[0])
    assert kto_kl(ref, logp) == 0.0
    leaf = logp.clone().requires_grad_()
    assert not kto_kl(leaf, ref).requires_grad


def check_bco(bco: Formula) -> None:
    labelled(bco, lambda r, good: nls(BETA * r - 0.4) if good else nls(0.4 - BETA * r), BETA, 0.4)


def labelled_claim(formula: Formula, check: Callable[[Formula], None], **twins: Formula) -> Claim:
    return claim(
        formula,
        check,
        labels_flipped=with_argument(formula, "desirable", lambda good: ~good),
        reference_dropped=with_argument(formula, "ref_logp", torch.zeros_like),
        beta_dropped=altered(formula, beta=1.0),
        **twins,
    )


CLAIMS = [
    claim(losses.implicit_reward, check_implicit_reward, swapped=swapped(losses.implicit_reward)),
    pair_claim(losses.dpo, check_dpo, never_smoothed=altered(losses.dpo, label_smoothing=0.0)),
    pair_claim(
        losses.soft_dpo,
        check_pairs(of_gain(lambda g: 0.7 * nls(g) + 0.3 * nls(-g)), 0.7),
        target_flipped=with_argument(losses.soft_dpo, "target", lambda p: 1 - p),
    ),
    pair_claim(
        losses.robust_dpo,
        check_pairs(of_gain(lambda g: (0.8 * nls(g) - 0.2 * nls(-g)) / 0.6), 0.2),
        smoothed=losses.dpo,
        clamped=lambda *args: losses.robust_dpo(*args).clamp(min=0.7),
    ),
    pair_claim(losses.hinge, check_pairs(of_gain(lambda g: max(0.0, 1 - g)))),
    pair_claim(losses.ipo, check_pairs(lambda *pair: (gain(*pair) - 1 / (2 * BETA)) ** 2)),
    pair_claim(losses.exo_pair, check_exo_pair, other_way=losses.dpo),
    pair_claim(losses.nca_pair, check_pairs(of_rewards(lambda up, down: nls(up) + 0.5 * nls(-up) + 0.5 * nls(-down)))),
    pair_claim(
        losses.bco_pair,
        check_pairs(of_rewards(lambda up, down: nls(up - 0.4) + nls(-(down - 0.4))), 0.4),
        shift_dropped=altered(losses.bco_pair, shift=0.0),
        shift_added=with_argument(losses.bco_pair, "shift", lambda shift: -shift),
    ),
    pair_claim(
        losses.sppo_hard,
        check_pairs(lambda c, r, qc, qr: (c - qc - 0.5 / BETA) ** 2 + (r - qr + 0.5 / BETA) ** 2),
    ),
    pair_claim(
        losses.apo_zero, check_pairs(of_rewards(lambda up, down: 1 - sigmoid(up) + sigmoid(down))), down=losses.apo_down
    ),
    pair_claim(
        losses.apo_down,
        check_pairs(of_rewards(lambda up, down: sigmoid(up) + 1 - sigmoid(up - down))),
        zero=losses.apo_zero,
    ),
    pair_claim(losses.aot, check_aot(lambda c, r, qc, qr: (c - r, qc - qr)), unsorted=losses.dpo),
    pair_claim(losses.aot_unpaired, check_aot(lambda c, r, qc, qr: (c - qc, r - qr)), unsorted=losses.dpo),
    pair_claim(
        losses.discopop,
        check_pairs(of_gain(modulated), 0.5),
        never_modulated=losses.dpo,
        tau_dropped=altered(losses.discopop, tau=1.0),
    ),
    pair_claim(losses.dpop, check_pairs(fallen, 2.0), penalty_dropped=altered(losses.dpop, penalty=0.0)),
    pair_claim(losses.f_dpo, check_f_dpo, always_reverse=altered(losses.f_dpo, divergence="reverse_kl")),
    claim(
        losses.cpo,
        check_cpo,
        sides_swapped=swapped(losses.cpo),
        never_smoothed=altered(losses.cpo, label_smoothing=0.0),
    ),
    claim(
        losses.simpo,
        check_simpo,
        sides_swapped=swapped(losses.simpo),
        margin_dropped=altered(losses.simpo, gamma=0.0),
        margin_added=with_argument(losses.simpo, "gamma", lambda gamma: -gamma),
        margin_in_units_of_beta=lambda c, r, beta, gamma: losses.simpo(c, r, beta, beta * gamma),
    ),
    claim(
        losses.slic,
        check_slic,
        sides_swapped=swapped(losses.slic),
        likelihood_dropped=altered(losses.slic, weight=0.0),
        margin_dropped=altered(losses.slic, delta=0.0),
    ),
    claim(
        losses.orpo,
        check_orpo,
        sides_swapped=swapped(losses.orpo),
        probabilities_for_odds=losses.bradley_terry,
    ),
    claim(losses.log_odds, check_log_odds, log_of_p=lambda logp: logp),
    claim(
        losses.log1mexp,
        check_log1mexp,
        naive=lambda a: (1 - a.exp()).log(),
        upside_down=lambda a: losses.log1mexp(-a),
    ),
    claim(
        losses.wpo_weight,
        check_wpo_weight,
        never_bounded=lambda c, r: (c + r).exp().detach(),
        gradient_kept=lambda c, r: (c + r).clamp(max=0).exp(),
    ),
    claim(losses.answer_logp, check_answer_logp, "mask_BT", never_averaged=altered(losses.answer_logp, average=False)),
    claim(
        losses.ld_logp,
        check_ld_logp,
        "mask_BT",
        plain=altered(losses.ld_logp, alpha=1.0),
        places_counted_from_the_left=lambda logp, mask, shared, alpha: losses.ld_logp(
            logp.masked_fill(~mask, 0.0), torch.ones_like(mask), shared, alpha
        ),
    ),
    claim(
        losses.ddpo_score,
        check_ddpo_score,
        "mask_BT",
        weight_dropped=altered(losses.ddpo_score, gamma=1.0),
        never_normalised=altered(losses.ddpo_score, normalise=False),
        spans_flipped=with_argument(losses.ddpo_score, "corrected_BT", lambda spans: ~spans),
    ),
    labelled_claim(
        losses.kto,
        check_kto,
        point_dropped=altered(losses.kto, kl=0.0),
        weights_dropped=altered(losses.kto, weight_desirable=1.0, weight_undesirable=1.0),
    ),
    Claim(
        losses.kto_kl,
        check_kto_kl,
        {
            "sign_flipped": sign_flipped(losses.kto_kl),
            "swapped": swapped(losses.kto_kl),
            "never_clamped": lambda logp, ref: (logp - ref).mean().detach(),
            "gradient_kept": lambda logp, ref: (logp - ref).mean().clamp(min=0),
        },
    ),
    labelled_claim(losses.bco, check_bco, shift_dropped=altered(losses.bco, shift=0.0)),
]
