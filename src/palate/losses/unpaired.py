"""Objectives of a policy trained on single answers, each labelled desirable or not; per row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from palate.losses.numeric import widen


def kto(
    logp: Tensor,
    ref_logp: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    beta: float,
    weight_desirable: float = 1.0,
    weight_undesirable: float = 1.0,
) -> Tensor:
    """λ_D(1 − σ(β(r − z))) for a desirable answer, λ_U(1 − σ(β(z − r))) for another, r = log π − log π_ref; per row.

    Ethayarajh et al. 2024 (2402.01306), sec. 4; log-probabilities are summed. `kl` is z of `kto_kl`, and gets no
    gradient. ½ λ where policy and reference agree. Rows are averaged over all examples, not within each kind.
    """
    point = widen(kl).detach() if isinstance(kl, Tensor) else kl
    worth = beta * (widen(logp) - widen(ref_logp) - point)
    good = desirable.bool()
    return torch.where(good, weight_desirable * (-worth).sigmoid(), weight_undesirable * worth.sigmoid())


def kto_kl(logp_mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
    """max(0, mean(log π − log π_ref)) over answers of *other* prompts, without gradient; one number.

    Ethayarajh et al. 2024 (2402.01306), sec. 4: an estimate of KL(π‖π_ref), the point from which gains are felt. Row i
    holds prompt i with answer i + 1 (cyclic) of the global batch, all micro-batches and ranks together.
    """
    return (widen(logp_mismatched) - widen(ref_mismatched)).mean().clamp(min=0.0).detach()


def bco(logp: Tensor, ref_logp: Tensor, desirable: Tensor, beta: float, shift: Tensor | float = 0.0) -> Tensor:
    """−log σ(±(r − δ)) with r = β(log π − log π_ref), + for a desirable answer; per row.

    Jung et al. 2024 (BCO, 2404.04656): a classifier whose logit is the reward. `shift` δ is the running mean of the
    rewards of both kinds; it gets no gradient. ln 2 at the reference with δ = 0.
    """
    point = widen(shift).detach() if isinstance(shift, Tensor) else shift
    gap = beta * (widen(logp) - widen(ref_logp)) - point
    return -F.logsigmoid(torch.where(desirable.bool(), gap, -gap))
