"""From answers to scores: cut, decode, ask the reward, shape. Text is a view; ids stay what was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from palate.batches import Rollouts, Scored
from palate.data.encode import PromptRow
from palate.models.tokenizer import Tokenizer
from palate.parallel import World
from palate.records import before_stop
from palate.rewards.reward import Scorer, answers_of
from palate.rewards.shaping import Shaping, cut_after, shape, stop_token
from palate.settings import Settings


class Truncation(Settings):
    """Where an answer ends for the reward, when sampling itself does not stop there."""

    token: int | str
    """The token that ends an answer: an id, `eos`, or a text that is one token (`.`)."""
    after: int = Field(default=0, ge=0)
    """Only a token at this place of the answer (from 0) or later counts."""
    train_on_cut: bool = False
    """Train only on what was scored; false trains on the whole sampled answer, as the 2019 work does."""


class Judging:
    """The rewards of one online stage and what is done to their scores."""

    def __init__(
        self,
        reward: Scorer,
        watch: Scorer | None,
        shaping: Shaping,
        truncation: Truncation | None,
        tokenizer: Tokenizer,
        world: World | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """`stop` are the texts that ended answers: what a reward reads ends before them."""
        self.stopped = stop
        self.world = world or World()
        self.reward, self.watch, self.shaping = reward, watch, shaping
        self.truncation, self.tokenizer = truncation, tokenizer
        self.stop = stop_token(truncation.token, tokenizer, "truncation.token") if truncation else -1

    def score(
        self, rollouts: Rollouts, prompts: Sequence[PromptRow], memory: Mapping[str, float], watched: bool = True
    ) -> tuple[Scored, dict[str, float]]:
        """The verdict on each answer, and metrics of what each reward said. `prompts` are those asked.

        Unless `watched`, the reward that is only looked at is not asked.
        """
        judged = self._cut(rollouts)
        answers = answers_of(
            judged, prompts, self.tokenizer, [p.said or p.text for p in prompts], self.world, self.stopped
        )
        verdict = shape(self.reward.score(answers), answers, self.shaping)
        parts = dict(verdict.parts)
        if self.watch is not None and watched:
            parts["gold"] = self.watch.score(answers).score_B
        token_reward_BT = verdict.token_reward_BT
        if token_reward_BT is None:
            token_reward_BT = torch.zeros_like(rollouts.logp_BT)
        on_cut = self.truncation is not None and self.truncation.train_on_cut
        trained = judged if on_cut else replace(rollouts, finished_B=judged.finished_B)
        return Scored(trained, verdict.score_B, token_reward_BT, parts, memory), heard(parts)

    def _cut(self, rollouts: Rollouts) -> Rollouts:
        if self.truncation is None:
            return rollouts
        return cut_after(rollouts, self.stop, self.truncation.after, self.tokenizer.pad)

    def table(self, scored: Scored, prompts: Sequence[PromptRow], rows: int = 4) -> list[dict[str, Any]]:
        """A few answers with their scores, for people."""
        rollouts = self._cut(scored.rollouts)
        found: list[dict[str, Any]] = []
        for i in range(min(rows, scored.score_B.shape[0])):
            ids = rollouts.tokens_BT[i][rollouts.action_BT[i]].tolist()
            said = {
                "prompt": prompts[int(rollouts.prompt_B[i])].text,
                "completion": before_stop(self.tokenizer.decode(ids), self.stopped),
            }
            parts = {name: float(part[i]) for name, part in scored.parts.items()}
            found.append({**said, "score": float(scored.score_B[i]), **parts})
        return found


def heard(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean and spread of each reward over the answers it judged, before weights, penalties and clipping."""
    found: dict[str, float] = {}
    for name, part in parts.items():
        known = part[~part.isnan()]
        if known.numel():
            found["gold/mean" if name == "gold" else f"rewards/{name}/mean"] = float(known.mean())
            found |= {} if name == "gold" else {f"rewards/{name}/std": float(known.std(correction=0))}
    return found
