"""What learning from single labelled answers needs to know of a whole batch, and of a whole data set."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.batches import Tokens

FAIR = (1.0, 1.5)
"""The published range of λ_D n_D / (λ_U n_U): Ethayarajh et al. 2024 (2402.01306)."""


def mismatched(batch: Tokens, context: int) -> Tokens:
    """Row i holds prompt i and then the answer of row i + 1 (cyclic), cut after `context` tokens; padded right.

    A prompt is what stands before a row's first action token, an answer everything from there on. In sequence, so that
    no row of a batch of two or more meets its own answer, as it may when the order is reversed or drawn.
    """
    origin_B = batch.real_BT.long().argmax(-1)
    start_B = batch.action_BT.long().argmax(-1)
    prompt_B = start_B - origin_B
    answer_B = (batch.real_BT.sum(-1) - prompt_B).roll(-1)
    length_B = (prompt_B + answer_B).clamp(max=context)
    place_T = torch.arange(int(length_B.max()), device=batch.tokens_BT.device)
    mine_BT = place_T < prompt_B[:, None]
    last = batch.tokens_BT.shape[1] - 1
    own_BT = (origin_B[:, None] + place_T).clamp(max=last)
    next_BT = (start_B.roll(-1)[:, None] + place_T - prompt_B[:, None]).clamp(0, last)
    tokens_BT = torch.where(mine_BT, batch.tokens_BT.gather(1, own_BT), batch.tokens_BT.roll(-1, 0).gather(1, next_BT))
    real_BT = place_T < length_B[:, None]
    action_BT = batch.action_BT.roll(-1, 0).gather(1, next_BT) & real_BT & ~mine_BT
    return Tokens(tokens_BT, real_BT, action_BT)


def middle(gain_B: Tensor, good_B: Tensor) -> float:
    """½ (mean gain of good answers + mean gain of the others), or the mean of the one kind there is.

    The reward shift δ/β of Jung et al. 2024 (2404.04656), of one batch instead of a running mean: so it
    carries nothing from step to step, and a resumed run needs to remember nothing.
    """
    kinds = [gain_B[kind_B] for kind_B in (good_B, ~good_B) if bool(kind_B.any())]
    return float(torch.stack([kind.mean() for kind in kinds]).mean())


def balancing_weights(n_desirable: int, n_undesirable: int) -> tuple[float, float]:
    """(λ_D, λ_U) with λ_D n_D / (λ_U n_U) in [1, 3/2]: (1, 1) where the counts are so already.

    Otherwise the weight of the kind that counts too little is raised until the ratio is 5/4, the middle of the
    published range. ValueError when one of the counts is not positive.
    """
    if n_desirable < 1 or n_undesirable < 1:
        raise ValueError(f"both kinds must be there, not {n_desirable} and {n_undesirable}")
    ratio = n_desirable / n_undesirable
    if FAIR[0] <= ratio <= FAIR[1]:
        return 1.0, 1.0
    goal = sum(FAIR) / 2
    return (goal / ratio, 1.0) if ratio < FAIR[0] else (1.0, ratio / goal)
