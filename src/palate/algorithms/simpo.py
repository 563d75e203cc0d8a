"""Simple preference optimisation: log-probabilities per token against a target margin, and no reference at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from palate import losses
from palate.algorithms import _pairs
from palate.batches import Loss, Pairs, Term
from palate.cast import Cast
from palate.settings import Choice

_NAMES = {"simpo_gamma": "gamma", "cpo_alpha": "sft_weight"}


class Algorithm(Choice):
    """SimPO (Meng et al. 2024, 2405.14734): the chosen answer shall beat the other by a margin, per token."""

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "pairs"
    other_names: ClassVar[Mapping[str, str]] = _NAMES

    kind: str = "simpo"
    """Simple preference optimisation."""
    beta: float = Field(default=2.0, gt=0)
    """β: what a nat per token is worth as reward; the paper has 2 to 10."""
    gamma: float | None = Field(default=None, ge=0)
    """γ: the margin of reward asked for; β/2 when neither it nor its ratio is given, as in the paper's settings."""
    gamma_beta_ratio: float | None = Field(default=None, ge=0)
    """γ / β, as the paper's code has it; instead of gamma."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of −log π of the chosen answer per token beside the loss; 0 in the paper."""

    @model_validator(mode="before")
    @classmethod
    def _know_other_names(cls, given: Any) -> Any:
        return _pairs.in_our_words(given, cls.other_names)

    @model_validator(mode="after")
    def _one_margin(self) -> Algorithm:
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("gamma and gamma_beta_ratio name the same margin. Give one of them.")
        return self

    @property
    def margin(self) -> float:
        """γ, however it was given."""
        ratio = 0.5 if self.gamma_beta_ratio is None else self.gamma_beta_ratio
        return ratio * self.beta if self.gamma is None else self.gamma

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Refuses pairs that teach nothing."""
        return _pairs.survey(rows)

    def prepare(self, cast: Cast, raw: Pairs) -> Pairs:
        """Nothing has to be known beforehand."""
        return raw

    def loss(self, cast: Cast, batch: Pairs) -> Loss:
        """−log σ(β(l_w − l_l) − γ) of all pairs, l per token; a label that is not sure counts in both directions."""
        logp_BKT = _pairs.logp(cast, "policy", batch)
        said = _pairs.answers(logp_BKT, batch, average=True)
        straight_B = losses.simpo(said.chosen, said.rejected, self.beta, self.margin)
        swapped_B = losses.simpo(said.rejected, said.chosen, self.beta, self.margin)
        sure_B = _pairs.sureness(batch.probability_B, self.label_smoothing)
        terms = {"loss": Term(_pairs.expected(straight_B, swapped_B, sure_B).sum(), "rows")}
        if self.sft_weight:
            terms["loss/sft"] = _pairs.nll(logp_BKT, batch, self.sft_weight)
        return Loss(terms, _pairs.seen(logp_BKT, batch, self.beta * said.gain_BK))

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""
