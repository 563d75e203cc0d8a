"""Objectives of a policy that answers itself, and of its critic; per element."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.losses.numeric import bounded, widen


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
