"""Batch arithmetic: what the numbers of a stage come to, and the same in sentences."""

from __future__ import annotations

from dataclasses import dataclass

from palate.check.found import Batches
from palate.cutting import Microbatch


@dataclass(frozen=True)
class Offline:
    """The numbers of a stage that learns from data at rest.

    `microbatch` is in rows, of typical length where `tokens` is the limit.
    """

    rows: int
    held_out: int
    batch: int
    microbatch: int
    epochs: int
    most_steps: int | None
    noun: str = "row"
    tokens: int | None = None

    @property
    def per_epoch(self) -> int:
        """Optimiser steps of one pass over the data."""
        return self.rows // self.batch

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.most_steps or self.per_epoch * self.epochs

    @property
    def left_over(self) -> int:
        """Rows that fill no batch in an epoch; other ones in each."""
        return self.rows - self.per_epoch * self.batch

    def batches(self) -> Batches:
        """All of it."""
        parts = -(-self.batch // self.microbatch)
        numbers = {
            "rows": self.rows,
            "held_out_rows": self.held_out,
            "batch_size": self.batch,
            "microbatch_size": min(self.microbatch, self.batch),
            "microbatches": parts,
            "steps_per_epoch": self.per_epoch,
            "left_over_rows": self.left_over,
            "epochs": self.epochs,
            "optimiser_steps": self.steps,
        }
        return Batches(numbers, tuple(self._words(parts)), self.steps)

    def _words(self, parts: int) -> list[str]:
        cut = _cut(parts, self.microbatch, self.tokens)
        left = f"; {self.left_over:,} of {self.rows:,} fill no batch and wait for another epoch"
        words = [
            f"{counted(self.batch, self.noun)} a step = {cut}",
            f"{counted(self.rows, self.noun)} / {self.batch:,} = {counted(self.per_epoch, 'optimiser step')} an epoch"
            + (left if self.left_over else ""),
        ]
        if self.most_steps:
            share = self.most_steps / max(self.per_epoch, 1)
            words.append(f"max_steps ends it after {counted(self.most_steps, 'optimiser step')} = {share:.2f} epochs")
        else:
            words.append(
                f"{counted(self.epochs, 'epoch')} × {self.per_epoch:,} = {counted(self.steps, 'optimiser step')}"
            )
        if self.held_out:
            words.append(f"held out for measuring: {counted(self.held_out, self.noun)}")
        return words


@dataclass(frozen=True)
class Online:
    """The numbers of a stage that learns from its own answers; `microbatch` and `tokens` as in `Offline`."""

    prompts: int
    rollout: int
    group: int
    passes: int
    minibatches: int
    microbatch: int
    episodes: int
    tokens: int | None = None

    @property
    def asked(self) -> int:
        """Prompts of one rollout."""
        return self.rollout // self.group

    @property
    def rollouts(self) -> int:
        """Rollouts of the whole stage."""
        return self.episodes // self.rollout

    @property
    def minibatch(self) -> int:
        """Answers of one optimiser step; the largest where they do not divide evenly."""
        return -(-self.rollout // self.minibatches)

    @property
    def parts(self) -> int:
        """Micro-batches of one optimiser step."""
        return -(-self.minibatch // self.microbatch)

    def batches(self) -> Batches:
        """All of it."""
        a_rollout = self.passes * self.minibatches
        numbers = {
            "prompts": self.prompts,
            "answers_per_rollout": self.rollout,
            "prompts_per_rollout": self.asked,
            "answers_per_prompt": self.group,
            "passes": self.passes,
            "minibatches": self.minibatches,
            "answers_per_step": self.minibatch,
            "microbatch_size": min(self.microbatch, self.minibatch),
            "microbatches": self.parts,
            "steps_per_rollout": a_rollout,
            "rollouts": self.rollouts,
            "answers": self.rollouts * self.rollout,
            "left_over_answers": self.episodes - self.rollouts * self.rollout,
            "optimiser_steps": self.rollouts * a_rollout,
        }
        return Batches(numbers, tuple(self._words(a_rollout)), self.rollouts)

    def _words(self, a_rollout: int) -> list[str]:
        answers = self.rollouts * self.rollout
        cut = _cut(self.parts, self.microbatch, self.tokens)
        words = [
            f"{self.rollout:,} answers a rollout = {counted(self.asked, 'prompt')} × {self.group:,}",
            f"{counted(self.passes, 'epoch')} × {counted(self.minibatches, 'minibatch', 'minibatches')} = "
            f"{counted(a_rollout, 'optimiser step')} a rollout",
            f"{self.minibatch:,} answers a step = {cut}",
            f"{counted(self.rollouts, 'rollout')} = {answers:,} answers, "
            f"{counted(self.rollouts * a_rollout, 'optimiser step')}",
            self._use_of_prompts(),
        ]
        if self.episodes > answers:
            words.append(f"{self.episodes - answers:,} of {self.episodes:,} episodes fill no rollout and are left out")
        return words

    def _use_of_prompts(self) -> str:
        needed = self.rollouts * self.asked
        if self.prompts < self.asked:
            return (
                f"{self.prompts:,} prompts are fewer than a rollout asks: "
                f"each is asked {self.asked / self.prompts:.1f} times a rollout, with other draws"
            )
        share = needed / self.prompts
        if share <= 1:
            return f"{needed:,} of {self.prompts:,} prompts are asked, each once"
        return f"{self.prompts:,} prompts are asked {share:.1f} times each"


def typical(most: Microbatch, batch: int, mean: float) -> int:
    """Rows of a micro-batch, where rows of a batch have `mean` tokens."""
    within = batch if most.tokens is None else max(1, int(most.tokens / mean))
    return min(within, most.rows or within)


def _cut(parts: int, rows: int, tokens: int | None) -> str:
    if parts == 1:
        return "one forward pass"
    return (
        f"{parts} micro-batches of at most {rows:,}"
        if tokens is None
        else (f"about {parts} micro-batches of at most {tokens:,} tokens")
    )


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 epoch`, `2 epochs`, `1,237 optimiser steps`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
