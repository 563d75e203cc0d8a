"""Losses of pairs by the name users know them by, and what each of them reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from palate import losses
from palate.algorithms import _pairs
from palate.algorithms._pairs import Answers, Judged
from palate.settings import nearest

NAMES: Mapping[str, str] = {
    "rpo_alpha": "sft_weight",
    "sync_ref_model": "sync_ref",
    "use_weighting": "use_wpo_weighting",
    "f_divergence_type": "f_divergence",
    "f_alpha_divergence_coef": "f_alpha",
}
"""Settings by the names that users of TRL know."""
DIVERGENCES: Mapping[str, str] = {"js_divergence": "js", "alpha_divergence": "alpha"}
"""Divergences likewise."""
_RENAMED = {"aot_pair": "aot_unpaired"}  # what TRL called it once; TRL's `aot` was and is the one for pairs
_METHODS = {"kto_pair": "kto", "kto": "kto", "orpo": "orpo", "cpo": "cpo", "simpo": "simpo"}
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired")
_SIGMOID = ("sigmoid", "sigmoid_norm")
AVERAGED = ("ipo", "sigmoid_norm")
"""Losses that read log-probabilities per token unless asked otherwise."""
RANKED = ("aot", "aot_unpaired")
"""Losses between sorted numbers of the whole batch."""
WHOLE = (*RANKED, "bco_pair")
"""Losses that need to see the whole batch."""


class Asked(Protocol):
    """The settings that the formulas read."""

    @property
    def weights(self) -> dict[str, float]: ...
    @property
    def loss_type(self) -> str | tuple[str, ...]: ...
    @property
    def loss_weights(self) -> tuple[float, ...] | None: ...
    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def dpop_lambda(self) -> float: ...
    @property
    def f_divergence(self) -> losses.Divergence: ...
    @property
    def f_alpha(self) -> float: ...
    @property
    def discopop_tau(self) -> float: ...
    @property
    def use_margin(self) -> bool: ...
    @property
    def reference_free(self) -> bool: ...
    @property
    def ld_alpha(self) -> float: ...
    @property
    def sync_ref(self) -> bool: ...
    @property
    def model_fields_set(self) -> set[str]: ...
    def averages(self, name: str) -> bool: ...


def known(given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """The names of losses as they are called here; ValueError for one that is not known."""
    names = tuple(_RENAMED.get(name, name) for name in _pairs.listed(given))
    every = [*FORMULAS, "sft"]
    for name in names:
        if name in _METHODS:
            raise ValueError(f"{name!r} is a method of its own. Write kind: {_METHODS[name]}.")
        if name not in every:
            raise ValueError(f"no loss is called {name!r}.{nearest(name, every)} Known: {', '.join(every)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError("name each loss once, and one at least.")
    return names[0] if isinstance(given, str) else names


def faults(how: Asked) -> Iterator[str]:
    """What would have no effect, or would ask for two things at once."""
    names = _pairs.listed(how.loss_type)
    if how.loss_weights is not None and len(how.loss_weights) != len(names):
        yield f"loss_weights: {len(how.loss_weights)} for {len(names)} losses. Give one for each of loss_type."
        return
    if any(weight <= 0 for weight in how.weights.values()):
        yield "loss_weights: each must be above 0. Leave a loss out of loss_type instead."
    if how.label_smoothing and not set(names) & set(_SMOOTHED):
        yield f"label_smoothing: {', '.join(names)} does not read it. It belongs to {', '.join(_SMOOTHED)}."
    ways = {"dpop_lambda": how.dpop_lambda > 0, "f_divergence": how.f_divergence != "reverse_kl"}
    asked = [name for name, on in {**ways, "use_margin": how.use_margin}.items() if on]
    if asked and not set(names) & set(_SIGMOID):
        yield f"{asked[0]}: {', '.join(names)} does not read it. It belongs to sigmoid."
    if len(asked) > 1:
        yield f"{' and '.join(asked)}: each makes another loss of sigmoid. Take one."
    if how.ld_alpha < 1 and any(how.averages(name) for name in names):
        yield "ld_alpha: it weighs sums of log-probabilities, and these are averaged. Set logp_reduce: sum."
    if how.reference_free and (how.sync_ref or how.dpop_lambda):
        yield f"{'sync_ref' if how.sync_ref else 'dpop_lambda'}: there is no reference. Leave reference_free out."
    moved = {"ref_model_mixup_alpha", "ref_model_sync_steps"} & how.model_fields_set
    if moved and not how.sync_ref:
        yield f"{min(moved)}: the reference stays where it is. Set sync_ref: true."


def pairwise(name: str, how: Asked, said: Answers, batch: Judged) -> Tensor:
    """One loss per pair; a label that is not sure counts in both directions."""
    loss_B = FORMULAS[name](how, said, batch)
    if bool((batch.probability_B == 1).all()):
        return loss_B
    return _pairs.expected(loss_B, FORMULAS[name](how, said.swapped, batch), batch.probability_B)


def of_the_whole(how: Asked, said: Mapping[str, Answers]) -> dict[str, Any]:
    """Fields of `Judged`, from the log-probabilities of the whole batch, by loss."""
    partner_B: dict[str, Tensor] = {}
    if one := said.get("aot"):
        margin_B = one.ref_chosen - one.ref_rejected
        partner_B["margin"] = _pairs.of_same_rank(one.chosen - one.rejected, margin_B)
    if two := said.get("aot_unpaired"):
        up_B, down_B = two.gain_BK.unbind(-1)
        partner_B["rejected"] = _pairs.of_same_rank(up_B, down_B)
        partner_B["chosen"] = _pairs.of_same_rank(down_B, up_B)
    shift = how.beta * float(said["bco_pair"].gain_BK.mean()) if "bco_pair" in said else 0.0
    return {"partner_B": partner_B, "shift": shift}


def _sigmoid(how: Asked, said: Answers, batch: Judged) -> Tensor:
    """−log σ of the gain: with a margin, another divergence, or DPO-Positive's penalty."""
    if how.dpop_lambda:
        straight_B, swapped_B = (losses.dpop(*s, how.beta, how.dpop_lambda) for s in (said, said.swapped))
        return _pairs.expected(straight_B, swapped_B, torch.full_like(straight_B, 1 - how.label_smoothing))
    if how.f_divergence != "reverse_kl":
        more = (how.beta, how.f_divergence, how.f_alpha)
        straight_B, swapped_B = (losses.f_dpo(*s, *more) for s in (said, said.swapped))
        return _pairs.expected(straight_B, swapped_B, torch.full_like(straight_B, 1 - how.label_smoothing))
    if how.use_margin:
        said = said._replace(ref_chosen=said.ref_chosen + batch.margin_B / how.beta)
    return losses.dpo(*said, how.beta, how.label_smoothing)


def _aot(how: Asked, said: Answers, batch: Judged) -> Tensor:
    """`losses.aot` row by row: a row's margin beside the reference's margin of its rank."""
    partner_B = batch.partner_B["margin"]
    nothing_B = torch.zeros_like(partner_B)
    return losses.dpo(said.chosen, said.rejected, partner_B, nothing_B, how.beta, how.label_smoothing)


def _aot_unpaired(how: Asked, said: Answers, batch: Judged) -> Tensor:
    """`losses.aot_unpaired` row by row: each answer's gain beside that of its rank on the other side.

    Over a batch both halves sum to the loss and each has its own side's gradient: half of the value, all of the
    gradient.
    """
    up_B, down_B = said.gain_BK.unbind(-1)
    zero_B, eps = torch.zeros_like(up_B), how.label_smoothing
    both_B = losses.dpo(up_B, batch.partner_B["rejected"], zero_B, zero_B, how.beta, eps)
    both_B = both_B + losses.dpo(batch.partner_B["chosen"], down_B, zero_B, zero_B, how.beta, eps)
    return both_B - both_B.detach() / 2


FORMULAS: Mapping[str, Callable[[Asked, Answers, Judged], Tensor]] = {
    "sigmoid": _sigmoid,
    "sigmoid_norm": _sigmoid,
    "robust": lambda how, said, _: losses.robust_dpo(*said, how.beta, how.label_smoothing),
    "hinge": lambda how, said, _: losses.hinge(*said, how.beta),
    "ipo": lambda how, said, _: losses.ipo(*said, how.beta),
    "exo_pair": lambda how, said, _: losses.exo_pair(*said, how.beta, how.label_smoothing or 1e-3),
    "nca_pair": lambda how, said, _: losses.nca_pair(*said, how.beta),
    "bco_pair": lambda how, said, batch: losses.bco_pair(*said, how.beta, batch.shift),
    "sppo_hard": lambda how, said, _: losses.sppo_hard(*said, how.beta),
    "apo_zero": lambda how, said, _: losses.apo_zero(*said, how.beta),
    "apo_down": lambda how, said, _: losses.apo_down(*said, how.beta),
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "discopop": lambda how, said, _: losses.discopop(*said, how.beta, how.discopop_tau),
}
"""Per pair, by name; `sft` is not among them: it is a sum over tokens."""
