"""Batches: what was said, as tensors. Shapes are in the names; a field exists when its type exists.

Legend: B rows (answers), T tokens, K answers of one prompt, V vocabulary, D width. Index t of every `_BT` tensor
speaks about token t: its log-probability given what came before, its mask, its advantage, its KL; `value_BT[t]` is
the value of the state *before* token t. Rows are padded on the right unless said; `real_BT` is True on tokens that
exist (prompt and answer) and `action_BT` is True on tokens the policy produced or is trained on (EOS included,
padding never). Masks are carried, never derived from token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Base of every batch: rows along the first dimension of each tensor (and of each tuple)."""

    @property
    def size(self) -> int:
        """How many rows."""
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Rows):
                return value.size
            if isinstance(value, Tensor):
                return value.shape[0]
        raise TypeError(f"{type(self).__name__} has no tensor")

    def select(self, index: Tensor) -> Self:
        """The rows named by `index` (int64), in that order."""
        return replace(self, **{f.name: _pick(getattr(self, f.name), index) for f in fields(self)})

    def split(self, rows: int) -> Iterator[Self]:
        """Consecutive parts of at most `rows` rows."""
        for part in torch.arange(self.size).split(rows):
            yield self.select(part)

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return replace(self, **{f.name: _move(getattr(self, f.name), device) for f in fields(self)})

    def trimmed(self) -> Self:
        """The same rows without the columns that no mask of theirs reaches; only `_BT` fields are cut."""
        wide = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(("_BT", "_BKT"))}
        masks = [v.flatten(0, -2).any(0) for v in wide.values() if isinstance(v, Tensor) and v.dtype == torch.bool]
        used = torch.stack(masks).any(0).nonzero() if masks else None
        if used is None or used.numel() == 0:
            return self
        width = int(used[-1]) + 1
        return replace(self, **{name: _narrow(value, width) for name, value in wide.items()})

    def counts(self) -> dict[str, float]:
        """What a loss may be averaged over, counted before the forward pass: always `rows`, mostly `tokens`."""
        return {"rows": float(self.size)}


def _pick(value: Any, index: Tensor) -> Any:
    if isinstance(value, Rows):
        return value.select(index)
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() else value
    if isinstance(value, tuple):
        items = cast(tuple[Any, ...], value)
        return tuple(items[i] for i in index.tolist())
    if isinstance(value, dict):
        return {k: _pick(v, index) for k, v in cast(dict[str, Any], value).items()}
    return value  # a number or a name that speaks of the whole batch


def _narrow(value: Any, width: int) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return {k: v[..., :width] for k, v in cast(dict[str, Tensor], value).items()}
    return value[..., :width]


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor | Rows):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in cast(dict[str, Any], value).items()}
    return value


@dataclass(frozen=True)
class Tokens(Rows):
    """Token rows: the part every batch that a model reads has in common."""

    tokens_BT: Tensor
    real_BT: Tensor
    action_BT: Tensor

    def counts(self) -> dict[str, float]:
        return {"rows": float(self.size), "tokens": float(self.action_BT.sum())}


@dataclass(frozen=True)
class Examples(Tokens):
    """Demonstrations: `action_BT` is True on the tokens that are trained."""


@dataclass(frozen=True)
class Comparisons(Rows):
    """B prompts with up to K ranked answers each; `present_BK` is False on the unused places.

    `rank_BK` is 0 for the best, ties share a rank; `margin_B` is the stated strength of a pair (0 where not given).
    `probability_B` is how likely the better one of two answers is the better one; None where no judge was unsure.
    """

    tokens_BKT: Tensor
    real_BKT: Tensor
    present_BK: Tensor
    rank_BK: Tensor
    margin_B: Tensor
    action_BKT: Tensor
    probability_B: Tensor | None = None

    def counts(self) -> dict[str, float]:
        answers = float(self.present_BK.sum())
        return {"rows": float(self.size), "answers": answers, "tokens": float(self.action_BKT.sum())}

    def answers(self) -> Tokens:
        """The present answers as plain token rows, R = present_BK.sum(), in row-major order."""
        here = self.present_BK
        return Tokens(self.tokens_BKT[here], self.real_BKT[here], self.action_BKT[here])

    def place(self, score_R: Tensor) -> Tensor:
        """Scores of `answers()` put back into the B×K grid; unused places hold 0."""
        grid = score_R.new_zeros(self.present_BK.shape)
        return grid.masked_scatter(self.present_BK, score_R)


@dataclass(frozen=True)
class Pairs(Rows):
    """B preference pairs: `[:, 0]` is the chosen answer, `[:, 1]` the rejected one, each a whole row with its prompt.

    `probability_B` is how likely the first is the better one (1 where nobody said). `corrected_BKT` is True on tokens
    that a correction changed. `ref_logp_BKT` are the reference's log-probabilities, once `prepare` or the disk gave
    them; None before.
    """

    tokens_BKT: Tensor
    real_BKT: Tensor
    action_BKT: Tensor
    probability_B: Tensor
    margin_B: Tensor
    corrected_BKT: Tensor
    ref_logp_BKT: Tensor | None = None

    def counts(self) -> dict[str, float]:
        chosen = float(self.action_BKT[:, 0].sum())
        return {"rows": float(self.size), "tokens": float(self.action_BKT.sum()), "chosen_tokens": chosen}

    def answers(self) -> Tokens:
        """All answers as plain token rows, 2B of them: chosen, rejected, chosen, …"""
        return Tokens(*(x.flatten(0, 1) for x in (self.tokens_BKT, self.real_BKT, self.action_BKT)))


@dataclass(frozen=True)
class Labelled(Tokens):
    """B answers with a thumb up (`desirable_B` True) or down.

    `ref_logp_BT` as in `Pairs`. `kl` is a number of the whole batch that `prepare` finds.
    """

    desirable_B: Tensor
    ref_logp_BT: Tensor | None = None
    kl: float = 0.0


@dataclass(frozen=True)
class Trajectories(Tokens):
    """B sequences of actions with what they earned: `reward_BT` is the reward after each action token, 0 elsewhere."""

    reward_BT: Tensor


@dataclass(frozen=True)
class Rollouts(Tokens):
    """Answers of one policy version, answers to one prompt adjacent.

    `logp_BT` is the sampler's own log-probability of each action token, of the distribution it was drawn from; 0
    elsewhere. `finished_B` is True where the answer ended by itself (EOS or stop token) and was not cut by length.
    """

    logp_BT: Tensor
    finished_B: Tensor
    prompt_B: Tensor
    """Index of each row's prompt in the iteration's prompt list."""
    version: int
    temperature: float = 1.0
    """The temperature of the distribution the tokens were drawn from and `logp_BT` speaks of."""
    limit: int | None = None
    """The longest answer in tokens there could have been; none where nobody set one."""
    value_BT: Tensor | None = None
    """Values that were spoken beside the tokens, where the sampler has the value head: of the state before each action
    token, 0 elsewhere."""

    @property
    def length_B(self) -> Tensor:
        """Answer lengths in tokens, EOS included."""
        return self.action_BT.sum(-1)


@dataclass(frozen=True)
class Scored(Rows):
    """Rollouts with a verdict. `parts` holds each reward source before weighting, for the report.

    `score_B` is the weighted score after penalty and clipping; `token_reward_BT`, all zeros for per-answer rewards,
    holds what was given per token. `memory` is what the algorithm remembers between iterations (a KL coefficient).
    `baseline_B` is the score of the likeliest answer to the row's prompt, where the algorithm asks for it. `key` is the
    counter of whatever an algorithm draws at random about this rollout.
    """

    rollouts: Rollouts
    score_B: Tensor
    token_reward_BT: Tensor
    parts: Mapping[str, Tensor]
    memory: Mapping[str, float]
    baseline_B: Tensor | None = None
    key: int = 0


@dataclass(frozen=True)
class Experience(Tokens):
    """What an online algorithm learns from: rollouts with old log-probabilities, advantages, values and returns.

    `value_mask_BT` says where the value function is trained (a superset of `action_BT` when the score sits on the
    state after the end). `memory` is what the algorithm remembers for the next iteration. `shown_BT` is for people
    alone: whatever else the algorithm knew about each token, by name. No loss reads it. `ref_logp_BT` are the
    reference's log-probabilities, where a loss reads them.
    """

    logp_BT: Tensor
    advantage_BT: Tensor
    value_BT: Tensor
    returns_BT: Tensor
    value_mask_BT: Tensor
    temperature: float
    memory: Mapping[str, float]
    metrics: Mapping[str, float]
    shown_BT: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    ref_logp_BT: Tensor | None = None

    def counts(self) -> dict[str, float]:
        return {**Tokens.counts(self), "values": float(self.value_mask_BT.sum())}


@dataclass(frozen=True)
class Graded(Tokens):
    """What an algorithm without a value function learns from: old log-probabilities and advantages.

    `ref_logp_BT` are the reference's log-probabilities (zeros where no loss reads them). `weight_BT` is what a token's
    loss counts for: a correction for samples that are not quite the current policy's, times the share that the
    averaging gives it. The rest as in `Experience`.
    """

    logp_BT: Tensor
    advantage_BT: Tensor
    ref_logp_BT: Tensor
    weight_BT: Tensor
    temperature: float
    memory: Mapping[str, float]
    metrics: Mapping[str, float]
    shown_BT: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Duels(Rows):
    """Pairs of the policy's own answers to one prompt, the preferred one first; as `Pairs`, made on the way."""

    tokens_BKT: Tensor
    real_BKT: Tensor
    action_BKT: Tensor
    probability_B: Tensor
    ref_logp_BKT: Tensor
    temperature: float
    memory: Mapping[str, float]
    metrics: Mapping[str, float]
    shown_BT: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def counts(self) -> dict[str, float]:
        return {"rows": float(self.size), "tokens": float(self.action_BKT.sum())}

    def answers(self) -> Tokens:
        """All answers as plain token rows, 2B of them: preferred, other, preferred, …"""
        return Tokens(*(x.flatten(0, 1) for x in (self.tokens_BKT, self.real_BKT, self.action_BKT)))


@dataclass(frozen=True)
class Chosen(Tokens):
    """Answers of the policy that were chosen to be imitated; the rest of the rollout is not in it.

    `steps_B` is in how many of its steps of improvement, from the first, a row is learnt from; 1 or more.
    """

    steps_B: Tensor
    temperature: float
    memory: Mapping[str, float]
    metrics: Mapping[str, float]
    shown_BT: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


Learnt = Experience | Graded | Duels | Chosen
"""What an online algorithm may learn from: rows, with the temperature they were drawn at, `memory`, `metrics`, and
`shown_BT` (of the rollout's rows, in their order; for people alone)."""


def without_shown(learnt: Learnt) -> Learnt:
    """The same without `shown_BT`, so that cutting it into minibatches costs nothing."""
    return replace(learnt, shown_BT={})


@dataclass(frozen=True)
class Mean:
    """A metric on its way to being averaged: sum and count, so any split of a batch gives the same figure."""

    total: Tensor
    count: float


@dataclass(frozen=True)
class Term:
    """One part of a loss: a *sum* and the unit it is averaged over; `step.optimise` divides, nobody else."""

    total: Tensor
    per: str
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """What an algorithm minimises: named terms (sums over rows) and metrics seen on the way."""

    terms: Mapping[str, Term]
    metrics: Mapping[str, Mean]
