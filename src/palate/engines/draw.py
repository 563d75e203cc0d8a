"""One token from logits: the distribution that is drawn from, and the draw by inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.engines.engine import Sampling

_BLOCK = 64
"""Ids whose probabilities are added before the blocks are compared: about the root of a vocabulary."""


def allowed(logits_BV: Tensor, sampling: Sampling, ends: Tensor, early: Tensor | bool) -> Tensor:
    """Logits (float32) whose softmax one token is drawn from; −inf at what cannot be drawn.

    `ends` are the ids that end an answer; rows that are `early` cannot draw them. Then temperature, top-k (ties of
    the k-th stay) and top-p of what is left.
    """
    logits_BV = logits_BV.float()
    if isinstance(early, Tensor) or early:
        early_B1 = torch.as_tensor(early, device=logits_BV.device).view(-1, 1)
        logits_BV = logits_BV.clone()
        logits_BV[:, ends] = logits_BV[:, ends].masked_fill(early_B1, float("-inf"))
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        logits_BV = _likeliest(logits_BV, sampling.top_k)
    if sampling.top_p < 1:
        logits_BV = _nucleus(logits_BV, sampling.top_p)
    return logits_BV


def drawn_from(logits_BV: Tensor, sampling: Sampling, ends: Tensor, early: Tensor | bool) -> Tensor:
    """Log-probabilities (float32, normalised) of the distribution one token is drawn from; see `allowed`."""
    return allowed(logits_BV, sampling, ends, early).log_softmax(-1)


def _likeliest(logits_BV: Tensor, k: int) -> Tensor:
    least_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < least_B1, float("-inf"))


def _nucleus(logits_BV: Tensor, p: float) -> Tensor:
    """Keep a token when those likelier than it hold less than p (Holtzman et al. 2020, eq. 2)."""
    probability_BV, order_BV = logits_BV.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    before_BV = probability_BV.cumsum(-1) - probability_BV
    beyond_BV = torch.zeros_like(order_BV, dtype=torch.bool).scatter(-1, order_BV, before_BV >= p)
    return logits_BV.masked_fill(beyond_BV, float("-inf"))


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first id whose cumulative probability exceeds u (inverse CDF); probability 0 is never drawn.

    In two levels: first the block of ids, by the sums of all blocks, then the id inside it. One uniform per answer and
    token decides, so the answer does not depend on its neighbours in the batch. Sums over blocks are float64; inside a
    block they are exact to the rounding of the probabilities themselves. Rows that hold NaN give some id.
    """
    rows, size = probability_BV.shape
    whole = size // _BLOCK * _BLOCK
    sum_BN = probability_BV[:, :whole].view(rows, -1, _BLOCK).sum(-1)
    if whole < size:
        sum_BN = torch.cat([sum_BN, probability_BV[:, whole:].sum(-1, keepdim=True)], -1)
    block_B1, rest_B1 = _first_above(sum_BN, uniform_B[:, None], relative=True)
    id_BM = block_B1 * _BLOCK + torch.arange(_BLOCK, device=block_B1.device)
    inside_BM = probability_BV.gather(1, id_BM.clamp(max=size - 1)).masked_fill(id_BM >= size, 0.0)
    place_B1, _ = _first_above(inside_BM, rest_B1, relative=False)
    return (block_B1 * _BLOCK + place_B1)[:, 0].clamp(max=size - 1)


def _first_above(mass_BN: Tensor, target_B1: Tensor, relative: bool) -> tuple[Tensor, Tensor]:
    """The first place whose cumulative mass exceeds the target, and by how much the target exceeds those before it.

    A `relative` target is a share of the whole. Rounding may put the target at the end of all mass or behind it: then
    the last place that has any is the one.
    """
    cumulative_BN = mass_BN.double().cumsum(-1)
    total_B1 = cumulative_BN[:, -1:]
    target_B1 = target_B1 * total_B1 if relative else target_B1
    target_B1 = torch.minimum(target_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    place_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True).clamp_(max=mass_BN.shape[-1] - 1)
    before_B1 = cumulative_BN.gather(1, place_B1) - mass_BN.gather(1, place_B1).double()
    return place_B1, (target_B1 - before_B1).clamp_(min=0.0)
