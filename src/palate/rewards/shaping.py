"""Between a verdict and a score: cut answers before they are judged, punish those without an end, clip."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from palate import credit
from palate.batches import Rollouts
from palate.models.tokenizer import Tokenizer
from palate.rewards.reward import Answers, Verdict
from palate.settings import PalateError, Settings


class Shaping(Settings):
    """What happens to a reward's scores before training, in this order: abstention, penalty, clipping."""

    abstained: Literal["mean", "error"] = "mean"
    """A row on which every reward abstained gets the mean score of the others, or stops the run."""
    missing_eos_penalty: float | None = None
    """What an answer that did not end by itself gets (replace) or loses (subtract); none does nothing."""
    missing_eos: Literal["replace", "subtract"] = "replace"
    """`replace`: the penalty is the score (published: −1). `subtract`: its size is taken off (as TRL does)."""
    score_clip: float | None = Field(default=None, gt=0)
    """Scores are clipped to ± this, after the penalty; none leaves them."""


def shape(verdict: Verdict, answers: Answers, shaping: Shaping) -> Verdict:
    """The verdict with a finite score in every row. `parts` keep what the rewards said.

    Where a missing-EOS penalty replaces the score, per-token rewards of that row are dropped too: the answer is
    worth the penalty, whatever its tokens earned.
    """
    score_B, tokens_BT = _filled(verdict.score_B, answers, shaping), verdict.token_reward_BT
    finished_B = answers.rollouts.finished_B
    if shaping.missing_eos_penalty is not None:
        score_B = credit.missing_eos_penalty(score_B, finished_B, shaping.missing_eos_penalty, shaping.missing_eos)
        if tokens_BT is not None and shaping.missing_eos == "replace":
            tokens_BT = tokens_BT.masked_fill(~finished_B[:, None], 0.0)
    if shaping.score_clip is not None:
        score_B = score_B.clamp(-shaping.score_clip, shaping.score_clip)
    return replace(verdict, score_B=score_B, token_reward_BT=tokens_BT)


def _filled(score_B: Tensor, answers: Answers, shaping: Shaping) -> Tensor:
    """Rows without any score get the mean of the rest, so that they push in no direction."""
    silent_B = score_B.isnan()
    if not bool(silent_B.any()):
        return score_B
    if shaping.abstained == "error" or bool(silent_B.all()):
        count, row = int(silent_B.sum()), int(silent_B.nonzero()[0])
        raise PalateError(
            f"reward: every reward abstained on {count} of {answers.size} answers, first on "
            f"{answers.name(row)}. Return a number for them, or add a reward that judges every answer."
        )
    return score_B.where(~silent_B, score_B[~silent_B].mean())


def stop_token(spelled: int | str, tokenizer: Tokenizer, where: str = "truncate_token") -> int:
    """The id of a token given as an id, as `eos`, or as a text that is exactly one token."""
    if spelled == "eos":
        return tokenizer.end
    if isinstance(spelled, int):
        if not 0 <= spelled < tokenizer.size:
            raise PalateError(f"{where}: there is no token {spelled}; ids run from 0 to {tokenizer.size - 1}.")
        return spelled
    ids = tokenizer.encode(spelled)
    if len(ids) != 1:
        raise PalateError(
            f"{where}: {spelled!r} is {len(ids)} tokens ({ids}) to this tokenizer. Name a text that is one "
            f"token, or the id of a token."
        )
    return ids[0]


def cut_after(rollouts: Rollouts, stop: int, after: int, pad: int) -> Rollouts:
    """Rollouts whose answers end at their first `stop` token at place `after` (from 0) or later, the token kept.

    `finished_B` says whether there was one. What follows is padding: off both masks, log-probability 0. The reward
    model of the 2019 work reads this view while the whole answer is trained; the TL;DR work trains on the view
    (ppo_details 30, 31, 49).
    """
    place_BT = rollouts.action_BT.cumsum(-1) - 1
    stop_BT = rollouts.action_BT & (rollouts.tokens_BT == stop) & (place_BT >= after)
    past_BT = rollouts.action_BT & ((stop_BT.cumsum(-1) - stop_BT.long()) > 0)
    return replace(
        rollouts,
        tokens_BT=rollouts.tokens_BT.masked_fill(past_BT, pad),
        real_BT=rollouts.real_BT & ~past_BT,
        action_BT=rollouts.action_BT & ~past_BT,
        logp_BT=rollouts.logp_BT.masked_fill(past_BT, 0.0),
        finished_B=torch.as_tensor(stop_BT.any(-1)),
    )
