"""Steering: tilt what is drawn by learnt values of the next token, and forbid what may not follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from palate import losses
from palate.models.heads import ActionHead, Head, ScalarHead
from palate.models.seats import ACTION_VALUES
from palate.models.trunk import Trunk
from palate.settings import PalateError, Settings

_Weight = Annotated[float, Field(ge=0)]


class Steering(Settings):
    """How decoding leaves the policy's own distribution. Not for training: no loss knows of it."""

    beta: _Weight | Annotated[tuple[_Weight, ...], Field(min_length=1)] = 0.0
    """β of log π(a) + β(min Q̂(a) − V), for models that learnt values of their actions; 0: the policy alone. A list is
    a sweep: every such model answers once with each."""
    legal_bigrams: tuple[tuple[int, int], ...] = ()
    """Pairs of token ids that may follow one another (trlX's logit_mask): a token that begins a pair is followed by
    the ends of its pairs alone, end tokens included; after any other token everything goes."""

    @property
    def betas(self) -> tuple[float, ...]:
        """Every β that is asked for, each once, the smallest first."""
        return tuple(sorted(set(self.beta))) if isinstance(self.beta, tuple) else (self.beta,)


def bigrams(legal_VV: Any) -> tuple[tuple[int, int], ...]:
    """A V×V matrix, [i, j] true where token j may follow token i, as the pairs of `Steering.legal_bigrams`.

    Rows that allow everything need no pairs. Raises PalateError for a row that allows nothing.
    """
    allowed_VV = torch.as_tensor(legal_VV, dtype=torch.bool)
    empty = (~allowed_VV.any(-1)).nonzero()
    if len(empty):
        raise PalateError(f"legal_bigrams: nothing may follow token {int(empty[0])}. Let at least an end token.")
    limited = allowed_VV & ~allowed_VV.all(-1, keepdim=True)
    return tuple((int(i), int(j)) for i, j in limited.nonzero().tolist())


class Steer:
    """One β, the heads it reads, and the legal bigrams as tables, on the trunk's device."""

    def __init__(
        self, trunk: Trunk, heads: Mapping[str, Head], beta: float, legal: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Raises PalateError for a β without heads and for ids that are none of the trunk's."""
        self.beta, self.vocabulary = beta, trunk.vocabulary
        self._targets = [head for role in ACTION_VALUES.values() if isinstance(head := heads.get(role), ActionHead)]
        value = heads.get("value")
        self._value = value if isinstance(value, ScalarHead) else None
        if beta and (not self._targets or self._value is None):
            raise PalateError(
                f"steering.beta: {beta:g} needs values of actions, and this model learnt none. Set it to 0, or give "
                "a model whose training left them."
            )
        unknown = [i for pair in legal for i in pair if not 0 <= i < trunk.vocabulary]
        if unknown:
            last = trunk.vocabulary - 1
            raise PalateError(f"steering.legal_bigrams: there is no token {unknown[0]}; ids run from 0 to {last}.")
        self._legal = _tables(legal, trunk) if legal else None

    def __call__(self, logits_BV: Tensor, hidden_BD: Tensor, before_B: Tensor) -> Tensor:
        """Logits after the token `before_B`, whose state is `hidden_BD`; untouched where β is 0 and all is legal."""
        if self._legal is not None:
            row_V, legal_RV = self._legal
            allowed_BV = legal_RV[row_V[before_B]]
            logits_BV = logits_BV.clone()
            logits_BV[:, : self.vocabulary] = logits_BV[:, : self.vocabulary].masked_fill(~allowed_BV, float("-inf"))
        if self.beta and self._value is not None:
            target_HBV = [head(hidden_BD) for head in self._targets]
            tilted_BV = losses.ilql_logits(
                logits_BV[:, : self.vocabulary], target_HBV, self._value(hidden_BD), self.beta
            )
            beyond = logits_BV.shape[-1] - self.vocabulary
            logits_BV = torch.nn.functional.pad(tilted_BV, (0, beyond), value=float("-inf"))
        return logits_BV


def _tables(legal: Sequence[tuple[int, int]], trunk: Trunk) -> tuple[Tensor, Tensor]:
    """(row_V, legal_RV): the row of each token, and what may follow the tokens of a row; row 0 allows everything."""
    begins = {first: row for row, first in enumerate(dict.fromkeys(first for first, _ in legal), 1)}
    row_V = torch.zeros(trunk.vocabulary, dtype=torch.long)
    legal_RV = torch.zeros(len(begins) + 1, trunk.vocabulary, dtype=torch.bool)
    legal_RV[0] = True
    for first, row in begins.items():
        row_V[first] = row
    for first, after in legal:
        legal_RV[begins[first], after] = True
    return row_V.to(trunk.device), legal_RV.to(trunk.device)
