"""Objectives of a policy that answers itself, and of its critic; per element."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from palate.losses.numeric import bounded, keep, widen


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's pessimistic surrogate −min(ρA, clip(ρ, 1−ε, 1+ε')A) with ρ = p/p_old, per element, to be minimised.

    Schulman et al. 2017, eq. 7; `clip_high` is ε' where it differs from ε (Yu et al. 2025, eq. 10). An infinite `clip`
    switches clipping off. `dual_clip` c > 1 also bounds what a bad answer may cost: where A < 0 the loss is at most
    −cA (Ye et al. 2020, 1912.09729). ρ is bounded as in `bounded`.
    """
    above = clip if clip_high is None else clip_high
    ratio = bounded(widen(logp) - widen(old_logp), logp, old_logp).exp()
    gain = widen(advantage)
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + above) * gain)
    return loss if dual_clip is None else torch.where(gain < 0, torch.minimum(loss, -dual_clip * gain), loss)


def cispo(logp: Tensor, old_logp: Tensor, advantage: Tensor, clip_high: float, clip_low: float = math.inf) -> Tensor:
    """−sg(clip(ρ, 1−ε, 1+ε')) · A · log p with ρ = p/p_old, per element: the weight is clipped, not the update.

    MiniMax 2025 (CISPO, 2506.13585), eq. 4 and 5: every token keeps a gradient, also one whose ratio left the clip.
    `clip_high` is ε'; the paper sets no lower bound, which is the default here.
    """
    ratio = bounded(widen(logp) - widen(old_logp), logp, old_logp).exp()
    return -ratio.clamp(1 - clip_low, 1 + clip_high).detach() * widen(advantage) * widen(logp)


def sequence_log_ratio(logp_BT: Tensor, old_logp_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log of the answer's ratio (p(y)/p_old(y))^(1/|y|), B×T: the same number at each token of the mask, 0 elsewhere.

    Zheng et al. 2025 (GSPO, 2507.18071), eq. 7. The gradient of token t's copy goes to log p of token t alone (GSPO-
    token, eq. 14); averaged over the answer's tokens that is the gradient of eq. 5. Use it in place of a log-ratio:
    `clipped_surrogate(sequence_log_ratio(…), zeros, advantage, clip)`. A row without tokens gives 0.
    """
    logp_BT = keep(logp_BT, mask_BT)
    ratio_BT = logp_BT - keep(old_logp_BT, mask_BT)
    mean_B = (ratio_BT.sum(-1) / mask_BT.sum(-1).clamp(min=1)).detach()
    return keep(mean_B[:, None] + logp_BT - logp_BT.detach(), mask_BT)


def clipped_value_error(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((v−R)², (clip(v, v_old±ε)−R)²), per element: the value step of lm-human-preferences (Ziegler et al. 2019).

    The worse of the moved and the clipped value counts, so a value that already moved by ε towards R rests. An infinite
    `clip` switches clipping off.
    """
    new, old, target = widen(value), widen(old_value), widen(returns)
    near = torch.clamp(new, old - clip, old + clip)
    return 0.5 * torch.maximum((new - target).square(), (near - target).square())


def added_mix(objective: Tensor, pretraining: Tensor, gamma: float) -> Tensor:
    """objective + γ · pretraining cross-entropy: the mix of InstructGPT (Ouyang et al. 2022, eq. 2; γ = 27.8)."""
    return widen(objective) + gamma * widen(pretraining)


def convex_mix(objective: Tensor, pretraining: Tensor, share: float) -> Tensor:
    """(1 − share) · objective + share · pretraining cross-entropy: the mix of ColossalChat, whose share is 0.9."""
    return (1 - share) * widen(objective) + share * widen(pretraining)
