"""Odds ratio preference optimisation: fine-tuning and preference in one stage, with no reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field, model_validator

from palate import losses
from palate.algorithms import _pairs
from palate.batches import Loss, Mean, Pairs, Term
from palate.cast import Cast
from palate.settings import Choice

_NAMES = {"lambda": "beta", "lambda_": "beta"}


class Algorithm(Choice):
    """ORPO (Hong et al. 2024, 2403.07691): cross-entropy of the chosen answers + λ times an odds-ratio term."""

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "pairs"
    other_names: ClassVar[Mapping[str, str]] = _NAMES

    kind: str = "orpo"
    """Odds ratio preference optimisation."""
    beta: float = Field(default=0.1, ge=0)
    """λ, the weight of the odds-ratio term; the paper has 0.1 to 0.25, its code 1. `lambda` is understood too."""

    @model_validator(mode="before")
    @classmethod
    def _know_other_names(cls, given: Any) -> Any:
        return _pairs.in_our_words(given, cls.other_names)

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Refuses pairs that teach nothing."""
        return _pairs.survey(rows)

    def prepare(self, cast: Cast, raw: Pairs) -> Pairs:
        """Nothing has to be known beforehand."""
        return raw

    def loss(self, cast: Cast, batch: Pairs) -> Loss:
        """−log π of the chosen answers' tokens, end token included, and λ times −log σ of the log odds ratio."""
        logp_BKT = _pairs.logp(cast, "policy", batch)
        said = _pairs.answers(logp_BKT, batch, average=True)
        straight_B, swapped_B = losses.orpo(said.chosen, said.rejected), losses.orpo(said.rejected, said.chosen)
        loss_B = _pairs.expected(straight_B, swapped_B, batch.probability_B)
        terms = {"loss/sft": _pairs.nll(logp_BKT, batch), "loss": Term(loss_B.sum(), "rows", self.beta)}
        odds_B = (losses.log_odds(said.chosen) - losses.log_odds(said.rejected)).detach()
        rows = float(batch.size)
        odds = {
            "log_odds_chosen": Mean(odds_B.sum(), rows),
            "log_odds_ratio": Mean(-straight_B.detach().sum(), rows),
        }
        return Loss(terms, {**_pairs.seen(logp_BKT, batch, self.beta * said.gain_BK), **odds})

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""
