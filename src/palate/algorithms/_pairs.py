"""What the methods of preference pairs share: one forward pass of both answers, what is asked of data, what is shown.

K = 2: `[:, 0]` is the chosen answer, `[:, 1]` the rejected one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from typing import cast as taken_as

import torch
from torch import Tensor

from palate import losses
from palate.batches import Mean, Pairs, Term
from palate.cast import Cast
from palate.data.encode_pairs import PairRow
from palate.settings import PalateError


class Answers(NamedTuple):
    """Log-probabilities B of whole answers, in the order in which the formulas take them."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor

    @property
    def swapped(self) -> Answers:
        """The same pairs with the labels the other way round."""
        return Answers(self.rejected, self.chosen, self.ref_rejected, self.ref_chosen)

    @property
    def gain_BK(self) -> Tensor:
        """log π − log π_ref of both answers."""
        return torch.stack([self.chosen - self.ref_chosen, self.rejected - self.ref_rejected], -1)


@dataclass(frozen=True)
class Judged(Pairs):
    """Pairs with what only the whole batch can tell: a shift of rewards, and whom each row is compared with.

    `partner_B` holds numbers of other rows by name, without gradient.
    """

    shift: float = 0.0
    partner_B: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


def survey(rows: Sequence[Any], least: int = 1) -> Sequence[Any]:
    """The rows as they are. PalateError for pairs that teach nothing, and for fewer than `least`."""
    pairs = taken_as(Sequence[PairRow], rows)
    same = [i for i, pair in enumerate(pairs, 1) if pair.chosen.tokens == pair.rejected.tokens]
    if same:
        raise PalateError(
            f"data: chosen and rejected are the same in {len(same):,} of {len(pairs):,} pairs, first in pair "
            f"{same[0]:,}: nothing can be learnt from them. Remove them, or cut long answers later."
        )
    silent = [i for i, pair in enumerate(pairs, 1) if not all(any(row.trained) for row in pair.rows)]
    if silent:
        raise PalateError(
            f"data: an answer is empty in {len(silent):,} of {len(pairs):,} pairs, first in pair {silent[0]:,}. "
            "Remove them, or end answers with the end token (encoding.eos)."
        )
    if len(pairs) < least:
        raise PalateError(f"data: {len(pairs)} pair, and this loss compares pairs with one another. Bring {least}.")
    return rows


def refuse_soft_labels(rows: Sequence[Any], method: str) -> None:
    """PalateError where a pair says how sure its label is and `method` would not read it."""
    soft = [i for i, pair in enumerate(taken_as(Sequence[PairRow], rows), 1) if pair.probability != 1]
    if soft:
        raise PalateError(
            f"data: {len(soft):,} of {len(rows):,} pairs say how sure their label is, first pair {soft[0]:,}, and "
            f"{method} cannot read it. Take another loss, or leave the probabilities out."
        )


def logp(cast: Cast, role: str, batch: Pairs) -> Tensor:
    """log π of every answer token B×2×T, by one forward pass of both answers; 0 elsewhere."""
    return cast.logp(role, batch.answers()).unflatten(0, (batch.size, 2))


def logp_of_all(cast: Cast, role: str, batch: Pairs) -> Tensor:
    """The same of a whole batch without gradient, a few thousand tokens at a time and each rank its share."""
    found = cast.chunked(batch.answers(), lambda part: cast.logp(role, part))
    return found.unflatten(0, (batch.size, 2))


def with_reference(cast: Cast, raw: Pairs) -> Pairs:
    """The pairs with the reference's log-probabilities: those on disk, or else asked of the reference now."""
    if raw.ref_logp_BKT is not None:
        return raw
    return replace(raw, ref_logp_BKT=logp_of_all(cast, "reference", raw))


def answers(logp_BKT: Tensor, batch: Pairs, average: bool, ld_alpha: float = 1.0) -> Answers:
    """Whole answers' log-probabilities, summed or per token; zeros for the reference where there is none.

    `ld_alpha` below 1 weighs what an answer is longer by than the other one (LD-DPO), under policy and reference.
    """
    ref_BKT = torch.zeros_like(logp_BKT) if batch.ref_logp_BKT is None else batch.ref_logp_BKT
    length_BK = batch.action_BKT.sum(-1)
    shared_R = length_BK.amin(-1, keepdim=True).expand_as(length_BK).flatten()
    mask_RT = batch.action_BKT.flatten(0, 1)

    def whole(x_BKT: Tensor) -> Tensor:
        x_RT = x_BKT.flatten(0, 1)
        if ld_alpha < 1:
            return losses.ld_logp(x_RT, mask_RT, shared_R, ld_alpha).unflatten(0, (-1, 2))
        return losses.answer_logp(x_RT, mask_RT, average).unflatten(0, (-1, 2))

    own_BK, ref_BK = whole(logp_BKT), whole(ref_BKT)
    return Answers(own_BK[:, 0], own_BK[:, 1], ref_BK[:, 0], ref_BK[:, 1])


def nll(logp_BKT: Tensor, batch: Pairs, weight: float = 1.0) -> Term:
    """−log π of the chosen answers' tokens, end token included, averaged over those tokens."""
    nll_BT = losses.cross_entropy(logp_BKT[:, 0], batch.action_BKT[:, 0])
    return Term(nll_BT.sum(), "chosen_tokens", weight)


def expected(straight_B: Tensor, swapped_B: Tensor, probability_B: Tensor) -> Tensor:
    """p · loss + (1 − p) · loss with the label the other way round: the loss to be expected of a soft label."""
    return probability_B * straight_B + (1 - probability_B) * swapped_B


def sureness(probability_B: Tensor, label_smoothing: float) -> Tensor:
    """How likely the label is right when the stated probability is itself wrong in a share ε of pairs."""
    return label_smoothing + (1 - 2 * label_smoothing) * probability_B


def of_same_rank(own_B: Tensor, other_B: Tensor) -> Tensor:
    """For each of `own_B` the number of `other_B` that has the same rank in its own order; no gradient.

    Sorting is constant between ties, so the gradient of a loss between two sorted lists is that of the loss between
    each number and this constant.
    """
    rank_B = own_B.detach().argsort(stable=True).argsort()
    return other_B.detach().sort(stable=True).values[rank_B]


def seen(logp_BKT: Tensor, batch: Pairs, reward_BK: Tensor) -> dict[str, Mean]:
    """What a report always shows: rewards of both answers, how often they are in order, and log π itself.

    With a reference also by how much log π(chosen) has moved: a pair's order says nothing of it.
    """
    logp_BK = losses.answer_logp(logp_BKT.detach(), batch.action_BKT)
    up_B, down_B = reward_BK.detach().unbind(-1)
    rows = float(batch.size)
    found = {
        "rewards/chosen": Mean(up_B.sum(), rows),
        "rewards/rejected": Mean(down_B.sum(), rows),
        "rewards/accuracies": Mean((up_B > down_B).sum().float(), rows),
        "rewards/margins": Mean((up_B - down_B).sum(), rows),
        "logps/chosen": Mean(logp_BK[:, 0].sum(), rows),
        "logps/rejected": Mean(logp_BK[:, 1].sum(), rows),
    }
    if batch.ref_logp_BKT is not None:
        change_BK = logp_BK - losses.answer_logp(batch.ref_logp_BKT, batch.action_BKT)
        found["logps/chosen_change"] = Mean(change_BK[:, 0].sum(), rows)
    return found


def in_our_words(given: Any, names: Mapping[str, str]) -> Any:
    """Settings with the names that users bring from elsewhere replaced by ours; ValueError where both are there."""
    if not isinstance(given, Mapping):
        return given
    found: dict[str, Any] = {}
    for name, value in taken_as(Mapping[str, Any], given).items():
        ours = names.get(name, name)
        if ours in found:
            raise ValueError(f"{name!r} and {ours!r} are the same setting. Give one of them.")
        found[ours] = value
    return found


def listed(value: str | Iterable[str]) -> tuple[str, ...]:
    """One name or several, as several."""
    return (value,) if isinstance(value, str) else tuple(value)
