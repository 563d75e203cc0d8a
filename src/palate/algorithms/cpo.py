"""Contrastive preference optimisation: DPO without a reference, held in place by imitation of the chosen answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from palate import losses
from palate.algorithms import _pairs
from palate.algorithms._pairs import Answers
from palate.batches import Loss, Pairs, Term
from palate.cast import Cast
from palate.settings import Choice

_AVERAGED = ("ipo", "simpo")


class Algorithm(Choice):
    """CPO (Xu et al. 2024, 2401.08417): the losses of pairs under a uniform reference, plus cross-entropy."""

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "pairs"

    kind: str = "cpo"
    """Contrastive preference optimisation."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid"
    """The loss of a pair: the paper's, SLiC's hinge, IPO's square or SimPO's margin; the last two per token."""
    beta: float = Field(default=0.1, gt=0)
    """β: what a nat is worth as reward."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong."""
    cpo_alpha: float = Field(default=1.0, ge=0)
    """Weight of −log π of the chosen answer per token beside the loss."""
    simpo_gamma: float = Field(default=0.5, ge=0)
    """γ of simpo: the margin of reward asked for."""

    @model_validator(mode="after")
    def _agree(self) -> Algorithm:
        if "simpo_gamma" in self.model_fields_set and self.loss_type != "simpo":
            raise ValueError("simpo_gamma: only loss_type simpo reads it. Leave it out.")
        return self

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Refuses pairs that teach nothing."""
        return _pairs.survey(rows)

    def prepare(self, cast: Cast, raw: Pairs) -> Pairs:
        """Nothing has to be known beforehand."""
        return raw

    def loss(self, cast: Cast, batch: Pairs) -> Loss:
        """The loss of all pairs and −log π of the chosen answers; a label that is not sure counts both ways."""
        logp_BKT = _pairs.logp(cast, "policy", batch)
        said = _pairs.answers(logp_BKT, batch, average=self.loss_type in _AVERAGED)
        formula = _FORMULAS[self.loss_type]
        sure_B = _pairs.sureness(batch.probability_B, self.label_smoothing)
        loss_B = _pairs.expected(formula(self, said), formula(self, said.swapped), sure_B)
        terms = {"loss": Term(loss_B.sum(), "rows")}
        if self.cpo_alpha:
            terms["loss/sft"] = _pairs.nll(logp_BKT, batch, self.cpo_alpha)
        return Loss(terms, _pairs.seen(logp_BKT, batch, self.beta * said.gain_BK))

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""


_FORMULAS: Mapping[str, Callable[[Algorithm, Answers], Tensor]] = {
    "sigmoid": lambda how, said: losses.cpo(said.chosen, said.rejected, how.beta),
    "hinge": lambda how, said: losses.hinge(*said, how.beta),
    "ipo": lambda how, said: losses.ipo(*said, how.beta),
    "simpo": lambda how, said: losses.simpo(said.chosen, said.rejected, how.beta, how.simpo_gamma),
}
