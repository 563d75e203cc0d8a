"""DDPO: DPO that looks hardest where a correction changed the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from palate import losses
from palate.algorithms import _pairs
from palate.batches import Loss, Pairs, Term
from palate.cast import Cast
from palate.settings import Choice


class Algorithm(Choice):
    """Dense DPO (RLHF-V, Yu et al. 2023, 2312.00849): tokens that a correction changed weigh γ in an answer's score.

    The defaults are the paper's. The released script differs: gamma 1.1, beta 0.1, normalise false, insertions false.
    """

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ("reference",)

    kind: str = "ddpo"
    """Corrected answers beside the originals."""
    beta: float = Field(default=0.5, gt=0)
    """How much of a nat of distance to the reference counts."""
    gamma: float = Field(default=5.0, gt=0)
    """Weight of a corrected token beside 1 of the others; 1 is DPO on log-probabilities per token."""
    normalise: bool = True
    """Divide a score by its weights, |unchanged| + γ|corrected|; without it long corrections count more."""
    insertions: bool = True
    """Weigh, too, what was only inserted or only left out; otherwise what was replaced by something."""

    @property
    def reads(self) -> str:
        """Corrections, marked everywhere they changed something or only where they replaced it."""
        return "corrections" if self.insertions else "replacements"

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Refuses corrections that changed nothing, and empty answers."""
        return _pairs.survey(rows)

    def prepare(self, cast: Cast, raw: Pairs) -> Pairs:
        """The reference's log-probabilities."""
        return _pairs.with_reference(cast, raw)

    def loss(self, cast: Cast, batch: Pairs) -> Loss:
        """−log σ(β · difference of the two scores' gains over the reference), averaged over pairs."""
        assert batch.ref_logp_BKT is not None
        logp_BKT = _pairs.logp(cast, "policy", batch)
        own_BK, ref_BK = self._score(logp_BKT, batch), self._score(batch.ref_logp_BKT, batch)
        error_B = losses.dpo(own_BK[:, 0], own_BK[:, 1], ref_BK[:, 0], ref_BK[:, 1], self.beta)
        metrics = _pairs.seen(logp_BKT, batch, losses.implicit_reward(own_BK, ref_BK, self.beta))
        return Loss({"loss": Term(error_B.sum(), "rows")}, metrics)

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _score(self, logp_BKT: Tensor, batch: Pairs) -> Tensor:
        return losses.ddpo_score(logp_BKT, batch.action_BKT, batch.corrected_BKT, self.gamma, self.normalise)
