"""Objectives of offline reinforcement learning on recorded answers with rewards; per action.

An action is a token of the mask; `v_BT[t]` is the value of the state before token t, `q_BTA[t]` what each token of the
vocabulary is worth there. Q heads come as one B×T×A tensor, as a sequence of such, or stacked with the heads first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from palate.losses.numeric import bounded, keep, widen

Heads = Tensor | Sequence[Tensor]
"""One Q head, several, or several stacked in the first dimension."""


def ilql(
    q_BTA: Heads,
    target_q_BTA: Heads,
    v_BT: Tensor,
    next_v_BT: Tensor,
    reward_BT: Tensor,
    logp_BT: Tensor,
    mask_BT: Tensor,
    tau: float,
    gamma: float,
    cql_weight: float,
    awac_weight: float,
    beta: float,
    action_BT: Tensor,
) -> dict[str, Tensor]:
    """The four terms of implicit language Q-learning and their total, each B×T, 0 off the mask; Snell et al. 2022.

    - `q`: Σ_k (Q_k(a) − r − γV')², V' without gradient;
    - `v`: `expectile_error` of u = min_k Q̂_k(a) − V at τ, Q̂ (the target heads) without gradient;
    - `cql`: Σ_k −log softmax(Q_k)(a);
    - `awac`: −e^(βu) log π(a), its weight without gradient; β = 0 is behaviour cloning;
    - `total`: q + v + `cql_weight` · cql + `awac_weight` · awac.

    2206.11871, with the reductions of trlX: double Q as a sum, terms averaged by the caller over the actions of the
    mask. `next_v_BT` is `next_value(v_BT, mask_BT)`: 0 after the last action. `action_BT`, the tokens that were taken,
    comes last because nothing else says which of the A values is meant. Cells off the mask may hold anything.
    """
    here_BT = mask_BT.bool()
    action_N = action_BT[here_BT].long()
    q_HNA = [q_BTA[here_BT] for q_BTA in _heads(q_BTA, mask_BT.dim())]
    target_HNA = [q_BTA[here_BT] for q_BTA in _heads(target_q_BTA, mask_BT.dim())]
    v_N, after_N, reward_N, logp_N = (x_BT[here_BT] for x_BT in (v_BT, next_v_BT, reward_BT, logp_BT))
    terms_N = ilql_taken(
        [_taken(q_NA, action_N) for q_NA in q_HNA],
        [widen(q_NA).logsumexp(-1) for q_NA in q_HNA],
        [_taken(q_NA, action_N) for q_NA in target_HNA],
        v_N,
        after_N,
        reward_N,
        logp_N,
        tau,
        gamma,
        beta,
    )
    terms_N["total"] = terms_N["q"] + terms_N["v"] + cql_weight * terms_N["cql"] + awac_weight * terms_N["awac"]
    return {
        name: torch.zeros(here_BT.shape, dtype=x_N.dtype, device=x_N.device).masked_scatter(here_BT, x_N)
        for name, x_N in terms_N.items()
    }


def ilql_taken(
    q_HN: Sequence[Tensor],
    total_HN: Sequence[Tensor],
    target_HN: Sequence[Tensor],
    v_N: Tensor,
    next_v_N: Tensor,
    reward_N: Tensor,
    logp_N: Tensor,
    tau: float,
    gamma: float,
    beta: float,
) -> dict[str, Tensor]:
    """The four terms of `ilql`, N each, from what they read alone: no head's V numbers have to be held.

    Of each Q head `q_HN` is the value of the action taken and `total_HN` log Σ exp over all actions; `target_HN` are
    the target heads' values of the action taken.
    """
    bellman_N = (widen(reward_N) + gamma * widen(next_v_N)).detach()
    u_N = torch.stack([widen(q_N) for q_N in target_HN]).amin(0).detach() - widen(v_N)
    weight_N = bounded(beta * u_N, v_N, logp_N).exp().detach()
    return {
        "q": torch.stack([(widen(q_N) - bellman_N).square() for q_N in q_HN]).sum(0),
        "v": expectile_error(u_N, tau),
        "cql": torch.stack([widen(all_N) - widen(q_N) for q_N, all_N in zip(q_HN, total_HN, strict=True)]).sum(0),
        "awac": -weight_N * widen(logp_N),
    }


def expectile_error(u: Tensor, tau: float) -> Tensor:
    """|τ − 1(u < 0)| u², per element: its minimum over V of u = Q − V is the τ-expectile. Snell et al. 2022, sec. 4.

    τ = ½ is half the squared error; towards 1 it comes near the largest Q the data holds.
    """
    u = widen(u)
    return (tau - (u < 0).to(u)).abs() * u.square()


def next_value(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The value at the row's next cell of the mask, 0 after the last one and off the mask.

    Cells between two actions (a user's turn) are jumped over: the state after an action is the one before the next.
    """
    mask_BT, width = mask_BT.bool(), mask_BT.shape[1]
    places_BT = torch.arange(width, device=mask_BT.device).expand(mask_BT.shape).masked_fill(~mask_BT, width)
    first_BT = places_BT.flip(-1).cummin(-1).values.flip(-1)
    after_BT = F.pad(first_BT[:, 1:], (0, 1), value=width)
    return keep(F.pad(keep(value_BT, mask_BT), (0, 1)).gather(1, after_BT), mask_BT)


def ilql_logits(logits_NA: Tensor, target_q_NA: Heads, v_N: Tensor, beta: float) -> Tensor:
    """log π(a) + β(min_k Q̂_k(a) − V): the logits that implicit language Q-learning samples from; any leading shape.

    Snell et al. 2022, sec. 4. β = 0 is the policy itself; V moves no probability but keeps the numbers near 0.
    """
    least_NA = torch.stack([widen(q_NA) for q_NA in _heads(target_q_NA, logits_NA.dim() - 1)]).amin(0)
    return widen(logits_NA).log_softmax(-1) + beta * (least_NA - widen(v_N)[..., None])


def _heads(q: Heads, leading: int) -> Sequence[Tensor]:
    """The heads one by one; a tensor with `leading` dimensions before its values is a single head."""
    if not isinstance(q, Tensor):
        return q
    return [q] if q.dim() == leading + 1 else q.unbind(0)


def _taken(q_NA: Tensor, action_N: Tensor) -> Tensor:
    return widen(q_NA.gather(-1, action_N[:, None])[:, 0])
