"""One token from logits: the distribution that is drawn from, and the draw by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.engines.engine import Sampling


def drawn_from(logits_BV: Tensor, sampling: Sampling, ends: Tensor, early: bool) -> Tensor:
    """Log-probabilities (float32, normalised) of the distribution one token is drawn from.

    `ends` are the ids that end an answer; while `early` they cannot be drawn. Then temperature, top-k (ties
    of the k-th stay), top-p of what is left, and the softmax of what is left.
    """
    logits_BV = logits_BV.float()
    if early:
        logits_BV = logits_BV.index_fill(-1, ends, float("-inf"))
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        logits_BV = _likeliest(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    return logits_BV.log_softmax(-1)


def _likeliest(logits_BV: Tensor, k: int) -> Tensor:
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def _nucleus(logits_BV: Tensor, p: float) -> Tensor:
    """Keep a token when those likelier than it hold less than p (Holtzman et al. 2020, eq. 2)."""
    probability_BV, order_BV = logits_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    beyond_BV = torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(beyond_BV, float("-inf"))


def draw(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds u (inverse CDF); probability 0 is never drawn.

    One uniform per answer and token decides, so the answer does not depend on its neighbours in the batch.
    Batches of other shapes round logits differently by about 1e-7; the sums are float64 so that nothing is
    added to that.
    """
    cumulative_BV = logp_BV.double().exp().cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
