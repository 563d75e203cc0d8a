"""Objectives: per token, per row or per pair; pure functions of tensors, nothing is averaged unless said.

Shapes: B rows, T tokens, K answers of one prompt, V vocabulary. Every function computes in float32 at least: float16
and bfloat16 inputs are widened first, float64 stays float64. What a mask leaves out may hold anything, nan and infinity
included: it is replaced *before* any arithmetic, so neither a value nor a gradient can see it. Formulas without a mask
of their own (`clipped_surrogate`, `bradley_terry`, …) speak of each element alone; their callers blank the inputs with
`keep` and add up the result. −log σ is `-logsigmoid`, exact to the last bit in both tails, which `softplus` is not:
beyond its threshold of 20 it drops a term of 2e-9.
"""

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


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float, clip_high: float | None = None
) -> Tensor:
    """PPO's pessimistic surrogate −min(ρA, clip(ρ, 1−ε, 1+ε')A) with ρ = p/p_old, per element, to be minimised.

    Schulman et al. 2017, eq. 7; `clip_high` is ε' where it differs from ε (Yu et al. 2025, eq. 10). An infinite `clip`
    switches clipping off. ρ is bounded as in `bounded`.
    """
    above = clip if clip_high is None else clip_high
    ratio = bounded(widen(logp) - widen(old_logp), logp, old_logp).exp()
    gain = widen(advantage)
    return -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + above) * gain)


def clipped_value_error(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((v−R)², (clip(v, v_old±ε)−R)²), per element: the value step of lm-human-preferences (Ziegler et al. 2019).

    The worse of the moved and the clipped value counts, so a value that already moved by ε towards R rests. An infinite
    `clip` switches clipping off.
    """
    new, old, target = widen(value), widen(old_value), widen(returns)
    near = torch.clamp(new, old - clip, old + clip)
    return 0.5 * torch.maximum((new - target).square(), (near - target).square())


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
