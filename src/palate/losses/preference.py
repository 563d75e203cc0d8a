"""Objectives of a policy trained on pairs directly; per pair, lower is better.

`chosen`, `rejected` and their `ref_` twins are log-probabilities of whole answers, already summed or averaged over the
answer's tokens by the caller (`answer_logp`); gradients into a reference are the caller's to stop. Written with
h = (chosen − ref_chosen) − (rejected − ref_rejected), the gain of the chosen answer over the rejected one, which is
exactly 0 where policy and reference agree. `ref_…` of 0 makes any of them reference-free.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from palate.losses.numeric import bounded, log1mexp, widen

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
"""The divergences `f_dpo` knows."""


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """β(log π − log π_ref), per answer: the reward a policy stands for, up to a constant of the prompt.

    Rafailov et al. 2023 (2305.18290), eq. 5.
    """
    return beta * (widen(logp) - widen(ref_logp))


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: Tensor | float = 0.0,
) -> Tensor:
    """−(1−ε) log σ(βh) − ε log σ(−βh), per pair; ln 2 where policy and reference agree.

    Rafailov et al. 2023 (2305.18290), eq. 7. `label_smoothing` ε, one number or one per pair, is the probability that
    the label is wrong (Mitchell 2023, "A note on DPO with noisy preferences", cDPO): the loss then rests at
    σ(βh) = 1 − ε, while without it the gradient never vanishes.
    """
    wrong = widen(label_smoothing) if isinstance(label_smoothing, Tensor) else label_smoothing
    gap = beta * _gain(chosen, rejected, ref_chosen, ref_rejected)
    return _smoothed(gap, wrong)


def soft_dpo(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, target: Tensor | float
) -> Tensor:
    """−p log σ(βh) − (1−p) log σ(−βh), per pair: `dpo` towards a stated probability p that chosen is better.

    p is a judge's belief or a share of votes; ½ is a tie. With the true Bradley–Terry probabilities the optimum is that
    of reinforcement learning with the KL coefficient β. p = 1 is `dpo`.
    """
    return dpo(chosen, rejected, ref_chosen, ref_rejected, beta, 1 - target)


def robust_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: Tensor | float = 0.0,
) -> Tensor:
    """(−(1−ε) log σ(βh) + ε log σ(−βh)) / (1−2ε), per pair: unbiased for `dpo` when a share ε of labels is flipped.

    Chowdhury et al. 2024 (2403.00409). ε must be under ½. Single values may be negative: they are not clamped, or the
    estimate would be biased again.
    """
    wrong = widen(label_smoothing) if isinstance(label_smoothing, Tensor) else label_smoothing
    gap = beta * _gain(chosen, rejected, ref_chosen, ref_rejected)
    return ((1 - wrong) * _nls(gap) - wrong * _nls(-gap)) / (1 - 2 * wrong)


def hinge(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """max(0, 1 − βh), per pair: SLiC's calibration on the pair's gain over the reference.

    Zhao et al. 2023 (2305.10425) as normalised by Liu et al. 2023 (RSO, 2309.06657).
    """
    return F.relu(1 - beta * _gain(chosen, rejected, ref_chosen, ref_rejected))


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """(h − 1/(2β))², per pair: the gain is pulled to 1/(2β) from both sides. Azar et al. 2023 (2310.12036), eq. 17.

    β is the paper's τ. The authors advise log-probabilities averaged over tokens; the paper sums.
    """
    return (_gain(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)).square()


def exo_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """KL(σ(βh), σ(−βh) ‖ 1−ε, ε), per pair: `dpo` with the divergence the other way round.

    Ji et al. 2024 (EXO, 2402.00856), eq. 16. ε must be in (0, 1): a hard label would cost infinity.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie between 0 and 1, not {label_smoothing}")
    gap = beta * _gain(chosen, rejected, ref_chosen, ref_rejected)
    right, wrong = math.log1p(-label_smoothing), math.log(label_smoothing)
    return gap.sigmoid() * (-_nls(gap) - right) + (-gap).sigmoid() * (-_nls(-gap) - wrong)


def nca_pair(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """−log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l) with r = β(log π − log π_ref), per pair; 2 ln 2 at the reference.

    Chen et al. 2024 (2402.05369), NCA for two answers: absolute likelihoods count, so that the chosen answer's does
    not have to fall.
    """
    up, down = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return _nls(up) + 0.5 * _nls(-up) + 0.5 * _nls(-down)


def bco_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """−log σ(r_w − δ) − log σ(−(r_l − δ)) with r = β(log π − log π_ref), per pair: a classifier of good and bad.

    Jung et al. 2024 (2404.04656). `shift` δ is the running mean of the rewards of both sides; it gets no gradient.
    """
    shift = widen(shift).detach() if isinstance(shift, Tensor) else shift
    up, down = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return _nls(up - shift) + _nls(shift - down)


def sppo_hard(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """(u_w − 1/(2β))² + (u_l + 1/(2β))² with u = log π − log π_ref, per pair.

    Wu et al. 2024 (2405.00675), eq. 4.7, with the win probability 1 for chosen and 0 for rejected; β is 1/η there.
    """
    up, down = _rewards(chosen, rejected, ref_chosen, ref_rejected, 1.0)
    return (up - 1 / (2 * beta)).square() + (down + 1 / (2 * beta)).square()


def apo_zero(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """1 − σ(r_w) + σ(r_l) with r = β(log π − log π_ref), per pair: chosen up, rejected down.

    D'Oosterlinck et al. 2024 (2408.06266), eq. 7: for chosen answers that are better than the policy's own.
    """
    up, down = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return (-up).sigmoid() + down.sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float) -> Tensor:
    """σ(r_w) + 1 − σ(r_w − r_l) with r = β(log π − log π_ref), per pair: both down, rejected more.

    D'Oosterlinck et al. 2024 (2408.06266), eq. 8: for chosen answers that are worse than the policy's own.
    """
    up, down = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return up.sigmoid() + (down - up).sigmoid()


def aot(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`dpo` between the sorted margins of the policy and those of the reference, per rank; needs the whole batch.

    Melnyk et al. 2024 (2406.05882), for pairs: the policy's distribution of log π(chosen) − log π(rejected) shall
    dominate the reference's. Rank i of one is compared with rank i of the other, whatever pair it came from; a batch of
    one pair is `dpo`.
    """
    own_B, ref_B = widen(chosen_B) - widen(rejected_B), widen(ref_chosen_B) - widen(ref_rejected_B)
    return _smoothed(beta * (own_B.sort(0).values - ref_B.sort(0).values), label_smoothing)


def aot_unpaired(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`dpo` between the sorted gains of the chosen and the sorted gains of the rejected answers, per rank.

    Melnyk et al. 2024 (2406.05882), for answers that do not come in pairs; needs the whole batch, as many of one kind
    as of the other.
    """
    up_B, down_B = _rewards(chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, 1.0)
    return _smoothed(beta * (up_B.sort(0).values - down_B.sort(0).values), label_smoothing)


def discopop(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, tau: float = 0.05
) -> Tensor:
    """−(1−m) log σ(βh) + m e^(−βh) with m = σ(βh/τ), per pair; ½ ln 2 + ½ at the reference.

    Lu et al. 2024 (DiscoPOP, 2406.08414), eq. 5: the log-ratio modulated loss. e^(−βh) is multiplied in the exponent,
    where a pair that is far out cannot turn into ∞ · 0.
    """
    gap = beta * _gain(chosen, rejected, ref_chosen, ref_rejected)
    exponential = bounded(F.logsigmoid(gap / tau) - gap, chosen, rejected).exp()
    return (-gap / tau).sigmoid() * _nls(gap) + exponential


def dpop(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    penalty: float = 5.0,
) -> Tensor:
    """−log σ(β(h − λ max(0, ref_chosen − chosen))), per pair: `dpo` that charges for a falling chosen answer.

    Pal et al. 2024 (2402.13228). `penalty` is λ.
    """
    fallen = F.relu(widen(ref_chosen) - widen(chosen))
    return _nls(beta * (_gain(chosen, rejected, ref_chosen, ref_rejected) - penalty * fallen))


def f_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> Tensor:
    """−log σ(βf′(u_w) − βf′(u_l)) with u = π/π_ref, per pair: `dpo` for another divergence than KL(π‖π_ref).

    Wang et al. 2023 (2309.16240). f′(u), up to constants that cancel: log u for `reverse_kl` (`dpo` itself),
    −1/u for `forward_kl`, log(u/(1+u)) for `js`, (1 − u^−α)/α for `alpha`, which goes from reverse (α → 0) to forward
    KL (α = 1). ValueError for a divergence without a name here, or α outside [0, 1].
    """
    up, down = _rewards(chosen, rejected, ref_chosen, ref_rejected, 1.0)
    slopes = [_slope(u, divergence, alpha, own) for u, own in ((up, chosen), (down, rejected))]
    return _nls(beta * (slopes[0] - slopes[1]))


def _slope(log_ratio: Tensor, divergence: str, alpha: float, source: Tensor) -> Tensor:
    """f′ of π/π_ref, from its logarithm; exponentials stay inside the number type of `source`."""
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 0):
        return log_ratio
    if divergence == "forward_kl":
        return -bounded(-log_ratio, source).exp()
    if divergence == "js":
        return F.logsigmoid(log_ratio)
    if divergence == "alpha" and 0 < alpha <= 1:
        return -torch.expm1(bounded(-alpha * log_ratio, source)) / alpha
    raise ValueError(
        f"no divergence is called {divergence!r} with alpha {alpha}: reverse_kl, forward_kl, js, alpha 0…1"
    )


def cpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """−(1−ε) log σ(βd) − ε log σ(−βd) with d = log π(chosen) − log π(rejected), per pair; summed log-probabilities.

    Xu et al. 2024 (2401.08417): `dpo` with a uniform reference. The cross-entropy of the chosen answer that the paper
    adds is not in it.
    """
    return _smoothed(beta * (widen(chosen) - widen(rejected)), label_smoothing)


def simpo(mean_chosen: Tensor, mean_rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """−log σ(β(l_w − l_l) − γ) with l the log-probability per token, per pair; no reference.

    Meng et al. 2024 (2405.14734), eq. 6. γ is the target margin itself, not its ratio to β.
    """
    return _nls(beta * (widen(mean_chosen) - widen(mean_rejected)) - gamma)


def slic(chosen: Tensor, rejected: Tensor, delta: float = 1.0, weight: float = 0.1) -> Tensor:
    """max(0, δ − log π(chosen) + log π(rejected)) − λ log π(chosen), per pair; no reference, no β.

    Zhao et al. 2023 (SLiC-HF, 2305.10425), with the cross-entropy towards the chosen answer; `weight` is λ.
    """
    up, down = widen(chosen), widen(rejected)
    return F.relu(delta - up + down) - weight * up


def orpo(mean_logp_chosen: Tensor, mean_logp_rejected: Tensor) -> Tensor:
    """−log σ(log odds(chosen) − log odds(rejected)), per pair: the odds-ratio term alone.

    Hong et al. 2024 (2403.07691), eq. 7; inputs are log-probabilities per token. The paper's loss is the cross-entropy
    of the chosen answer + λ times this.
    """
    return _nls(log_odds(mean_logp_chosen) - log_odds(mean_logp_rejected))


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 − p)) from log p, per element. log p is taken as −1e-12 at most: a sure answer has finite odds."""
    certain = widen(logp).clamp(max=-1e-12)
    return certain - log1mexp(certain)


def wpo_weight(mean_chosen: Tensor, mean_rejected: Tensor) -> Tensor:
    """min(1, e^(l_w + l_l)) with l the policy's log-probability per token, per pair; without gradient.

    Zhou et al. 2024 (WPO, 2406.11827): pairs the policy itself would write weigh more. The paper's alignment of l (per
    token, minus log Σ_v p(v)²) is the caller's to subtract; the weight may then reach its limit of 1.
    """
    return (widen(mean_chosen) + widen(mean_rejected)).clamp(max=0.0).exp().detach()


def ld_logp(logp_BT: Tensor, mask_BT: Tensor, shared_length_B: Tensor, alpha: float) -> Tensor:
    """Σ log p over an answer's first `shared_length` tokens + α Σ over its rest, per row.

    Liu et al. 2024 (LD-DPO, 2409.06411): the shared length of a pair is that of the shorter answer, so that mere length
    counts less. α = 1 is the plain sum, α = 0 cuts both answers alike. Tokens are counted inside the mask.
    """
    place_BT = mask_BT.long().cumsum(-1)
    logp_BT = widen(logp_BT).masked_fill(~mask_BT.bool(), 0.0)
    return torch.where(place_BT <= shared_length_B[:, None], logp_BT, alpha * logp_BT).sum(-1)


def ddpo_score(logp_BT: Tensor, mask_BT: Tensor, corrected_BT: Tensor, gamma: float, normalise: bool = True) -> Tensor:
    """(Σ_unchanged log p + γ Σ_corrected log p) / N with N = |unchanged| + γ|corrected|, per row.

    Yu et al. 2023 (RLHF-V, 2312.00849): the tokens an annotator corrected weigh γ. Scores of policy and reference enter
    `dpo` as its log-probabilities. γ = 1 is the log-probability per token; `normalise=False` leaves the sum, as the
    released script does. A row without tokens scores 0.
    """
    mask_BT = mask_BT.bool()
    logp_BT = widen(logp_BT).masked_fill(~mask_BT, 0.0)
    weight_BT = torch.ones_like(logp_BT).masked_fill(corrected_BT.bool(), gamma).masked_fill(~mask_BT, 0.0)
    total_B, weight_B = (weight_BT * logp_BT).sum(-1), weight_BT.sum(-1)
    return total_B / weight_B.masked_fill(weight_B == 0, 1.0) if normalise else total_B


def _nls(x: Tensor) -> Tensor:
    return -F.logsigmoid(x)


def _smoothed(gap: Tensor, wrong: Tensor | float) -> Tensor:
    return (1 - wrong) * _nls(gap) + wrong * _nls(-gap)


def _gain(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    up, down = _rewards(chosen, rejected, ref_chosen, ref_rejected, 1.0)
    return up - down


def _rewards(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    return implicit_reward(chosen, ref_chosen, beta), implicit_reward(rejected, ref_rejected, beta)
