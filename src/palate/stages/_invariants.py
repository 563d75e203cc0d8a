"""What must hold at the first look at a rollout: sampler and trainer agree, the ratio is 1, the KL starts at 0.

None of these is a matter of luck. A rollout drawn by the very weights that are about to be trained has ratio 1 in its
first minibatch, up to rounding; where it has not, everything after it would be off-policy in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from palate.batches import Duels, Experience, Learnt, Rollouts
from palate.cast import Cast
from palate.engines.publication import CLOSE, Publication, fingerprints
from palate.models.lora import bare_state
from palate.settings import NotFinite, PalateError
from palate.stages._guard import Spoilt

_ROWS = 8
"""Answers that are read again by the trainer; a disagreement is in every answer or it is none."""
_CANARY = 24
"""Tokens of the canary text."""
_TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2.0)


@torch.no_grad()
def publication(cast: Cast, canary: Rollouts, version: int) -> Publication:
    """The policy as it is now, for an engine, with what the trainer says of the canary text."""
    trunk, adapter = cast.seat("policy").trunk, cast.seat("policy").adapter
    weights = bare_state(trunk.model, adapter)
    said_BT = cast.logp("policy", canary, canary.temperature)
    if not bool(said_BT.isfinite().all()):
        raise NotFinite("the policy gives plain text log-probabilities that are not finite: its weights have diverged.")
    return Publication(
        version=version,
        fingerprints=fingerprints(weights),
        canary=canary,
        canary_logp_BT=said_BT,
        dtype=trunk.computes_in,
        weights=lambda: weights,
    )


def canary(prompt: list[int], temperature: float, device: torch.device) -> Rollouts:
    """The first tokens of a prompt as a text whose every token but the first is asked for."""
    tokens = (prompt * 2)[: max(2, min(_CANARY, len(prompt)))]
    tokens_BT = torch.tensor([tokens], device=device)
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    action_BT = real_BT.clone()
    action_BT[:, 0] = False
    nothing = torch.zeros(tokens_BT.shape, device=device)
    done_B = torch.ones(1, dtype=torch.bool, device=device)
    return Rollouts(tokens_BT, real_BT, action_BT, nothing, done_B, done_B.long() * 0, 0, temperature)


def require_finite(learnt: Learnt) -> None:
    """Raise NotFinite, with the batch, where what `prepare` made of a rollout is nan or infinite: once for all of it.

    Cells off the masks are read by nobody and may hold anything.
    """
    for name, numbers in vars(learnt).items():
        if not (isinstance(numbers, Tensor) and numbers.is_floating_point()):
            continue
        said_N = numbers[_read_by_a_loss(learnt, name)] if name.endswith(("_BT", "_BKT")) else numbers
        broken = int((~said_N.isfinite()).sum())
        if broken:
            raise Spoilt(
                f"{name.rpartition('_')[0]}: {broken} of {said_N.numel()} numbers are not finite; no step was taken.",
                learnt,
            )


def _read_by_a_loss(learnt: Learnt, name: str) -> Tensor:
    """The mask of the cells of one field that a loss reads."""
    if isinstance(learnt, Duels):
        return learnt.action_BKT
    if isinstance(learnt, Experience) and name in ("value_BT", "returns_BT"):
        return learnt.value_mask_BT
    return learnt.action_BT


@torch.no_grad()
def require_agreement(cast: Cast, rollouts: Rollouts, version: int) -> dict[str, float]:
    """Sampler's and trainer's log-probabilities of the same tokens, compared; how far they lie apart, as metrics.

    Raises PalateError, with the likely cause, when they differ by more than rounding, or when the answers are not of
    the version that was published last.
    """
    if rollouts.version != version:
        raise PalateError(
            f"rollouts: they are of policy version {rollouts.version}, but version {version} was published. "
            "Training on them would be off-policy. Look at what the engine does with a publication."
        )
    rows = rollouts.select(torch.arange(min(_ROWS, rollouts.size))).trimmed()
    gap_N = (cast.logp("policy", rows, rows.temperature) - rows.logp_BT)[rows.action_BT].abs()
    if not bool(gap_N.isfinite().all()):
        raise NotFinite("rollouts: the log-probability of a token that was drawn is not a finite number.")
    mean, largest = CLOSE[cast.seat("policy").trunk.computes_in]
    there, most = float(gap_N.mean()), float(gap_N.max())
    if there > mean or most > largest:
        raise PalateError(
            f"rollouts: sampler and trainer give the same tokens log-probabilities that differ by {there:.2g} on "
            f"average and {most:.2g} at most ({mean:g} and {largest:g} would be rounding). "
            f"Likely cause: {likely_cause(cast, rows, mean)}"
        )
    return {"sampling/sampling_logp_difference/mean": there, "sampling/sampling_logp_difference/max": most}


def require_first_minibatch(seen: Mapping[str, float], dtype: torch.dtype, number: int) -> None:
    """Ratio 1 and nothing clipped in the first minibatch of rollout `number`, before any step has been taken on it."""
    mean, largest = CLOSE[dtype]
    ratio, clipped = seen.get("val/ratio", 1.0), seen.get("policy/clipfrac_avg", 0.0)
    rounding = seen.get("val/ratio_var", 1.0) <= mean * largest  # which a clip as narrow as 3e-4 may still meet
    if abs(ratio - 1.0) <= 2 * mean and (clipped <= mean or rounding):
        return
    raise PalateError(
        f"rollout {number}: in its first minibatch the ratio is {ratio:.6g} (1 is right) and {clipped:.2%} of the "
        "tokens are clipped (none is right), although no step has been taken on it. Likely cause: old "
        "log-probabilities of other weights or another temperature than the loss uses, or dropout in one of the passes."
    )


def require_no_kl_yet(metrics: Mapping[str, float], tokens: float, dtype: torch.dtype) -> None:
    """Before the first update the policy *is* the reference, so their KL per token is 0 up to rounding."""
    kl, (mean, _) = metrics.get("objective/kl", 0.0), CLOSE[dtype]
    if abs(kl) > mean * max(tokens, 1.0):
        raise PalateError(
            f"rollout 1: the KL to the reference is {kl:.4g} nats per answer before any update, 0 is right. Likely "
            "cause: the reference is not the model the policy starts from, or the two are read at other temperatures."
        )


def likely_cause(cast: Cast, rows: Rollouts, mean: float) -> str:
    """Which of the known causes explains a disagreement, found by trying each."""
    ours_BT = cast.logp("policy", rows, rows.temperature)
    if not bool((ours_BT == cast.logp("policy", rows, rows.temperature)).all()):
        return "dropout, or another source of chance, is active: two passes over the same tokens differ."
    best = _best_temperature(cast, rows)
    if abs(best / rows.temperature - 1) > 1e-3 and _gap(cast.logp("policy", rows, best), rows) < 10 * mean:
        return f"temperature: the sampler drew at {best:.3g}, the trainer reads at {rows.temperature:.3g}."
    if "reference" in cast.roles and _gap(cast.logp("reference", rows, rows.temperature), rows) < 10 * mean:
        if cast.seat("policy").adapter is not None:
            return "the adapter is left off: the sampler speaks as the bare model does."
        return "stale weights: the sampler still speaks as the policy's start does. It took no publication."
    if begin := _begin_token(cast, rows, mean):
        return f"template or begin token: the sampler {begin}."
    difference_N = (rows.logp_BT - ours_BT)[rows.action_BT]
    if bool((difference_N >= -mean).all()) and float(difference_N.std()) < 0.5 * float(difference_N.mean()):
        return "a truncated distribution: the sampler left tokens out (top-k, top-p, suppressed ends)."
    if _at_the_start(rows, ours_BT, mean):
        return "template or begin token: the first answer tokens disagree most, as after another prompt."
    return "stale weights (the sampler speaks with another version of the policy), or dropout in the sampler."


def _best_temperature(cast: Cast, rows: Rollouts) -> float:
    """The temperature at which the trainer comes closest to the sampler: a coarse search, then a finer one."""

    def gap(temperature: float) -> float:
        return _gap(cast.logp("policy", rows, temperature), rows)

    best = min(_TEMPERATURES, key=gap)
    for width in (0.1, 0.02, 0.004, 0.0008):
        best = min((best * (1 + width * step / 5) for step in range(-5, 6)), key=gap)
    return best


def _begin_token(cast: Cast, rows: Rollouts, mean: float) -> str:
    """What the sampler did with the first token, where that alone explains the disagreement; else nothing."""
    config = cast.seat("policy").trunk.model.config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            longer = _shifted(rows, token)
            if _gap(cast.logp("policy", longer, rows.temperature), longer) < 10 * mean:
                return f"reads one more token, {token}, before each prompt"
    shorter = _shifted(rows, None)
    if (
        bool(shorter.action_BT.any(-1).all())
        and _gap(cast.logp("policy", shorter, rows.temperature), shorter) < 10 * mean
    ):
        return "does not read the first token of each prompt"
    return ""


def _shifted(rows: Rollouts, token: int | None) -> Rollouts:
    """The same answers after a prompt that begins with one more token, or (None) without its first."""
    wide = ("tokens_BT", "real_BT", "action_BT", "logp_BT")
    if token is None:
        return replace(rows, **{name: getattr(rows, name)[:, 1:] for name in wide})
    first = {"tokens_BT": token, "real_BT": True, "action_BT": False, "logp_BT": 0.0}
    return replace(rows, **{name: functional.pad(getattr(rows, name), (1, 0), value=first[name]) for name in wide})


def _gap(logp_BT: Tensor, rows: Rollouts) -> float:
    return float((logp_BT - rows.logp_BT)[rows.action_BT].abs().mean())


def _at_the_start(rows: Rollouts, ours_BT: Tensor, mean: float) -> bool:
    """Whether the disagreement sits in the first answer token of each row and fades behind it."""
    place_BT = rows.action_BT.cumsum(-1)
    first_BT, later_BT = rows.action_BT & (place_BT == 1), rows.action_BT & (place_BT > 4)
    early = _gap(ours_BT, replace(rows, action_BT=first_BT))
    late = _gap(ours_BT, replace(rows, action_BT=later_BT)) if bool(later_BT.any()) else 0.0
    return early > mean and early > 4 * late
