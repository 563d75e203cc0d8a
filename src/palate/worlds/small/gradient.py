"""Exact expected gradients of any loss for a policy that is a table, and where following them ends.

A tabular policy has one logit per state and symbol. The expectation over answers is a sum over all of them, so
the gradient of a loss has no noise: it can be compared with the exact −∇J to rounding, and its fixed point found.
Legend as in tree.py; B = P·K rows, all answers of the first prompt first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from palate.settings import PalateError
from palate.worlds.small import law, tree


@dataclass(frozen=True)
class Rows:
    """Every answer to every prompt as rows of a batch, drawn by a policy and each as heavy as it is likely.

    Index t speaks about symbol t of the answer. Nothing here carries a gradient.
    """

    prompt_B: Tensor
    answer_BT: Tensor
    real_BT: Tensor
    """Where the answer has a symbol, the end symbol included."""
    length_B: Tensor
    reward_B: Tensor
    sampled_BT: Tensor
    """Log-probabilities of the policy that drew the answers; 0 where there is no symbol."""
    reference_BT: Tensor
    weight_B: Tensor
    """π(y|x) / P of the policy that drew them; the sum is 1."""

    def mean(self, value_B: Tensor) -> Tensor:
        """E[value | prompt] of every row's prompt, B: the baseline of an infinite group."""
        weighted_PK = (self.weight_B * value_B).view(tree.PROMPTS, -1)
        mean_P = weighted_PK.sum(-1) / self.weight_B.view(tree.PROMPTS, -1).sum(-1)
        return mean_P[self.prompt_B]

    def deviation(self, value_B: Tensor) -> Tensor:
        """Standard deviation of the value given each row's prompt, B."""
        return self.mean((value_B - self.mean(value_B)).square()).sqrt()


@dataclass(frozen=True)
class Side:
    """One answer of a pair: the chosen ones lie along the first of two dimensions, the rejected along the second."""

    logp: Tensor
    """log π(y|x), summed over symbols, with gradient."""
    reference: Tensor
    length: Tensor
    """Symbols, the end symbol included: what averages divide by."""
    reward: Tensor


RowLoss = Callable[[Tensor, Rows], Tensor]
"""(logp_BT with gradient, rows) → loss per row, B; masked and summed over tokens by the loss itself."""

PairLoss = Callable[[Side, Side], Tensor]
"""(chosen, rejected) → loss per pair, K×K."""

Field = Callable[[Tensor], Tensor]
"""logits_PSV → expected gradient, P×S×V."""


@dataclass(frozen=True)
class Problem:
    """Reference and reward: all that expected gradients need to know of a world."""

    reference_PSV: Tensor
    """Next-token log-probabilities of the reference."""
    reward_PK: Tensor

    def rows(self, drawn_PSV: Tensor) -> Rows:
        """All rows, weighted by a policy given as logits or log-probabilities."""
        sampled_PKT = tree.token_logp(drawn_PSV.detach().log_softmax(-1))
        prompts, answers = self.reward_PK.shape
        return Rows(
            prompt_B=torch.arange(prompts).repeat_interleave(answers),
            answer_BT=tree.ANSWER_KT.repeat(prompts, 1),
            real_BT=tree.REAL_KT.repeat(prompts, 1),
            length_B=tree.LENGTH_K.repeat(prompts),
            reward_B=self.reward_PK.flatten(),
            sampled_BT=sampled_PKT.flatten(0, 1),
            reference_BT=tree.token_logp(self.reference_PSV).flatten(0, 1),
            weight_B=sampled_PKT.sum(-1).exp().flatten() / prompts,
        )

    def expected(self, logits_PSV: Tensor, loss: RowLoss, drawn_PSV: Tensor | None = None) -> Tensor:
        """∇ of E[loss] with the answers' law held fixed, P×S×V: what an infinite batch would give.

        Answers are drawn by the policy itself, or by `drawn_PSV` where given (the reference, for offline data).
        """
        leaf_PSV = logits_PSV.detach().clone().requires_grad_()
        rows = self.rows(leaf_PSV if drawn_PSV is None else drawn_PSV)
        logp_BT = tree.token_logp(leaf_PSV.log_softmax(-1)).flatten(0, 1)
        loss_B = loss(logp_BT, rows)
        if loss_B.shape != rows.weight_B.shape:
            raise PalateError(f"expected gradient: the loss has shape {tuple(loss_B.shape)}. Give one number per row.")
        return torch.autograd.grad((rows.weight_B * loss_B).sum(), leaf_PSV)[0]

    def expected_of_pairs(
        self,
        logits_PSV: Tensor,
        loss: PairLoss,
        prefers: Callable[[Tensor], Tensor] = torch.sigmoid,
        drawn_PSV: Tensor | None = None,
    ) -> Tensor:
        """∇ of E[loss] over pairs y, y′ drawn independently for a uniform prompt, P×S×V.

        `prefers` gives P(y is chosen) from r(y) − r(y′): Bradley–Terry by default; of d and −d its values sum to 1.
        Answers are drawn by the reference, or by `drawn_PSV` (the policy itself, for online preferences).
        """
        drawn_PK = tree.answer_logp((self.reference_PSV if drawn_PSV is None else drawn_PSV.detach()).log_softmax(-1))
        leaf_PSV = logits_PSV.detach().clone().requires_grad_()
        logp_PK = tree.answer_logp(leaf_PSV.log_softmax(-1))
        reference_PK = tree.answer_logp(self.reference_PSV)
        gradient_PK = torch.stack(
            [
                _pair_gradient(logp_K.detach(), reference_K, reward_K, drawn_K.exp(), loss, prefers)
                for logp_K, reference_K, reward_K, drawn_K in zip(
                    logp_PK, reference_PK, self.reward_PK, drawn_PK, strict=True
                )
            ]
        )
        return torch.autograd.grad(logp_PK, leaf_PSV, gradient_PK / len(logp_PK))[0]

    def exact(self, logits_PSV: Tensor, beta: float) -> Tensor:
        """∇J by the policy-gradient theorem, P×S×V: no autograd, one sweep down the tree and one up.

        ∂J/∂logit(s, v) = reach(s)·π(v|s)·(Q(s, v) − β·log π(v|s)/π_ref(v|s) − V(s)), J the mean over prompts.
        """
        logp_PSV = logits_PSV.detach().log_softmax(-1)
        price_PSV = beta * (logp_PSV - self.reference_PSV)
        state_SV, answer_SV = tree.children()
        ends_SV = answer_SV >= 0
        value_PS = torch.zeros_like(logp_PSV[..., 0])
        gain_PSV = torch.zeros_like(logp_PSV)
        for states in tree.levels_from_below():
            onward_PNV = torch.where(
                ends_SV[states], self.reward_PK[:, answer_SV[states]], value_PS[:, state_SV[states]]
            )
            gain_PSV[:, states] = onward_PNV - price_PSV[:, states]
            value_PS[:, states] = (logp_PSV[:, states].exp() * gain_PSV[:, states]).sum(-1)
        visits_PSV = (tree.reach_logp(logp_PSV)[..., None] + logp_PSV).exp()
        return visits_PSV * (gain_PSV - value_PS[..., None]) / len(logp_PSV)

    def by_autograd(self, logits_PSV: Tensor, beta: float) -> Tensor:
        """∇J once more, by automatic differentiation of J itself: the second, independent way."""
        leaf_PSV = logits_PSV.detach().clone().requires_grad_()
        logp_PK = tree.answer_logp(leaf_PSV.log_softmax(-1))
        reference_PK = tree.answer_logp(self.reference_PSV)
        total = law.value(logp_PK, reference_PK, self.reward_PK, beta).mean()
        return torch.autograd.grad(total, leaf_PSV)[0]


def _pair_gradient(
    logp_K: Tensor,
    reference_K: Tensor,
    reward_K: Tensor,
    likely_K: Tensor,
    loss: PairLoss,
    prefers: Callable[[Tensor], Tensor],
) -> Tensor:
    """∂E[loss]/∂log π(y) of one prompt, K. Both orders of a pair fall on the same cell, hence the factor 2."""
    leaf_K = logp_K.clone().requires_grad_()
    length_K = tree.LENGTH_K.to(logp_K.dtype)
    square = (len(leaf_K), len(leaf_K))
    columns = (leaf_K, reference_K, length_K, reward_K)
    chosen = Side(*(x[:, None].expand(square) for x in columns))
    rejected = Side(*(x[None, :].expand(square) for x in columns))
    weight_KK = 2 * likely_K[:, None] * likely_K[None, :] * prefers(reward_K[:, None] - reward_K[None, :])
    return torch.autograd.grad((weight_KK * loss(chosen, rejected)).sum(), leaf_K)[0]


@dataclass(frozen=True)
class FixedPoint:
    """Where following an expected gradient ended."""

    logits_PSV: Tensor
    residual: float
    """‖gradient here‖ / ‖gradient at the start‖."""
    steps: int


def fixed_point(
    field: Field, start_PSV: Tensor, rate: float = 1.0, steps: int = 2000, tolerance: float = 1e-9
) -> FixedPoint:
    """Follow −gradient in the natural metric of a tabular softmax until it is gone, or the steps are used up.

    Each logit moves by its gradient over how often its symbol is chosen, Δ = −rate·g / (reach(s)·π(v|s)), which for
    a policy gradient is the advantage itself: all states learn at one pace, however rarely they are reached
    (Kakade 2001). No move exceeds 1. The rate grows by a twentieth where the gradient becomes smaller, and halves
    where it has not for 25 steps: every loss finds its own pace, and none ends in a cycle.
    """
    logits_PSV = best_PSV = start_PSV.detach().log_softmax(-1)
    best, first, since, taken = float("inf"), 0.0, 0, 0
    while taken < steps and (best > tolerance * first or not taken):
        gradient_PSV = field(logits_PSV)
        size = float(gradient_PSV.norm())
        first = first or size
        taken += 1
        if size < best * 0.999:
            best_PSV, best, since, rate = logits_PSV, size, 0, rate * 1.05
        else:
            since += 1
        if since > 25:
            logits_PSV, rate, since = best_PSV, rate / 2, 0
            continue
        visits_PSV = (tree.reach_logp(logits_PSV)[..., None] + logits_PSV).exp()
        move_PSV = rate * gradient_PSV / visits_PSV.clamp(min=1e-14)
        logits_PSV = (logits_PSV - move_PSV.clamp(-1.0, 1.0)).log_softmax(-1)
    return FixedPoint(best_PSV, best / first if first else 0.0, taken)
