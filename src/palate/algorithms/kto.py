"""KTO and its relatives: learn from single answers, each with a thumb up or down."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from palate import losses
from palate.algorithms._labels import FAIR, balancing_weights, middle, mismatched
from palate.batches import Labelled, Loss, Mean, Term, Tokens
from palate.cast import Cast
from palate.settings import Choice, PalateError


class Algorithm(Choice):
    """Kahneman–Tversky optimisation: raise answers with a thumb up, lower the others, each on its own.

    z is found in `prepare` from the *whole* batch, all micro-batches and ranks together, without gradient: for KTO by
    reading each prompt with the next row's answer (`mismatched`), which takes the reference model itself, so that
    `precompute_reference` is refused; for BCO it is the batch's own mean, half of it from each kind.
    """

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ("reference",)
    reads: ClassVar[str] = "labels"

    kind: str = "kto"
    """Single answers with thumbs; a pair of answers is read as one thumb up and one thumb down."""
    loss_type: Literal["kto", "bco", "apo_zero_unpaired"] = "kto"
    """`kto`: gains and losses felt from z, the estimated KL to the reference. `bco`: a classifier whose logit is the
    reward less the batch's mean. `apo_zero_unpaired`: as kto with z = 0, which takes no KL term."""
    beta: float = Field(default=0.1, gt=0)
    """How much of a nat of log π − log π_ref counts; larger stays closer to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """λ_D, the weight of answers with a thumb up."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """λ_U, the weight of answers with a thumb down."""

    @property
    def rereads(self) -> str:
        """Why the KL term takes the reference itself; nothing without that term."""
        if self.loss_type != "kto":
            return ""
        return (
            "the KL term reads prompts with other rows' answers, a new mixture in each batch, so the reference has to "
            "be there. Leave the setting out, or take loss_type bco or apo_zero_unpaired."
        )

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Refuse data with one kind of label alone; warn where the two kinds do not weigh about the same."""
        up = sum(row.label for row in rows)
        down = len(rows) - up
        if not up or not down:
            has, lacks = ("up", "down") if up else ("down", "up")
            raise PalateError(
                f"data: all {len(rows)} answers have a thumb {has}; without any thumb {lacks} there is nothing to "
                "tell apart. Bring both kinds, or train on the good ones with kind: sft."
            )
        ratio = self.desirable_weight * up / (self.undesirable_weight * down)
        if not FAIR[0] - 1e-9 <= ratio <= FAIR[1] + 1e-9:
            weights = balancing_weights(up, down)
            warnings.warn(
                f"data: {up} answers with a thumb up weigh {ratio:.3g} times the {down} with a thumb down; published "
                f"is 1 to 1.5. Set desirable_weight: {weights[0]:.4g} and undesirable_weight: {weights[1]:.4g}.",
                stacklevel=2,
            )
        return rows

    def prepare(self, cast: Cast, raw: Labelled) -> Labelled:
        """The reference's log-probabilities, and z. Raises PalateError for a batch of one row."""
        if raw.size < 2 and self.loss_type != "apo_zero_unpaired":
            raise PalateError(
                "algorithm: a batch of one row has no other row to compare with. Take a batch_size of 2 or more; "
                "a held-out share of one row is too small, too."
            )
        if self.rereads and raw.ref_logp_BT is not None:
            raise PalateError(f"precompute_reference: {self.rereads}")
        known_BT = raw.ref_logp_BT
        if known_BT is None:
            known_BT = self._say(cast, "reference", raw)
        return replace(raw, ref_logp_BT=known_BT, kl=self._point(cast, raw, known_BT))

    def loss(self, cast: Cast, batch: Labelled) -> Loss:
        """The mean over all rows, not within each kind; log-probabilities of answers are sums."""
        assert batch.ref_logp_BT is not None
        logp_B = losses.answer_logp(cast.logp("policy", batch), batch.action_BT)
        ref_B = losses.answer_logp(batch.ref_logp_BT, batch.action_BT)
        good_B = batch.desirable_B
        up, down = self.desirable_weight, self.undesirable_weight
        if self.loss_type == "bco":
            weight_B = torch.where(good_B, up, down)
            error_B = weight_B * losses.bco(logp_B, ref_B, good_B, self.beta, self.beta * batch.kl)
        else:
            error_B = losses.kto(logp_B, ref_B, good_B, batch.kl, self.beta, up, down)
        metrics = _metrics(logp_B.detach(), ref_B, good_B, self.beta)
        return Loss(
            {"loss": Term(error_B.sum(), per="rows")},
            {**metrics, "kl": Mean(logp_B.new_tensor(batch.kl * batch.size), float(batch.size))},
        )

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _say(self, cast: Cast, role: str, rows: Tokens) -> Tensor:
        return cast.chunked(rows, lambda part: cast.logp(role, part))

    def _point(self, cast: Cast, raw: Labelled, ref_BT: Tensor) -> float:
        """z in nats: the point from which an answer's log π − log π_ref counts as gained or lost."""
        if self.loss_type == "apo_zero_unpaired":
            return 0.0
        if self.loss_type == "bco":
            gain_B = losses.answer_logp(self._say(cast, "policy", raw) - ref_BT, raw.action_BT)
            return middle(gain_B, raw.desirable_B)
        other = mismatched(raw, cast.seat("policy").trunk.context)
        logp_B = losses.answer_logp(self._say(cast, "policy", other), other.action_BT)
        return float(losses.kto_kl(logp_B, losses.answer_logp(self._say(cast, "reference", other), other.action_BT)))


def _metrics(logp_B: Tensor, ref_B: Tensor, good_B: Tensor, beta: float) -> dict[str, Mean]:
    """What a report always shows of answers with a thumb up ("chosen") and of the others, each over its own kind."""
    change_B = logp_B - ref_B
    up, down = float(good_B.sum()), float((~good_B).sum())
    return {
        "rewards/chosen": Mean(beta * change_B[good_B].sum(), up),
        "rewards/rejected": Mean(beta * change_B[~good_B].sum(), down),
        "logps/chosen": Mean(logp_B[good_B].sum(), up),
        "logps/rejected": Mean(logp_B[~good_B].sum(), down),
        "logps/chosen_change": Mean(change_B[good_B].sum(), up),
    }
