"""Credit: which token earned what. Advantages, baselines, whitening, KL estimators and controllers; pure functions.

Index t of every `_BT` tensor speaks about token t; `value_BT[t]` is the value of the state before token t. Masks are
boolean (or 0/1). Cells off a mask may hold anything, nan and infinity included: they reach no value and no gradient.
Half-precision inputs are computed and returned in float32, float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from palate.losses import bounded, keep, widen
from palate.settings import PalateError


def gae(reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor | None, gamma: float, lam: float) -> Tensor:
    """Advantages Â_t = Σ_k (γλ)^k δ_{t+k} with δ_t = r_t + γV_{t+1} − V_t. GAE, Schulman et al. 2016, eq. 16.

    Time is counted in the cells of the mask: the successor of a cell is the next one inside, wherever the mask starts
    and whatever gaps it has; after the last one the value is 0 (the answer is over). Cells outside get 0. Returns are
    `advantage + value`. A mask of None means every cell.
    """
    mask_BT = torch.ones_like(reward_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    order_BS = (~mask_BT).byte().argsort(dim=1, stable=True)[:, : int(mask_BT.sum(-1).max())]
    value_BS = keep(value_BT, mask_BT).gather(1, order_BS)  # cells of the mask come first, so successors are neighbours
    after_BS = torch.cat([value_BS[:, 1:], torch.zeros_like(value_BS[:, :1])], 1)
    sum_BS = keep(reward_BT, mask_BT).gather(1, order_BS) + gamma * after_BS - value_BS
    reach, decay = 1, gamma * lam
    while reach < order_BS.shape[1]:  # each cell holds the sum over `reach` surprises from its own on
        further_BS = torch.add(sum_BS[:, :-reach], sum_BS[:, reach:], alpha=decay)
        sum_BS = torch.cat([further_BS, sum_BS[:, -reach:]], 1)
        reach, decay = 2 * reach, decay * decay
    return sum_BS.new_zeros(mask_BT.shape).scatter(1, order_BS, sum_BS)


def to_go(reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = Σ_k γᵏ r_{t+k} over the cells of the mask, 0 outside: what is still earned from token t on."""
    return gae(reward_BT, torch.zeros_like(reward_BT), mask_BT, gamma, 1.0)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """(x − mean) / √(var + 1e-8) over the cells of the mask, 0 outside; the mean is added back unless `shift_mean`.

    The variance is the population's (divided by N, as TensorFlow's moments), and the mean that is added back is not
    scaled (lm-human-preferences, core.py). Equal numbers give 0: the mean is corrected once, so that its rounding error
    is not blown up by 1/√1e-8.
    """
    x = keep(x, mask)
    inside = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    count = inside.sum().clamp(min=1)
    mean = x.sum() / count
    mean = mean + keep(x - mean, inside).sum() / count
    centred = keep(x - mean, inside)
    scaled = centred * (centred.square().sum() / count + 1e-8).rsqrt()
    return scaled if shift_mean else keep(scaled + mean, inside)


def kl_k1(logp: Tensor, ref: Tensor) -> Tensor:
    """log p − log p_ref of a sampled token, per element: unbiased for KL(p‖p_ref), can be negative. Schulman 2020.

    Belongs into the reward; as a loss with the samples held fixed its gradient is 0 on average.
    """
    return widen(logp) - widen(ref)


def kl_k2(logp: Tensor, ref: Tensor) -> Tensor:
    """½(log p − log p_ref)², per element: biased, never negative; as a loss its gradient is that of KL(p‖p_ref)."""
    return 0.5 * kl_k1(logp, ref).square()


def kl_k3(logp: Tensor, ref: Tensor) -> Tensor:
    """e^u − 1 − u with u = log p_ref − log p, per element: unbiased for KL(p‖p_ref), never negative. Schulman 2020.

    Good to watch; as a loss its gradient is that of KL(p_ref‖p). u is bounded from above as in `bounded`: where p ≪
    p_ref its exponential would leave the number range and turn a run into nan.
    """
    u = bounded(-kl_k1(logp, ref), logp, ref)
    return torch.expm1(u) - u


def within_group(reward_B: Tensor, group: int | Tensor, scale: bool = True) -> Tensor:
    """(r − mean) / √(var + 1e-8) among the answers to one prompt (Shao et al. 2024, GRPO, sec. 4.1.2), per row.

    `group` is the number of adjacent answers per prompt, or one prompt index per row. The variance is the population's;
    `scale=False` leaves r − mean (Liu et al. 2025, Dr. GRPO). A group without spread gives 0.
    """
    index_B, size_B = _groups(reward_B, group)
    centred_B = widen(reward_B) - _group_sum(widen(reward_B), index_B) / size_B
    centred_B = centred_B - _group_sum(centred_B, index_B) / size_B
    if not scale:
        return centred_B
    return centred_B * (_group_sum(centred_B.square(), index_B) / size_B + 1e-8).rsqrt()


def leave_one_out(reward_B: Tensor, group: int | Tensor) -> Tensor:
    """r minus the mean reward of the *other* answers to the same prompt, per row (Ahmadian et al. 2024, RLOO, eq. 8).

    `group` as in `within_group`. An answer without siblings has nothing to be measured against and gets 0.
    """
    index_B, size_B = _groups(reward_B, group)
    reward_B = widen(reward_B)
    others_B = _group_sum(reward_B, index_B) - reward_B
    return torch.where(size_B > 1, reward_B - others_B / (size_B - 1).clamp(min=1), 0.0)


NO_SPREAD = 1e-6
"""Rewards of siblings that differ by no more than this differ by rounding alone."""


def group_spread(reward_B: Tensor, group: int) -> Tensor:
    """Largest minus smallest reward among the answers to one prompt, at each of them; `group` adjacent rows."""
    _groups(reward_B, group)
    reward_GK = widen(reward_B).view(-1, group)
    return (reward_GK.amax(-1) - reward_GK.amin(-1)).repeat_interleave(group)


def quantile_steps(start: float, end: float, steps: int) -> list[float]:
    """`steps` quantiles in equal distances whose last one *is* `end`; `end` alone where there is a single step.

    trlX's rejection sampling divides by the number of steps instead of the gaps between them and never gets there.
    """
    if steps < 1 or not 0 <= start <= end <= 1:
        raise ValueError(f"1 step or more between quantiles 0 ≤ start ≤ end ≤ 1, not {steps} from {start} to {end}")
    if steps == 1:
        return [end]
    return [start + (end - start) * i / (steps - 1) for i in range(steps - 1)] + [end]


def reaches_quantile(score_B: Tensor, group: int, quantile: float) -> Tensor:
    """Whether a score is at or above that quantile of its own prompt's scores, per row; `group` adjacent rows.

    Between two scores the quantile is interpolated. The best of a prompt always passes, however rounding falls.
    """
    _groups(score_B, group)
    score_GK = widen(score_B).view(-1, group)
    bar_G1 = torch.minimum(score_GK.quantile(quantile, -1, keepdim=True), score_GK.amax(-1, keepdim=True))
    return (score_GK >= bar_G1).flatten()


def importance_weight(
    logp_BT: Tensor, sampled_BT: Tensor, mask_BT: Tensor, cap: float, masked: bool = False, whole: bool = False
) -> Tensor:
    """w = p/p_sampler bounded by `cap`, at each token of the mask, 0 elsewhere; no gradient.

    Corrects an expectation over samples of an engine whose distribution is not quite that of the policy p. Truncated,
    min(w, cap): small variance for some bias (Ionides 2008; TIS of Yao et al. 2025). `masked`: 0 where w > cap, the
    sample is not learnt from. `whole`: w of the answer, the product of its tokens' ratios, at each token; else of the
    token alone.
    """
    change_BT = keep(logp_BT, mask_BT) - keep(sampled_BT, mask_BT)
    if whole:
        change_BT = change_BT.sum(-1, keepdim=True).expand_as(change_BT)
    weight_BT = bounded(change_BT, logp_BT, sampled_BT).exp().detach()
    kept_BT = weight_BT.masked_fill(weight_BT > cap, 0.0) if masked else weight_BT.clamp(max=cap)
    return keep(kept_BT, mask_BT)


def overlong_penalty(length_B: Tensor, limit: int, cache: int) -> Tensor:
    """0 up to limit − cache tokens, then falling to −1 at `limit` and beyond, per answer (Yu et al. 2025, eq. 13)."""
    if not 0 < cache <= limit:
        raise ValueError(f"the cache is between 1 and the limit of {limit} tokens, not {cache}")
    over_B = (length_B - (limit - cache)).to(torch.get_default_dtype())
    return -(over_B / cache).clamp(0.0, 1.0)


def _groups(reward_B: Tensor, group: int | Tensor) -> tuple[Tensor, Tensor]:
    rows = reward_B.shape[0]
    if isinstance(group, Tensor):
        index_B = group.unique(return_inverse=True)[1]
    elif group < 1 or rows % group:
        raise ValueError(f"{rows} rewards do not divide into groups of {group}")
    else:
        index_B = torch.arange(rows, device=reward_B.device) // group
    return index_B, torch.bincount(index_B)[index_B]


def _group_sum(x_B: Tensor, index_B: Tensor) -> Tensor:
    """Each row's group total."""
    return torch.zeros_like(x_B).index_add(0, index_B, x_B)[index_B]


def last_true_index(mask_BT: Tensor) -> Tensor:
    """Index of each row's last True; −1 where there is none. Right for padding on either side."""
    place_T = torch.arange(1, mask_BT.shape[-1] + 1, device=mask_BT.device)
    return (mask_BT.bool() * place_T).amax(-1) - 1


def shape_reward(
    score_B: Tensor,
    logp_BT: Tensor,
    ref_BT: Tensor,
    mask_BT: Tensor,
    kl_coef: float,
    position: Literal["last", "after"] = "last",
    estimator: Callable[[Tensor, Tensor], Tensor] = kl_k1,
) -> Tensor:
    """−β(log p − log p_ref) on every token of the mask, plus the score once (Ziegler et al. 2019, eq. 2).

    `estimator` is what a token pays instead. The policy gradient takes a reward as given, so −k1 has on average the
    gradient of −KL(p‖p_ref) and no other estimate has: −k3 has that of KL(p_ref‖p) − KL(p‖p_ref), −k2 that of
    KL(p‖p_ref) − E[k2].

    `position="last"` puts the score on the row's last token of the mask. `"after"` puts it one place later, on the
    state after the last token, where a value model made from the reward model reads the score itself (TL;DR
    reproduction, detail 51); a row that fills the last column keeps it there. A row without a token gets 0 throughout.
    """
    if position not in ("last", "after"):
        raise ValueError(f"position is 'last' or 'after', not {position!r}")
    penalty_BT = -kl_coef * estimator(keep(logp_BT, mask_BT), keep(ref_BT, mask_BT))
    last_B = last_true_index(mask_BT)
    at_B = last_B if position == "last" else (last_B + 1).clamp(max=mask_BT.shape[-1] - 1)
    place_T = torch.arange(mask_BT.shape[-1], device=mask_BT.device)
    here_BT = (place_T == at_B[:, None]) & (last_B >= 0)[:, None]
    return penalty_BT + torch.where(here_BT, widen(score_B)[:, None], 0.0)


def truncate_after(tokens_BT: Tensor, stop_token: int, after: int, pad_token: int) -> tuple[Tensor, Tensor]:
    """Answers cut behind their first `stop_token` at index `after` or later, and whether there was one, per row.

    The stop token stays, what follows becomes `pad_token`; earlier stop tokens do not count (lm-human-preferences,
    lm_tasks.py). `tokens_BT` holds answers alone. `after=0` with EOS is the TL;DR truncation.
    """
    place_T = torch.arange(tokens_BT.shape[-1], device=tokens_BT.device)
    stop_BT = (tokens_BT == stop_token) & (place_T >= after)
    past_BT = (stop_BT.long().cumsum(-1) - stop_BT.long()) > 0
    return tokens_BT.masked_fill(past_BT, pad_token), stop_BT.any(-1)


def missing_eos_penalty(
    score_B: Tensor, finished_B: Tensor, penalty: float, how: Literal["replace", "subtract"] = "replace"
) -> Tensor:
    """Scores with the penalty for answers that did not end by themselves, per row.

    `replace`: the penalty *is* the score, −1 as published (Ziegler et al. 2019; TL;DR reproduction, detail 50).
    `subtract`: its size is taken off the score, as TRL does; 1 and −1 mean the same there.
    """
    if how not in ("replace", "subtract"):
        raise ValueError(f"how is 'replace' or 'subtract', not {how!r}")
    score_B = widen(score_B)
    punished_B = torch.full_like(score_B, penalty) if how == "replace" else score_B - abs(penalty)
    return torch.where(finished_B.bool(), score_B, punished_B)


def gain_and_bias(
    reward_N: Tensor, mean: float = 0.0, std: float | None = 1.0, sample: bool = False
) -> tuple[float, float]:
    """The gain and bias with which `gain * r + bias` has the asked mean and standard deviation over `reward_N`.

    The deviation of `reward_N` is the population's (OpenAI 2019), or the sample's, N−1 (its PyTorch reproduction).
    `std=None` keeps the scale: gain 1, bias only (TL;DR reproduction, detail 22). PalateError when the rewards do not
    vary, because no gain can give them a deviation.
    """
    reward_N = reward_N.detach().double()
    if std is None:
        return 1.0, mean - float(reward_N.mean())
    spread = float(reward_N.std(correction=int(sample)))
    if not (math.isfinite(spread) and spread > 0):
        raise PalateError(
            f"reward normalisation: {reward_N.numel()} rewards have standard deviation {spread}, so no gain "
            f"makes it {std}. Give more samples, or look at why the model scores all answers the same."
        )
    gain = std / spread
    return gain, mean - gain * float(reward_N.mean())


class RunningMoments:
    """Mean and standard deviation of all numbers met so far, a batch at a time (Chan et al. 1979, eq. 2.1).

    trlX divides scores by this deviation (`scale_reward: running`); it is the sample's, N−1 in the denominator.
    """

    def __init__(self, count: float = 0.0, mean: float = 0.0, square: float = 0.0) -> None:
        """`square` is the sum of squared distances from the mean."""
        self.count, self.mean, self.square = count, mean, square

    def update(self, x_N: Tensor) -> None:
        """Take in more numbers."""
        x_N = x_N.detach().double()
        new, gap = x_N.numel(), float(x_N.mean()) - self.mean
        whole = self.count + new
        self.square += float((x_N - x_N.mean()).square().sum()) + gap**2 * self.count * new / whole
        self.mean += gap * new / whole
        self.count = whole

    @property
    def std(self) -> float:
        """The sample's standard deviation; 1 where the numbers do not vary, so that dividing by it does nothing."""
        found = math.sqrt(self.square / (self.count - 1)) if self.count > 1 else 0.0
        return found if found > 1e-8 else 1.0


class AdaptiveKL:
    """A KL coefficient that steers the KL of whole answers to a target (Ziegler et al. 2019, sec. 2.2).

    `value` is the coefficient now. It changes by at most 0.2 · n_steps / horizon of itself at each update.
    """

    def __init__(self, initial: float, target: float, horizon: float) -> None:
        if not (target > 0 and horizon > 0):
            raise ValueError(f"target and horizon must be positive, not {target} and {horizon}")
        self.value, self.target, self.horizon = float(initial), float(target), float(horizon)

    def update(self, kl: float | Tensor, n_steps: int) -> float:
        """The coefficient for the next rollout, from the mean over *all* answers of their summed KL, in nats.

        `n_steps` is how many answers that were. A negative KL estimate lowers the coefficient. ValueError on nan.
        """
        found = float(kl)
        if math.isnan(found):
            raise ValueError("the KL is nan; a coefficient steered by it would mean nothing")
        error = min(max(found / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self.horizon
        return self.value


class FixedKL:
    """A KL coefficient that stays; the same two names as `AdaptiveKL`."""

    def __init__(self, value: float) -> None:
        self.value = float(value)

    def update(self, kl: float | Tensor, n_steps: int) -> float:
        """The coefficient, whatever happened."""
        return self.value
