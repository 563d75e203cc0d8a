"""Rejection sampling: answer a prompt many times, keep the best answers, imitate them."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from palate import credit
from palate.algorithms import _graded
from palate.batches import Chosen, Loss, Mean, Scored, Term, Tokens
from palate.cast import Cast
from palate.losses import cross_entropy
from palate.settings import Choice


class Algorithm(Choice):
    """Best-of-n as a teacher: each prompt's best of n answers (Stiennon et al. 2020), or all above a rising bar.

    `select: best` on one large rollout of the start policy ends at the law of best-of-n itself; over several
    rollouts each is best of the last. `select: quantile` is trlX's RFT, a growth step and its improvement steps of
    ReST (Gulcehre et al. 2023, 2308.08998): the same answers are learnt from in `n_improve_steps` turns, ever fewer of
    them; the next rollout starts anew. Answers are read at the temperature at which they were drawn.
    """

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    learns: ClassVar[type[Chosen]] = Chosen

    kind: str = "best_of_n"
    """Imitation of the best of its own answers."""
    num_generations: _graded.Group = 8
    """Answers sampled per prompt, n."""
    select: Literal["best", "quantile"] = "best"
    """What is imitated: the best answer of each prompt, or all answers at or above a quantile of its scores."""
    start_quantile: float = Field(default=0.7, ge=0, le=1)
    """Where the bar lies in the first improvement step, for each prompt by itself."""
    end_quantile: float = Field(default=0.95, ge=0, le=1)
    """Where it lies in the last; a prompt's best answer is always kept."""
    n_improve_steps: int = Field(default=4, ge=1)
    """Improvement steps on one rollout, with a bar that rises from one to the next."""
    num_epochs: int = Field(default=1, ge=1)
    """Passes over what was kept, in each improvement step."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass; each takes its share of a fresh permutation of what was kept."""
    average: Literal["token", "sequence"] = "token"
    """What weighs the same: each token of the answers, or each answer (mean −log p of its tokens)."""
    watch_kl: bool = False
    """Keep the start in memory to report the KL to it; nothing else reads it."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.start_quantile > self.end_quantile:
            raise ValueError(f"start_quantile {self.start_quantile} is above end_quantile {self.end_quantile}.")
        unread = {"start_quantile", "end_quantile", "n_improve_steps"} & self.model_fields_set
        if self.select == "best" and unread:
            raise ValueError(f"{min(unread)}: the best answer is kept, whatever the quantile. Set select: quantile.")
        return self

    @property
    def needs(self) -> tuple[str, ...]:
        """Nobody, unless the KL to the start is watched."""
        return ("reference",) if self.watch_kl else ()

    @property
    def group(self) -> int:
        """Answers sampled per prompt."""
        return self.num_generations

    @property
    def passes(self) -> int:
        """Passes over one rollout, those of all improvement steps."""
        return self.num_epochs * (1 if self.select == "best" else self.n_improve_steps)

    @property
    def minibatches(self) -> int:
        """Optimiser steps in one pass."""
        return self.num_mini_batches

    def memory(self) -> dict[str, float]:
        """Nothing is remembered."""
        return {}

    def prepare(self, cast: Cast, scored: Scored) -> Chosen:
        """The answers worth imitating, each with how many improvement steps keep it; no gradient."""
        heard = _graded.hear(cast, scored.rollouts, self.watch_kl, "sampled")
        earned_B = _graded.earned(scored)
        steps_B = self._steps(earned_B, scored.rollouts)
        kept_R = steps_B.nonzero()[:, 0]
        rows, last_B = scored.rollouts.select(kept_R), steps_B == steps_B.max()
        return Chosen(
            tokens_BT=rows.tokens_BT,
            real_BT=rows.real_BT,
            action_BT=rows.action_BT,
            steps_B=steps_B[kept_R],
            temperature=rows.temperature,
            memory={},
            metrics={
                **_graded.summary(heard, scored),
                **_graded.of_groups(earned_B, self.group),
                "kept/scores": float(earned_B[kept_R].mean()),
                "kept/share": len(kept_R) / len(earned_B),
                "kept/share_last": float(last_B.double().mean()),
            },
        )

    def of_pass(self, batch: Chosen, number: int) -> Chosen:
        """The answers that are still above the bar in pass `number`, from 0."""
        return batch.select((batch.steps_B > number // self.num_epochs).nonzero()[:, 0])

    def loss(self, cast: Cast, batch: Chosen) -> Loss:
        """−log p of the answers' tokens, their ends included; no prompt, no padding."""
        logp_BT, entropy_BT = cast.logp("policy", batch, batch.temperature, entropy=True)
        nll_BT, length_B = cross_entropy(logp_BT, batch.action_BT), batch.action_BT.sum(-1)
        if self.average == "token":
            term = Term(nll_BT.sum(), "tokens")
        else:
            term = Term((nll_BT.sum(-1) / length_B.clamp(min=1)).sum(), "rows")
        return Loss({"loss": term}, {"policy/entropy_avg": Mean(entropy_BT.detach().sum(), float(length_B.sum()))})

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _steps(self, earned_B: Tensor, rows: Tokens) -> Tensor:
        """In how many improvement steps each answer is imitated, per row; 0 for those that never are."""
        if self.select == "best":  # one of equals, which one does not depend on what it says
            best_G = earned_B.view(-1, self.group).argmax(-1, keepdim=True)
            return torch.zeros_like(earned_B).view(-1, self.group).scatter(-1, best_G, 1.0).long().flatten()
        bars = credit.quantile_steps(self.start_quantile, self.end_quantile, self.n_improve_steps)
        steps_B = torch.stack([credit.reaches_quantile(earned_B, self.group, bar) for bar in bars]).long().sum(0)
        return _without_copies(steps_B, rows)


def _without_copies(steps_B: Tensor, rows: Tokens) -> Tensor:
    """The same with 0 for copies: of the answers to a prompt that are alike, the one kept longest stays."""
    found, seen = steps_B.clone(), set[tuple[int, ...]]()
    for row in steps_B.argsort(descending=True, stable=True).tolist():
        said = (int(rows.action_BT[row].sum()), *rows.tokens_BT[row][rows.real_BT[row]].tolist())
        if said in seen:
            found[row] = 0
        seen.add(said)
    return found
