"""Log-probabilities, their precision, and what a mask leaves out."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_NEVER = float("-inf")


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it already is: the precision every formula computes in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def keep(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x`, widened, where `mask` is True and 0 elsewhere; the gradient is 0 there too, whatever `x` holds."""
    return widen(x) if mask is None else widen(x).masked_fill(~mask.bool(), 0.0)


def bounded(exponent: Tensor, *sources: Tensor) -> Tensor:
    """`exponent`, but no more than e to it may become without leaving the number type of `sources`.

    The bound is half of the logarithm of the type's largest number: 44 for float32 and bfloat16, 354 for float64, 5.5
    for float16. Half, because gradient norms and Adam square a ratio and an advantage multiplies it: those stay finite
    too. Past the bound the gradient is the one at the bound, not 0, so a ratio that ran away is still pulled back.
    """
    bound = min(math.log(torch.finfo(x.dtype).max) for x in sources) / 2
    return exponent - (exponent - bound).clamp(min=0.0).detach()


def row_logp(logits_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log p of each row's own token under softmax(logits / temperature); any leading shape.

    A token outside the vocabulary can never be drawn: it gets −∞, and no gradient. ValueError when the temperature is
    not positive.
    """
    inside_N = (tokens_N >= 0) & (tokens_N < logits_NV.shape[-1])
    safe_N = tokens_N.masked_fill(~inside_N, 0).long()
    logp_N = _log_softmax(logits_NV, temperature).gather(-1, safe_N[..., None])[..., 0]
    return logp_N.masked_fill(~inside_N, _NEVER)


def token_logp(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(token t | tokens before t) as B×T. The first token has no past and gets 0.

    `logits_BTV[:, t]` is what the model says after token t. Logits are divided by the sampling temperature before the
    log-softmax, so that the numbers speak of the distribution that was sampled (Ziegler et al. 2019).
    """
    return F.pad(row_logp(logits_BTV[:, :-1], tokens_BT[:, 1:], temperature), (1, 0))


def row_entropy(logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature) over the last dimension; logits of −∞ take no part."""
    logp_NV = _log_softmax(logits_NV, temperature)
    return -(logp_NV.exp() * logp_NV.masked_fill(logp_NV == _NEVER, 0.0)).sum(-1)


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}; greedy decoding has no log-probability")
    return (widen(logits_NV) / temperature).log_softmax(-1)


def cross_entropy(logp: Tensor, mask: Tensor) -> Tensor:
    """−log p where the mask is True, exactly 0 elsewhere; per element."""
    return -keep(logp, mask)


def answer_logp(logp_BT: Tensor, mask_BT: Tensor, average: bool = False) -> Tensor:
    """log p of each row's answer: the sum over its tokens, or with `average` the mean; an empty answer gives 0."""
    total_B = keep(logp_BT, mask_BT).sum(-1)
    return total_B / mask_BT.sum(-1).clamp(min=1) if average else total_B


def log1mexp(a: Tensor) -> Tensor:
    """log(1 − e^a) for a < 0, per element, exact at both ends (Mächler 2012); −∞ at 0.

    Near 0 the difference is `expm1`'s, far from it `log1p`'s; each branch sees only its own half, so that the other
    cannot put nan into the gradient.
    """
    a, near = widen(a), a > -math.log(2)
    middle = -math.log(2)
    close = (-torch.expm1(a.masked_fill(~near, middle))).log()
    return torch.where(near, close, torch.log1p(-a.masked_fill(near, middle).exp()))
