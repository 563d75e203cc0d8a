"""Supervised fine-tuning: make the demonstrated answer likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from palate.batches import Examples, Loss, Mean, Term
from palate.cast import Cast
from palate.losses import cross_entropy
from palate.settings import Choice


class Algorithm(Choice):
    """Supervised fine-tuning: cross-entropy of demonstrated tokens, averaged over trained tokens or over rows."""

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "demonstrations"

    kind: str = "sft"
    """Supervised fine-tuning."""
    average: Literal["token", "sequence"] = "token"
    """What weighs the same: each trained token of the batch, or each row."""

    def survey(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Any row will do."""
        return rows

    def prepare(self, cast: Cast, raw: Examples) -> Examples:
        """Nothing has to be known beforehand."""
        return raw

    def loss(self, cast: Cast, batch: Examples) -> Loss:
        """−log p of the trained tokens, EOS included, prompt and padding never (unless asked to be trained)."""
        logp_BT, entropy_BT, likeliest_BT = cast.recital("policy", batch)
        nll_BT = cross_entropy(logp_BT, batch.action_BT)
        tokens_B = batch.action_BT.sum(-1)
        if self.average == "token":
            term = Term(nll_BT.sum(), per="tokens")
        else:
            term = Term((nll_BT.sum(-1) / tokens_B.clamp(min=1)).sum(), per="rows")
        count = float(tokens_B.sum())
        accuracy = Mean(likeliest_BT.sum().float(), count)
        return Loss({"loss": term}, {"entropy": Mean(entropy_BT.sum(), count), "mean_token_accuracy": accuracy})

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""
