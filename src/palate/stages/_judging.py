"""From answers to scores: cut, decode, ask the reward, apply penalties. Text here is a view; ids stay what was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from palate import credit
from palate.batches import Rollouts, Scored
from palate.data.encode import PromptRow
from palate.models.tokenizer import Tokenizer
from palate.rewards.reward import answers_of
from palate.run import Workspace
from palate.settings import Choice, PalateError, Settings
from palate.stages import _seats


class Truncation(Settings):
    """Where an answer of fixed length ends for the reward."""

    token: int | str
    """The token that ends an answer: an id, or a text that is one token (`.`)."""
    after: int = Field(0, ge=0)
    """Only a token at this place of the answer or later counts."""
    train_on_cut: bool = False
    """Train only on what was scored; false trains on the whole sampled answer, as the 2019 work does."""


class _Asked(Protocol):
    """The settings of a stage that judging needs."""

    reward: Choice
    watch: Choice | None
    truncation: Truncation | None
    missing_eos_penalty: float | None
    missing_eos: Any
    score_clip: float | None


class Judging:
    """The rewards of one online stage, opened once."""

    def __init__(self, asked: _Asked, here: Workspace, tokenizer: Tokenizer) -> None:
        self.asked, self.tokenizer = asked, tokenizer
        self.reward = _seats.open_reward(asked.reward, here, tokenizer)
        self.watch = _seats.open_reward(asked.watch, here, tokenizer) if asked.watch else None
        self.stop = _stop_token(asked.truncation, tokenizer)

    def score(
        self, rollouts: Rollouts, prompts: Sequence[PromptRow], memory: Mapping[str, float]
    ) -> tuple[Scored, dict[str, float]]:
        """The verdict on each answer and what was heard from each reward on the way."""
        scored_rows = self._cut(rollouts)
        answers = answers_of(scored_rows, prompts, self.tokenizer)
        verdict = self.reward.score(answers)
        score_B = verdict.score_B
        if self.asked.missing_eos_penalty is not None:
            penalty, how = self.asked.missing_eos_penalty, self.asked.missing_eos
            score_B = credit.missing_eos_penalty(score_B, scored_rows.finished_B, penalty, how)
        if self.asked.score_clip is not None:
            score_B = score_B.clamp(-self.asked.score_clip, self.asked.score_clip)
        trained = scored_rows if self.asked.truncation and self.asked.truncation.train_on_cut else rollouts
        trained = replace(trained, finished_B=scored_rows.finished_B)
        token_reward_BT = verdict.token_reward_BT
        if token_reward_BT is None:
            token_reward_BT = torch.zeros_like(rollouts.logp_BT)
        parts = dict(verdict.parts)
        heard = {f"rewards/{name}/mean": float(part.nanmean()) for name, part in parts.items()}
        heard |= {f"rewards/{name}/std": _std(part) for name, part in parts.items()}
        if self.watch is not None:
            parts["gold"] = self.watch.score(answers).score_B
            heard["gold/mean"] = float(parts["gold"].nanmean())
        scored = Scored(trained, score_B, token_reward_BT, parts, memory)
        return self._with_verdict(scored), heard

    def _with_verdict(self, scored: Scored) -> Scored:
        """Rows no reward spoke of are dropped: an unknown score teaches nothing."""
        known = ~torch.isnan(scored.score_B)
        if bool(known.all()):
            return scored
        if not bool(known.any()):
            raise PalateError(
                "reward: every answer of a rollout got None. At least one reward must give a number."
            )
        return scored.select(known.nonzero()[:, 0])

    def _cut(self, rollouts: Rollouts) -> Rollouts:
        if self.asked.truncation is None:
            return rollouts
        keep_BT, found_B = _before_stop(rollouts, self.stop, self.asked.truncation.after)
        dropped_BT = rollouts.action_BT & ~keep_BT
        return replace(
            rollouts,
            action_BT=rollouts.action_BT & keep_BT,
            real_BT=rollouts.real_BT & ~dropped_BT,
            logp_BT=rollouts.logp_BT.masked_fill(dropped_BT, 0.0),
            finished_B=found_B,
        )

    def table(self, scored: Scored, prompts: Sequence[PromptRow], rows: int = 4) -> list[dict[str, Any]]:
        """A few answers with their scores, for people."""
        table: list[dict[str, Any]] = []
        rollouts = self._cut(scored.rollouts)
        for i in range(min(rows, scored.size)):
            ids = rollouts.tokens_BT[i][rollouts.action_BT[i]].tolist()
            row = {
                "prompt": prompts[int(rollouts.prompt_B[i])].text,
                "completion": self.tokenizer.decode(ids),
            }
            table.append(
                {
                    **row,
                    "score": float(scored.score_B[i]),
                    **{k: float(v[i]) for k, v in scored.parts.items()},
                }
            )
        return table


def _before_stop(rollouts: Rollouts, stop: int, after: int) -> tuple[Tensor, Tensor]:
    """Which answer tokens come no later than the first stop token at place `after` or later, and whether it came."""
    place_BT = rollouts.action_BT.cumsum(-1) - 1
    hit_BT = rollouts.action_BT & (rollouts.tokens_BT == stop) & (place_BT >= after)
    past_BT = hit_BT.cumsum(-1) - hit_BT.long()
    return past_BT == 0, hit_BT.any(-1)


def _stop_token(truncation: Truncation | None, tokenizer: Tokenizer) -> int:
    if truncation is None:
        return -1
    if isinstance(truncation.token, int):
        return truncation.token
    ids = tokenizer.encode(truncation.token)
    if len(ids) != 1:
        raise PalateError(
            f"truncation.token: {truncation.token!r} is {len(ids)} tokens here; name one token or its id."
        )
    return ids[0]


def _std(part: Tensor) -> float:
    known = part[~torch.isnan(part)]
    return float(known.std(correction=0)) if known.numel() else 0.0
