"""How far a policy has moved: the KL divergence of whole answers from the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from palate.batches import Rollouts
from palate.cast import Cast
from palate.evaluation.statistics import standard_error


@dataclass(frozen=True)
class SequenceKL:
    """KL(policy ‖ reference) in nats per answer, estimated over `answers` answers."""

    mean: float
    standard_error: float
    answers: int


def sequence_kl(logp_BT: Tensor, ref_BT: Tensor, action_BT: Tensor) -> SequenceKL:
    """Mean over answers of Σ_t log π(a_t) − log ref(a_t): the estimator k1, unbiased for answers drawn from
    π.

    It may come out below 0 by chance, never by more than its standard error explains; a clearly negative
    value means that the answers were not drawn from the distribution that `logp_BT` describes.
    """
    k1_B = ((logp_BT.double() - ref_BT.double()) * action_BT).sum(-1)
    return SequenceKL(float(k1_B.mean()), standard_error(k1_B.tolist()), k1_B.shape[0])


@torch.no_grad()
def kl_to_reference(cast: Cast, rollouts: Rollouts) -> SequenceKL:
    """KL of the distribution the rollouts were drawn from to the cast's "reference" at the same temperature.

    The policy's side is the sampler's own log-probability, so the estimate stays unbiased when top-k or top-p
    cut the distribution.
    """
    ref_BT = cast.chunked(rollouts, lambda part: cast.logp("reference", part, rollouts.temperature))
    return sequence_kl(rollouts.logp_BT, ref_BT, rollouts.action_BT)
