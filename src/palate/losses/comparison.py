"""Objectives of reward models: scores fitted to pairs, rankings, choices and numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from palate.losses.numeric import keep, row_logp, widen


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """−log σ(r_chosen − r_rejected − margin), per pair. Bradley & Terry 1952; margin as Llama 2 (2023), eq. 2."""
    return -F.logsigmoid(_gap(chosen, rejected, margin))


def soft_bradley_terry(
    chosen: Tensor, rejected: Tensor, target: Tensor | float, margin: Tensor | float = 0.0
) -> Tensor:
    """−p log σ(d) − (1−p) log σ(−d) with d = r_chosen − r_rejected − margin, per pair.

    `target` p is the probability that chosen is the better one: a judge's stated belief (Bai et al. 2022,
    Constitutional AI) or 1 − ε for label smoothing ε. p = 1 is `bradley_terry`.
    """
    gap = _gap(chosen, rejected, margin)
    belief = widen(target) if isinstance(target, Tensor) else target
    return -(belief * F.logsigmoid(gap) + (1 - belief) * F.logsigmoid(-gap))


def _gap(chosen: Tensor, rejected: Tensor, margin: Tensor | float) -> Tensor:
    return widen(chosen) - widen(rejected) - (widen(margin) if isinstance(margin, Tensor) else margin)


def ranking(scores_BK: Tensor, rank_BK: Tensor, mask_BK: Tensor | None = None) -> Tensor:
    """Mean of −log σ(r_better − r_worse) over a prompt's comparable pairs, per prompt; rank 0 is the best.

    Ouyang et al. 2022 (InstructGPT), eq. 1, with the mean over the pairs that remain: equal ranks are ties and are
    dropped, unused places (mask False) take no part, and a prompt without a comparable pair gives 0.
    """
    scores_BK = keep(scores_BK, mask_BK)
    better_BKK = (rank_BK[:, :, None] < rank_BK[:, None, :]) & _both(scores_BK, mask_BK)
    error_BKK = -F.logsigmoid(scores_BK[:, :, None] - scores_BK[:, None, :])
    return _pair_mean(error_BKK, better_BKK)


def centring(scores_BK: Tensor, mask_BK: Tensor | None = None) -> Tensor:
    """Mean of (r_i + r_j)² over a prompt's pairs of answers, per prompt; ties included.

    Preferences fix rewards only up to a constant; a little of this keeps them near 0 (Eisenstein et al. 2023, sec. 5).
    Fewer than two answers give 0.
    """
    scores_BK = keep(scores_BK, mask_BK)
    sum_BKK = scores_BK[:, :, None] + scores_BK[:, None, :]
    return _pair_mean(sum_BKK.square(), _both(scores_BK, mask_BK).triu(1))


def _both(scores_BK: Tensor, mask_BK: Tensor | None) -> Tensor:
    here_BK = torch.ones_like(scores_BK, dtype=torch.bool) if mask_BK is None else mask_BK.bool()
    return here_BK[:, :, None] & here_BK[:, None, :]


def _pair_mean(error_BKK: Tensor, pair_BKK: Tensor) -> Tensor:
    return keep(error_BKK, pair_BKK).sum((1, 2)) / pair_BKK.sum((1, 2)).clamp(min=1)


def best_of(scores_BK: Tensor, choice_B: Tensor) -> Tensor:
    """Softmax cross-entropy of the answer picked as best among K, per prompt (Ziegler et al. 2019, eq. 1).

    Unused places hold −∞. Adding a constant to a prompt's scores changes nothing: a bias gets no gradient.
    """
    return -row_logp(scores_BK, choice_B)


def rating_error(score_B: Tensor, rating_B: Tensor) -> Tensor:
    """(r − rating)², per row: answers labelled with a number."""
    return (widen(score_B) - widen(rating_B)).square()


def comparison_error(first_B: Tensor, second_B: Tensor, difference_B: Tensor) -> Tensor:
    """(difference − (r_second − r_first))², per row: pairs labelled with how much better the second is."""
    return (widen(difference_B) - (widen(second_B) - widen(first_B))).square()
