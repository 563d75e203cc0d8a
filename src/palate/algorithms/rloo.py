"""REINFORCE with a leave-one-out baseline: an answer is worth what it beats its siblings by."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from palate import credit, losses
from palate.algorithms import _graded
from palate.batches import Graded, Loss, Scored, Term
from palate.cast import Cast
from palate.losses import keep
from palate.settings import Choice


class Algorithm(Choice):
    """RLOO: score − β·KL of an answer minus the mean of its siblings' (Ahmadian et al. 2024, 2402.14740, eq. 8).

    With one step on a rollout its expected gradient is exactly that of E[score] − β·KL(π‖π_ref).
    """

    trains: ClassVar[tuple[str, ...]] = ("policy",)
    moves: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ("reference",)
    learns: ClassVar[type[Graded]] = Graded

    kind: str = "rloo"
    """REINFORCE with a leave-one-out baseline."""
    num_generations: _graded.Group = 4
    """Answers sampled per prompt, at least 2; the others are each one's baseline."""
    num_iterations: int = Field(default=1, ge=1)
    """Passes over one rollout."""
    num_mini_batches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass; each takes its share of a fresh permutation."""
    kl_coef: float = Field(default=0.05, ge=0)
    """β: what a nat of KL to the reference costs, in units of reward; the start value when it adapts."""
    target_kl: float | None = Field(default=None, gt=0)
    """Nats per answer that an adaptive β steers to; none keeps β fixed."""
    horizon: float = Field(default=10000.0, gt=0)
    """Episodes over which the adaptive β may change by about a fifth."""
    action: Literal["sequence", "token"] = "sequence"
    """What a ratio is of and what is clipped: the whole answer as one action (as published), or each token."""
    cliprange: float = Field(default=0.2, gt=0)
    """ε of that ratio; matters from the second step on a rollout on."""
    normalize_advantages: bool = False
    """Shift and scale advantages to mean 0 and variance 1 over the rollout's answers."""
    old_logprobs: Literal["sampled", "recomputed"] = "recomputed"
    """Old log-probabilities: the sampler's own, or a fresh forward pass (exact ratio 1 in the first minibatch)."""
    importance_correction: _graded.Correction = "none"
    """Weigh samples by policy/sampler, per token or answer, truncated at the cap or masked beyond it."""
    importance_cap: float = Field(default=3.0, ge=1)
    """The largest weight a sample may have."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _graded.require_old_of_its_own(self.old_logprobs, self.importance_correction)
        if self.action == "sequence" and self.importance_correction.startswith("token"):
            raise ValueError(
                f"importance_correction {self.importance_correction} weighs tokens, but the action is the whole "
                "answer. Take sequence_truncate or sequence_mask, or action: token."
            )
        return self

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
        """What is remembered between iterations: β."""
        return {"kl_coef": self.kl_coef}

    def prepare(self, cast: Cast, scored: Scored) -> Graded:
        """Advantages of a whole rollout, the KL inside the reward; no gradient."""
        heard = _graded.hear(cast, scored.rollouts, True, self.old_logprobs)
        kl_coef, kl_B, earned_B = scored.memory["kl_coef"], heard.kl_BT.sum(-1), _graded.earned(scored)
        reward_B = earned_B - kl_coef * kl_B
        raw_B = credit.leave_one_out(reward_B, self.group)
        advantage_BT = heard.over_tokens(credit.whiten(raw_B) if self.normalize_advantages else raw_B)
        return _graded.graded(
            heard,
            scored,
            advantage_BT,
            _graded.weights(heard, self.importance_correction, self.importance_cap),
            self._remember(kl_coef, float(kl_B.mean()), kl_B.numel()),
            {
                **_graded.priced(earned_B, kl_B, kl_coef),
                **_graded.of_groups(earned_B, self.group),
                **_graded.of_advantages(heard.over_tokens(raw_B), scored.rollouts.action_BT),
            },
        )

    def loss(self, cast: Cast, batch: Graded) -> Loss:
        """The clipped surrogate of whole answers, or summed over their tokens; the mean over answers either way."""
        logp_BT, entropy_BT = cast.logp("policy", batch, batch.temperature, entropy=True)
        said = batch.action_BT
        change_BT = keep(logp_BT, said) - keep(batch.logp_BT, said)
        if self.action == "sequence":
            change_N = change_BT.sum(-1)
            advantage_N, weight_N = _of_answer(batch.advantage_BT, said), _of_answer(batch.weight_BT, said)
        else:
            change_N, advantage_N, weight_N = change_BT[said], batch.advantage_BT[said], batch.weight_BT[said]
        old_N = change_N.new_zeros(change_N.shape)
        policy_N = weight_N * losses.clipped_surrogate(change_N, old_N, advantage_N, self.cliprange)
        clipped = _graded.clipped(change_N, advantage_N, self.cliprange, self.cliprange)
        metrics = {**_graded.seen(change_BT[said], entropy_BT[said]), **clipped}
        return Loss({"loss/policy_avg": Term(policy_N.sum(), "rows")}, metrics)

    def after(self, cast: Cast, step: int) -> None:
        """Nothing moves by itself."""

    def _remember(self, kl_coef: float, kl: float, episodes: int) -> dict[str, float]:
        if self.target_kl is None:
            return {"kl_coef": kl_coef}
        return {"kl_coef": credit.AdaptiveKL(kl_coef, self.target_kl, self.horizon).update(kl, episodes)}


def _of_answer(x_BT: Tensor, said_BT: Tensor) -> Tensor:
    """The number that all tokens of an answer share, per row; 0 for an empty answer."""
    last_B1 = credit.last_true_index(said_BT).clamp(min=0)[:, None]
    return keep(x_BT, said_BT).gather(-1, last_B1)[:, 0]
