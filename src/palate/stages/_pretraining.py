"""Plain text learnt beside a policy's own answers, so that it keeps what it knew: the pretraining mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from palate import losses
from palate.batches import Loss, Term, Tokens
from palate.cast import Cast
from palate.cutting import Microbatch
from palate.data.encode import Encoding
from palate.data.source import Data
from palate.models.load import Loaded
from palate.randomness import permutation
from palate.settings import PalateError, Settings
from palate.stages import _rows
from palate.step import Job
from palate.workspace import Workspace


class Pretraining(Settings):
    """The pretraining mix: what else the policy learns in each optimiser step, and how much that counts."""

    data: Data
    """Texts or demonstrations: a file, folder, hub id or `world:NAME/shape`, or a mapping with more settings."""
    coef: float = Field(ge=0)
    """γ of `add` (27.8 in InstructGPT), or the share c of `convex` (0.9 in ColossalChat)."""
    mode: Literal["add", "convex"] = "add"
    """add: objective + γ · cross-entropy (InstructGPT). convex: (1 − c) · objective + c · cross-entropy
    (ColossalChat). The value loss is the same in both."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of one optimiser step; InstructGPT drew 8 for each answer."""
    encoding: Encoding = Encoding()
    """How these records become tokens."""

    @model_validator(mode="after")
    def _is_a_share(self) -> Pretraining:
        if self.mode == "convex" and self.coef > 1:
            raise ValueError(f"coef {self.coef} is no share. convex takes 0 to 1; InstructGPT's γ is `mode: add`.")
        return self


class Mix:
    """The rows of the pretraining data, a batch for each optimiser step of the stage."""

    def __init__(self, settings: Pretraining, rows: Sequence[Any], pad: int, counter: tuple[int | str, ...]) -> None:
        """`counter` names the draws: the same numbers give the same order."""
        self.settings, self.rows, self.pad, self.counter = settings, rows, pad, counter
        self._epoch, self._order = -1, [0]

    @classmethod
    def of(cls, settings: Pretraining | None, loaded: Loaded, stage: str, here: Workspace) -> Mix | None:
        """The mix of a stage, read and encoded; none where it has none."""
        if settings is None:
            return None
        records, _ = _rows.read(settings.data, here)
        speaker, context = loaded.tokenizer, loaded.trunk.context
        try:
            rows = _rows.encode(records, "demonstrations", speaker, settings.encoding, context, here)
        except PalateError as fault:
            raise PalateError(f"pretraining.data: {fault}") from None
        return cls(settings, rows, speaker.pad, (here.seed, stage, "pretraining"))

    @property
    def rule(self) -> str:
        """What is done, in a sentence."""
        given, rows = self.settings, len(self.rows)
        objective = "the objective" if given.mode == "add" else f"{1 - given.coef:g} × the objective"
        return (
            f"beside each step's answers {given.batch_size:,} of {rows:,} texts are learnt, each once in "
            f"{rows / given.batch_size:,.1f} steps: {objective} + {given.coef:g} × their −log p per token"
        )

    def drawn(self, step: int) -> list[int]:
        """The rows of optimiser step `step` (from 0) of the stage: a stream in which each epoch holds each row once.

        A function of the step alone, so a checkpoint has nothing to remember.
        """
        first = step * self.settings.batch_size
        return [self._at(place) for place in range(first, first + self.settings.batch_size)]

    def _at(self, place: int) -> int:
        epoch, within = divmod(place, len(self.rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(len(self.rows), *self.counter, epoch)
        return self._order[within]

    def job(self, cast: Cast, step: int, microbatch: Microbatch) -> Job:
        """What is learnt beside optimiser step `step`: −log p of each trained token, averaged over these alone."""
        batch = _rows.batch([self.rows[i] for i in self.drawn(step)], self.pad).to(cast.device)
        return Job(batch, lambda part: self.loss(cast, part), microbatch)

    def loss(self, cast: Cast, part: Tokens) -> Loss:
        """The cross-entropy of trained tokens, weighted by γ or the share."""
        nll_BT = losses.cross_entropy(cast.logp("policy", part), part.action_BT)
        return Loss({"loss/pretraining_avg": Term(nll_BT.sum(), "tokens", self.settings.coef)}, {})

    def beside(self, loss: Loss) -> Loss:
        """The objective as it stands in the mix: in the convex one all but the value's terms count 1 − c."""
        if self.settings.mode == "add":
            return loss
        share = 1 - self.settings.coef
        terms = {
            name: term if term.per == "values" else replace(term, weight=share * term.weight)
            for name, term in loss.terms.items()
        }
        return replace(loss, terms=terms)
