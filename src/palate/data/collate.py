"""Collation: token rows to tensors, padded on the right; masks are carried, never read off the ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palate.batches import Comparisons, Examples, Labelled, Pairs, Trajectories
from palate.data.encode import RankedRow, TokenRow
from palate.data.encode_pairs import LabelRow, PairRow, RatedRow


def examples(rows: Sequence[TokenRow], pad: int, length: int | None = None) -> Examples:
    """Demonstrations as a batch of `length` columns, the longest row's when left out."""
    return Examples(*_padded(rows, pad, length))


def comparisons(rows: Sequence[RankedRow], pad: int) -> Comparisons:
    """B prompts with up to K ranked answers; unused places hold pads, rank 0 and present False."""
    most = max(len(row.rows) for row in rows)
    nothing = TokenRow([], [])
    flat = [answer for row in rows for answer in [*row.rows, *[nothing] * (most - len(row.rows))]]
    tokens, real, action = (part.unflatten(0, (len(rows), most)) for part in _padded(flat, pad, None))
    present = torch.tensor([[k < len(row.rows) for k in range(most)] for row in rows])
    ranks = torch.tensor([[*row.ranks, *[0] * (most - len(row.ranks))] for row in rows])
    margin = torch.tensor([row.margin or 0.0 for row in rows], dtype=torch.float32)
    sure = [1.0 if row.probability is None else row.probability for row in rows]
    soft = any(row.probability is not None for row in rows)
    return Comparisons(
        tokens_BKT=tokens,
        real_BKT=real,
        present_BK=present,
        rank_BK=ranks,
        margin_B=margin,
        action_BKT=action,
        probability_B=torch.tensor(sure, dtype=torch.float32) if soft else None,
    )


def pairs(rows: Sequence[PairRow], pad: int) -> Pairs:
    """Preference pairs: B × 2 rows, the chosen answer first."""
    flat = [answer for row in rows for answer in row.rows]
    tokens, real, action = (part.unflatten(0, (len(rows), 2)) for part in _padded(flat, pad, None))
    marked = [mark for row in rows for mark in row.corrected or ([], [])]
    return Pairs(
        tokens_BKT=tokens,
        real_BKT=real,
        action_BKT=action,
        probability_B=torch.tensor([row.probability for row in rows], dtype=torch.float32),
        margin_B=torch.tensor([row.margin or 0.0 for row in rows], dtype=torch.float32),
        corrected_BKT=_spread(marked, tokens.shape[-1]).bool().unflatten(0, (len(rows), 2)),
        ref_logp_BKT=_known(rows, tokens.shape[-1]),
    )


def labelled(rows: Sequence[LabelRow], pad: int) -> Labelled:
    """Answers with thumbs."""
    tokens, real, action = _padded([row.row for row in rows], pad, None)
    known = _known(rows, tokens.shape[-1])
    return Labelled(
        tokens, real, action, torch.tensor([row.label for row in rows]), None if known is None else known[:, 0]
    )


def trajectories(rows: Sequence[RatedRow], pad: int) -> Trajectories:
    """Action sequences; each one's rating is the reward of its last action."""
    tokens, real, action = _padded([row.row for row in rows], pad, None)
    reward = torch.zeros(tokens.shape)
    for i, row in enumerate(rows):
        reward[i, max(t for t, said in enumerate(row.row.trained) if said)] = row.rating
    return Trajectories(tokens, real, action, reward)


def _known(rows: Sequence[PairRow] | Sequence[LabelRow], columns: int) -> Tensor | None:
    """The reference's log-probabilities B×K×T where every row has them."""
    known = [one for row in rows for one in row.reference or ()]
    if any(row.reference is None for row in rows):
        return None
    return _spread(known, columns).unflatten(0, (len(rows), -1))


def _spread(rows: Sequence[Sequence[float]], columns: int) -> Tensor:
    """Numbers of ragged rows as R × `columns`, zeros behind them."""
    found = torch.zeros(len(rows), columns)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.float32)
    return found


def _padded(rows: Sequence[TokenRow], pad: int, length: int | None) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(len(row.tokens) for row in rows)
    columns = longest if length is None else length
    if longest > columns:
        raise ValueError(f"a row of {longest} tokens does not fit into {columns} columns")
    tokens = torch.full((len(rows), columns), pad, dtype=torch.int64)
    real = torch.zeros((len(rows), columns), dtype=torch.bool)
    action = torch.zeros((len(rows), columns), dtype=torch.bool)
    for i, row in enumerate(rows):
        count = len(row.tokens)
        tokens[i, :count] = torch.tensor(row.tokens, dtype=torch.int64)
        real[i, :count] = True
        action[i, :count] = torch.tensor(row.trained, dtype=torch.bool)
    return tokens, real, action
