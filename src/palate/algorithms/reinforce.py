"""REINFORCE without a value function: REINFORCE++, its form with a group baseline, and ReMax."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from palate import credit, losses
from palate.algorithms import _graded
from palate.batches import Graded, Loss, Scored, Term
from palate.cast import Cast
from palate.losses import keep
from palate.settings import Choice, PalateError


class Algorithm(Choice):
    """REINFORCE on what each token still earns, the KL of every token in its reward.

    `baseline: none` is REINFORCE++ (Hu 2025, 2501.03262): rewards to go, normalised over the whole batch, PPO's clip.
    `group` is its baseline form: the mean of the prompt's answers is taken off each score first. `greedy` is ReMax (Li
    et al. 2023, 2310.10505): the score of the prompt's likeliest answer is taken off; published with
    `whiten_advantages: false`.
    """

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ("reference",)
    learns: ClassVar[type[Graded]] = Graded

    kind: str = "reinforce"
    """REINFORCE without a value function."""
    baseline: Literal["none", "group", "greedy"] = "none"
    """What a score is measured against: nothing, the mean of the prompt's answers, or its greedy answer's score."""
    num_generations: int = Field(default=1, ge=1)
    """Answers sampled per prompt; a group baseline takes 2 or more."""
    num_iterations: int = Field(default=1, ge=1)
    """Passes over one rollout."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass; each takes its share of a fresh permutation."""
    kl_coef: float = Field(default=0.05, ge=0)
    """β: what a nat of KL to the reference costs, in units of reward."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per token."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the rollout's tokens."""
    cliprange: float = Field(default=0.2, gt=0)
    """ε of the policy ratio; matters from the second step on a rollout on."""
    old_logprobs: Literal["sampled", "recomputed"] = "recomputed"
    """Old log-probabilities: the sampler's own, or a fresh forward pass (exact ratio 1 in the first minibatch)."""
    importance_correction: _graded.Correction = "none"
    """Weigh samples by policy/sampler, per token or answer, truncated at the cap or masked beyond it."""
    importance_cap: float = Field(default=3.0, ge=1)
    """The largest weight a sample may have."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _graded.require_old_of_its_own(self.old_logprobs, self.importance_correction)
        if self.baseline == "group":
            _graded.require_siblings(self.num_generations)
        return self

    @property
    def greedy_baseline(self) -> bool:
        """Whether each prompt's likeliest answer is scored too."""
        return self.baseline == "greedy"

    @property
    def group(self) -> int:
        """Answers sampled per prompt."""
        return self.num_generations

    @property
    def passes(self) -> int:
        """Passes over one rollout."""
        return self.num_iterations

    @property
    def minibatches(self) -> int:
        """Optimiser steps in one pass."""
        return self.num_mini_batches

    def memory(self) -> dict[str, float]:
        """Nothing is remembered."""
        return {}

    def prepare(self, cast: Cast, scored: Scored) -> Graded:
        """What each token still earns, against the baseline; no gradient."""
        rows = scored.rollouts
        heard = _graded.hear(cast, rows, True, self.old_logprobs)
        earned_B, kl_B, said = _graded.earned(scored), heard.kl_BT.sum(-1), rows.action_BT
        paid_BT = credit.shape_reward(scored.score_B, heard.logp_BT, heard.ref_BT, said, self.kl_coef)
        reward_BT = keep(scored.token_reward_BT, said) + paid_BT + self._against(scored, earned_B)
        raw_BT = credit.to_go(reward_BT, said, self.gamma)
        return _graded.graded(
            heard,
            scored,
            credit.whiten(raw_BT, said) if self.whiten_advantages else raw_BT,
            _graded.weights(heard, self.importance_correction, self.importance_cap),
            {},
            {
                **_graded.priced(earned_B, kl_B, self.kl_coef),
                **(_graded.of_groups(earned_B, self.group) if self.group > 1 else {}),
                **_graded.of_advantages(raw_BT, said),
            },
            reward=reward_BT,
        )

    def loss(self, cast: Cast, batch: Graded) -> Loss:
        """The clipped surrogate, over answer tokens."""
        logp_BT, entropy_BT = cast.logp("policy", batch, batch.temperature, entropy=True)
        said = batch.action_BT
        logp_N, old_N, advantage_N = logp_BT[said], batch.logp_BT[said], batch.advantage_BT[said]
        policy_N = batch.weight_BT[said] * losses.clipped_surrogate(logp_N, old_N, advantage_N, self.cliprange)
        clipped = _graded.clipped(logp_N - old_N, advantage_N, self.cliprange, self.cliprange)
        metrics = {**_graded.seen(logp_N - old_N, entropy_BT[said]), **clipped}
        return Loss({"loss/policy_avg": Term(policy_N.sum(), "tokens")}, metrics)

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _against(self, scored: Scored, earned_B: Tensor) -> Tensor:
        """The baseline taken off, B×T: on the last token, where the score is."""
        nothing_BT, baseline_B = torch.zeros_like(scored.rollouts.logp_BT), scored.baseline_B
        if self.baseline == "none":
            return nothing_BT
        if self.baseline == "group":
            baseline_B = earned_B - credit.within_group(earned_B, self.group, scale=False)
        if baseline_B is None:
            raise PalateError("baseline greedy: nobody scored the prompts' likeliest answers. Take another baseline.")
        return credit.shape_reward(-baseline_B, nothing_BT, nothing_BT, scored.rollouts.action_BT, 0.0)
