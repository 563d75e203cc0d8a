"""Collation: token rows to tensors, padded on the right; masks are carried, never read off the ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palate.batches import Comparisons, Examples
from palate.data.encode import RankedRow, TokenRow


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
    return Comparisons(
        tokens_BKT=tokens, real_BKT=real, present_BK=present, rank_BK=ranks, margin_B=margin, action_BKT=action
    )


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
