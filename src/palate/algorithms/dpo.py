"""Direct preference optimisation: a policy trained on pairs as if it were its own reward model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from palate import losses
from palate.algorithms import _pair_losses, _pairs
from palate.algorithms._pairs import Answers, Judged
from palate.batches import Loss, Pairs, Term
from palate.cast import Cast
from palate.settings import Choice, PalateError


class Algorithm(Choice):
    """DPO (Rafailov et al. 2023, 2305.18290) and the losses of pairs that followed it, alone or several at once."""

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    reads: ClassVar[str] = "pairs"
    other_names: ClassVar[Mapping[str, str]] = _pair_losses.NAMES

    kind: str = "dpo"
    """Direct preference optimisation."""
    loss_type: str | tuple[str, ...] = "sigmoid"
    """One loss or a list: sigmoid, sigmoid_norm (per token), robust, hinge, ipo, exo_pair, nca_pair, bco_pair,
    sppo_hard, apo_zero, apo_down, aot, aot_unpaired, discopop, sft. `palate.losses` has their formulas and papers."""
    loss_weights: tuple[float, ...] | None = None
    """A weight for each loss of the list; 1 each when left out."""
    beta: float = Field(default=0.1, gt=0)
    """β: what a nat of distance to the reference costs; IPO's τ."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """ε, the share of labels taken to be wrong: cDPO with sigmoid; also read by robust, aot and exo_pair (0: 1e-3)."""
    logp_reduce: Literal["auto", "sum", "mean"] = "auto"
    """An answer's log-probability: summed over its tokens, or per token. auto: per token for ipo and sigmoid_norm."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of −log π of the chosen answer per token beside the loss (RPO, Llama 3), which keeps it from falling."""
    dpop_lambda: float = Field(default=0.0, ge=0)
    """λ of DPO-Positive, which charges sigmoid for a chosen answer below its reference; 0 is off, the paper has 5."""
    f_divergence: losses.Divergence = "reverse_kl"
    """The divergence that keeps sigmoid near the reference: reverse_kl, forward_kl, js or alpha."""
    f_alpha: float = Field(default=0.5, ge=0, le=1)
    """α of the alpha divergence: 0 is reverse, 1 forward KL."""
    discopop_tau: float = Field(default=0.05, gt=0)
    """Temperature at which discopop goes over from its logistic to its exponential half."""
    reference_free: bool = False
    """Take every answer as equally likely under the reference, which then takes no memory."""
    use_wpo_weighting: bool = False
    """Weigh each pair by how likely the policy itself would write it (WPO, without the paper's alignment)."""
    use_margin: bool = False
    """Ask sigmoid for the pair's stated margin as well: −log σ(βh − margin)."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """Weight of the tokens by which one answer is longer than the other (LD-DPO); 1 is plain DPO."""
    sync_ref: bool = False
    """Let the reference follow the policy (TR-DPO); it then needs weights of its own."""
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1)
    """Share of the policy in the reference after each of its moves; 1 is a copy."""
    ref_model_sync_steps: int = Field(default=512, ge=1)
    """Optimiser steps from one move of the reference to the next."""

    @model_validator(mode="before")
    @classmethod
    def _know_other_names(cls, given: Any) -> Any:
        return _pairs.in_our_words(given, cls.other_names)

    @field_validator("f_divergence", mode="before")
    @classmethod
    def _know_other_divergences(cls, given: Any) -> Any:
        return _pair_losses.DIVERGENCES.get(given, given) if isinstance(given, str) else given

    @field_validator("loss_type")
    @classmethod
    def _know_every_loss(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return _pair_losses.known(given)

    @model_validator(mode="after")
    def _agree(self) -> Algorithm:
        for fault in _pair_losses.faults(self):
            raise ValueError(fault)
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """The reference, unless it is taken to be uniform."""
        return () if self.reference_free else ("reference",)

    @property
    def moves(self) -> tuple[str, ...]:
        """The reference, where it follows the policy."""
        return ("reference",) if self.sync_ref else ()

    @property
    def weights(self) -> dict[str, float]:
        """Each loss with its weight."""
        names = _pairs.listed(self.loss_type)
        return dict(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    def averages(self, name: str) -> bool:
        """Whether a loss reads log-probabilities per token."""
        return self.logp_reduce == "mean" or (self.logp_reduce == "auto" and name in _pair_losses.AVERAGED)

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Refuses pairs that teach nothing, and soft labels that a loss would not read."""
        found = _pairs.survey(rows, 2 if set(self.weights) & set(_pair_losses.WHOLE) else 1)
        if deaf := set(self.weights) & set(_pair_losses.RANKED):
            _pairs.refuse_soft_labels(found, ", ".join(sorted(deaf)))
        return found

    def prepare(self, cast: Cast, raw: Pairs) -> Judged:
        """The reference's log-probabilities, and what losses of the whole batch make of the policy's."""
        if self.sync_ref and cast.seat("reference").trunk is cast.seat("policy").trunk:
            raise PalateError("sync_ref: the reference has no weights of its own to move. Use layout separate.")
        pairs = raw if self.reference_free else _pairs.with_reference(cast, raw)
        if not set(self.weights) & set(_pair_losses.WHOLE):
            return Judged(**vars(pairs))
        said = self._said(_pairs.logp_of_all(cast, "policy", pairs), pairs)
        return Judged(**vars(pairs), **_pair_losses.of_the_whole(self, said))

    def loss(self, cast: Cast, batch: Judged) -> Loss:
        """The weighted losses of all pairs, and −log π of the chosen answers where it has a weight."""
        logp_BKT = _pairs.logp(cast, "policy", batch)
        said = self._said(logp_BKT, batch)
        terms: dict[str, Term] = {}
        weighted = [
            weight * _pair_losses.pairwise(name, self, said[name], batch)
            for name, weight in self.weights.items()
            if name != "sft"
        ]
        if weighted:
            terms["loss"] = Term((self._trust(logp_BKT, batch) * torch.stack(weighted).sum(0)).sum(), "rows")
        if sft := self.weights.get("sft", 0.0) + self.sft_weight:
            terms["loss/sft" if terms else "loss"] = _pairs.nll(logp_BKT, batch, sft)
        first = next(iter(said.values()))
        return Loss(terms, _pairs.seen(logp_BKT, batch, self.beta * first.gain_BK))

    def after(self, cast: Cast, step: int) -> None:
        """Every so many steps the reference moves towards the policy, where it does (TR-DPO)."""
        if self.sync_ref and step % self.ref_model_sync_steps == 0:
            cast.blend("policy", "reference", self.ref_model_mixup_alpha)

    def _said(self, logp_BKT: Tensor, batch: Pairs) -> dict[str, Answers]:
        """Log-probabilities of whole answers as each loss reads them."""
        return {name: _pairs.answers(logp_BKT, batch, self.averages(name), self.ld_alpha) for name in self.weights}

    def _trust(self, logp_BKT: Tensor, batch: Pairs) -> Tensor:
        if not self.use_wpo_weighting:
            return torch.ones_like(batch.probability_B)
        mean = _pairs.answers(logp_BKT, batch, average=True)
        return losses.wpo_weight(mean.chosen, mean.rejected)
