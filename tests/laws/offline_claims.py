"""Claims about the newer objectives of policies, and about offline Q-learning: slow definitions, and twins."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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
    random,
    swapped,
    with_argument,
)

# --- policies --------------------------------------------------------------------------------------------------------


def check_cispo(cispo: Formula) -> None:
    """Value and gradient: the weight is a constant."""
    old, advantage = random(40, seed=2), random(40, seed=3)
    for low in (math.inf, 0.4):
        new = random(40, seed=1).requires_grad_()
        found = cispo(new, old, advantage, 0.3, low)
        weights: list[float] = []
        for n, o in zip(new.tolist(), old.tolist(), strict=True):
            weights.append(max(1 - low, min(1.3, math.exp(n) / math.exp(o))))
        equal(found, -doubles(weights) * advantage * new)
        equal(torch.autograd.grad(found.sum(), new)[0], -doubles(weights) * advantage)


def cispo_with_gradient(new: Tensor, old: Tensor, advantage: Tensor, high: float, low: float) -> Tensor:
    return -(new - old).exp().clamp(1 - low, 1 + high) * advantage * new


def check_sequence_log_ratio(sequence_log_ratio: Formula) -> None:
    """Value: the mean over the answer. Gradient of each token's copy: its own log-probability, with weight 1."""
    new, old = random(3, 6, seed=1), random(3, 6, seed=2)
    leaf = filled(new).requires_grad_()
    found = sequence_log_ratio(leaf, filled(old, -3.0), MASK)
    means = [sum(float(new[b, t] - old[b, t]) for t in cells(b)) / len(cells(b)) for b in range(3)]
    equal(found, torch.where(MASK, doubles(means)[:, None], 0.0))
    weight = random(3, 6, seed=3)
    equal(torch.autograd.grad((found * weight).sum(), leaf)[0], torch.where(MASK, weight, 0.0))


def check_added_mix(added_mix: Formula) -> None:
    equal(added_mix(doubles([0.37]), doubles([2.0]), 27.8), doubles([55.97]))


def check_convex_mix(convex_mix: Formula) -> None:
    equal(convex_mix(doubles([0.37]), doubles([2.0]), 0.9), doubles([1.837]))


# --- offline Q-learning ----------------------------------------------------------------------------------------------


def check_expectile_error(expectile_error: Formula) -> None:
    u = random(40)
    equal(expectile_error(u, 0.8), doubles([(0.8 if x >= 0 else 0.2) * x * x for x in u.tolist()]))


def check_next_value(next_value: Formula) -> None:
    value, expected = random(3, 6), torch.zeros(3, 6, dtype=torch.float64)
    for b in range(3):
        for here, after in zip(cells(b), cells(b)[1:], strict=False):
            expected[b, here] = value[b, after]
    equal(next_value(filled(value), MASK), expected)


def log_softmax(logits: Tensor) -> list[float]:
    powers = [math.exp(x) for x in logits.tolist()]
    return [math.log(p / sum(powers)) for p in powers]


def check_ilql_logits(ilql_logits: Formula) -> None:
    logits, first, second, v = random(3, 4, seed=1), random(3, 4, seed=2), random(3, 4, seed=3), random(3, seed=4)
    expected = [
        [
            own + 2.0 * (min(float(first[n, a]), float(second[n, a])) - float(v[n]))
            for a, own in enumerate(log_softmax(row))
        ]
        for n, row in enumerate(logits)
    ]
    equal(ilql_logits(logits, (first, second), v, 2.0), torch.tensor(expected, dtype=torch.float64))
    equal(ilql_logits(logits, torch.stack([first, second]), v, 2.0), torch.tensor(expected, dtype=torch.float64))


def ilql_inputs() -> dict[str, Any]:
    """Garbage off the mask everywhere, also in the actions."""

    def cube(seed: int) -> Tensor:
        return random(3, 6, 4, seed=seed).masked_fill(~MASK[..., None], 7.5)

    names = ("v_BT", "next_v_BT", "reward_BT", "logp_BT")
    return {
        "q_BTA": (cube(1), cube(2)),
        "target_q_BTA": torch.stack([cube(3), cube(4)]),
        **{name: filled(random(3, 6, seed=5 + i)) for i, name in enumerate(names)},
        "mask_BT": MASK,
        "tau": 0.7,
        "gamma": 0.9,
        "cql_weight": 0.1,
        "awac_weight": 0.5,
        "beta": 1.5,
        "action_BT": torch.tensor([[0, 1, 2, 3, 0, 1]] * 3).masked_fill(~MASK, -100),
    }


def ilql_by_definition(x: dict[str, Any], b: int, t: int) -> list[float]:
    """The five terms of one cell."""
    a = int(x["action_BT"][b, t])
    v, after, reward, logp = (float(x[name][b, t]) for name in ("v_BT", "next_v_BT", "reward_BT", "logp_BT"))
    heads = [q[b, t] for q in x["q_BTA"]]
    u = min(float(q[b, t, a]) for q in x["target_q_BTA"]) - v
    terms = [
        sum((float(q[a]) - (reward + x["gamma"] * after)) ** 2 for q in heads),
        (x["tau"] if u >= 0 else 1 - x["tau"]) * u * u,
        sum(-log_softmax(q)[a] for q in heads),
        -logp * math.exp(x["beta"] * u),
    ]
    return [*terms, terms[0] + terms[1] + x["cql_weight"] * terms[2] + x["awac_weight"] * terms[3]]


def check_ilql(ilql: Formula) -> None:
    x = ilql_inputs()
    expected = torch.zeros(5, 3, 6, dtype=torch.float64)
    for b in range(3):
        for t in cells(b):
            expected[:, b, t] = doubles(ilql_by_definition(x, b, t))
    found = ilql(**x)
    assert list(found) == ["q", "v", "cql", "awac", "total"]
    equal(torch.stack(list(found.values())), expected)
    frozen = {name: x[name].clone().requires_grad_() for name in ("target_q_BTA", "next_v_BT")}
    live = {name: x[name].clone().requires_grad_() for name in ("v_BT", "logp_BT")}
    found = ilql(**{**x, **frozen, **live})
    slopes = torch.autograd.grad(found["total"].sum(), [*live.values(), *frozen.values()], allow_unused=True)
    assert slopes[2] is slopes[3] is None
    awac = torch.autograd.grad(ilql(**{**x, **live})["awac"].sum(), live["v_BT"], allow_unused=True)[0]
    assert awac is None or not awac.any()


def ilql_negated(*args: Any, **more: Any) -> dict[str, Tensor]:
    return {name: -x for name, x in losses.ilql(*args, **more).items()}


def ilql_taken_inputs() -> dict[str, Any]:
    draws = [random(7, seed=20 + i) for i in range(10)]
    return {
        "q_HN": (draws[0], draws[1]),
        "total_HN": (draws[0].abs() + 1, draws[1].abs() + 2),
        "target_HN": (draws[2], draws[3]),
        **dict(zip(("v_N", "next_v_N", "reward_N", "logp_N"), draws[4:8], strict=True)),
        "tau": 0.7,
        "gamma": 0.9,
        "beta": 1.5,
    }


def check_ilql_taken(ilql_taken: Formula) -> None:
    x = ilql_taken_inputs()
    expected = torch.zeros(4, 7, dtype=torch.float64)
    for n in range(7):
        (q1, q2), (all1, all2), (slow1, slow2) = (
            [float(h[n]) for h in x[k]] for k in ("q_HN", "total_HN", "target_HN")
        )
        v, after, reward, logp = (float(x[k][n]) for k in ("v_N", "next_v_N", "reward_N", "logp_N"))
        goal, u = reward + x["gamma"] * after, min(slow1, slow2) - v
        expected[:, n] = doubles(
            [
                (q1 - goal) ** 2 + (q2 - goal) ** 2,
                (x["tau"] if u >= 0 else 1 - x["tau"]) * u * u,
                all1 - q1 + all2 - q2,
                -logp * math.exp(x["beta"] * u),
            ]
        )
    found = ilql_taken(**x)
    assert list(found) == ["q", "v", "cql", "awac"]
    equal(torch.stack(list(found.values())), expected)


ILQL_TAKEN_TWINS: dict[str, Formula] = {
    "sign_flipped": lambda **x: {name: -term for name, term in losses.ilql_taken(**x).items()},
    "expectile_upside_down": with_argument(losses.ilql_taken, "tau", lambda tau: 1 - tau),
    "undiscounted": altered(losses.ilql_taken, gamma=1.0),
    "behaviour_cloned": altered(losses.ilql_taken, beta=0.0),
    "one_head": lambda **x: losses.ilql_taken(**{**x, "q_HN": x["q_HN"][:1], "total_HN": x["total_HN"][:1]}),
    "one_target_head": with_argument(losses.ilql_taken, "target_HN", lambda heads: heads[:1]),
    "targets_trained": lambda **x: losses.ilql_taken(**{**x, "target_HN": x["q_HN"]}),
    "unnormalised": with_argument(losses.ilql_taken, "total_HN", lambda heads: [0 * head for head in heads]),
}

ILQL_TWINS: dict[str, Formula] = {
    "sign_flipped": ilql_negated,
    "mask_dropped": lambda **x: losses.ilql(
        **{**x, "mask_BT": torch.ones_like(x["mask_BT"]), "action_BT": x["action_BT"].clamp(min=0)}
    ),
    "expectile_upside_down": with_argument(losses.ilql, "tau", lambda tau: 1 - tau),
    "undiscounted": altered(losses.ilql, gamma=1.0),
    "behaviour_cloned": altered(losses.ilql, beta=0.0),
    "terms_unweighted": altered(losses.ilql, cql_weight=1.0, awac_weight=1.0),
    "one_head": with_argument(losses.ilql, "q_BTA", lambda q: q[0]),
    "one_target_head": with_argument(losses.ilql, "target_q_BTA", lambda q: q[0]),
    "targets_trained": lambda **x: losses.ilql(**{**x, "target_q_BTA": x["q_BTA"]}),
}

CLAIMS = [
    claim(
        losses.cispo,
        check_cispo,
        update_clipped=lambda new, old, advantage, high, low: losses.clipped_surrogate(new, old, advantage, low, high),
        gradient_kept=cispo_with_gradient,
        never_clipped=altered(losses.cispo, clip_high=math.inf),
    ),
    claim(
        losses.sequence_log_ratio,
        check_sequence_log_ratio,
        "mask_BT",
        per_token=lambda new, old, mask: torch.where(mask, new - old, 0.0),
        summed=lambda new, old, mask: losses.sequence_log_ratio(new, old, mask) * mask.sum(-1, keepdim=True),
        sides_swapped=swapped(losses.sequence_log_ratio),
    ),
    claim(losses.added_mix, check_added_mix, convex=losses.convex_mix, sides_swapped=swapped(losses.added_mix)),
    claim(losses.convex_mix, check_convex_mix, added=losses.added_mix, sides_swapped=swapped(losses.convex_mix)),
    claim(
        losses.expectile_error,
        check_expectile_error,
        upside_down=lambda u, tau: losses.expectile_error(-u, tau),
        symmetric=altered(losses.expectile_error, tau=0.5),
    ),
    claim(losses.next_value, check_next_value, "mask_BT", this_value=lambda v, mask: torch.where(mask, v, 0.0)),
    claim(
        losses.ilql_logits,
        check_ilql_logits,
        beta_dropped=altered(losses.ilql_logits, beta=1.0),
        largest_head=lambda logits, q, v, beta: losses.ilql_logits(
            logits, torch.stack(list(q)).amax(0, keepdim=True), v, beta
        ),
        value_dropped=with_argument(losses.ilql_logits, "v_N", torch.zeros_like),
    ),
    Claim(losses.ilql, check_ilql, ILQL_TWINS),
    Claim(losses.ilql_taken, check_ilql_taken, ILQL_TAKEN_TWINS),
]
