"""Packed rows: B padded rows as one stream of their real tokens, what they share told once.

Rows that begin alike (answers to one prompt, the two answers of a pair) are read by a causal model as a trunk and
branches: the common beginning is in the stream once, and every row attends to it. Only attention pads, inside a few
buckets of rows of similar length, on the right, where a causal mask already hides the pads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from palate.models import varlen
from palate.models.attention import Asked, mixed

_BUCKETS = 4
"""Into how many buckets the rows go at most; measured best on a CPU."""
_SPREAD = 0.75
"""The shortest row of a bucket is longer than this share of its longest."""
_WORTH = 8
"""Tokens that rows must have in common before they are told once: finding and scattering them costs something too."""


@dataclass(frozen=True)
class _Bucket:
    """Rows of similar length. `index_bL` is the stream's token in each padded cell (any token in a pad).

    `mine_M` are the cells, flat, whose outputs belong to this bucket's stretch of the stream, in its order; `whole`
    says that every cell does. `real_bL` marks cells that are no pads.
    """

    index_bL: Tensor
    mine_M: Tensor
    real_bL: Tensor
    whole: bool


@dataclass(frozen=True)
class Packed:
    """A layout of known tokens: `tokens_N` and `position_N` make the stream.

    `last_BT` gives, for each cell of the padded batch, the place in the stream of the last real token at or before it
    (of the row's first token, where there is none yet). `shares` says that some token is read by several rows. The last
    `filled` tokens of the stream belong to no row: they only make its length a usual one.
    """

    tokens_N: Tensor
    position_N: Tensor
    last_BT: Tensor
    buckets: tuple[_Bucket, ...]
    shares: bool
    filled: int = 0

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, asked: Asked) -> Tensor:
        """Attention inside each row; see `palate.models.attention.Layout`.

        On GPUs in half precision the stream goes to torch's variable-length kernel as it is, unless rows share tokens.
        """
        if not self.shares and not self.filled and varlen.fits(q_NHd, k_NGd, asked):
            return varlen.attend(q_NHd, k_NGd, v_NGd, self.ends_N, asked)
        spread: list[tuple[Tensor, ...]] = [_Spread.apply(x, self) for x in (q_NHd, k_NGd, v_NGd)]  # pyright: ignore[reportAssignmentType]
        outs: list[Tensor] = []
        for bucket, q_bLHd, k_bLGd, v_bLGd in zip(self.buckets, *spread, strict=True):
            q_bHLd, k_bGLd, v_bGLd = (x.transpose(1, 2) for x in (q_bLHd, k_bLGd, v_bLGd))
            allowed = _allowed(bucket.real_bL, asked)
            outs.append(mixed(q_bHLd, k_bGLd, v_bGLd, asked, allowed, asked.causal).transpose(1, 2))
        return _Collect.apply(self, *outs)  # pyright: ignore[reportReturnType]

    @cached_property
    def ends_N(self) -> Tensor:
        """Where each row of the stream ends, behind a 0: what kernels call cumulative lengths."""
        ends = torch.cat([bucket.real_bL.sum(1) for bucket in self.buckets]).cumsum(0)
        return functional.pad(ends, (1, 0)).int()

    @cached_property
    def sources_M(self) -> Tensor:
        """The stream's token in each padded cell of all buckets, one after the other."""
        return torch.cat([bucket.index_bL.flatten() for bucket in self.buckets])


def _allowed(real_bL: Tensor, asked: Asked) -> Tensor | None:
    """The mask that is needed: none for causal rows, whose pads stand behind every real token."""
    length = real_bL.shape[1]
    if asked.window is not None and asked.window < length:
        place = torch.arange(length, device=real_bL.device)
        behind_LL = place[:, None] - place
        near_LL = behind_LL < asked.window
        if asked.causal:
            return near_LL & (behind_LL >= 0)
        return (near_LL & (behind_LL > -asked.window)) & real_bL[:, None, None, :]
    return None if asked.causal or bool(real_bL.all()) else real_bL[:, None, None, :]


class _Spread(torch.autograd.Function):
    """Stream → padded buckets. Every token is in one cell, or, where rows share it, in several."""

    @staticmethod
    def forward(ctx: Any, x_NHd: Tensor, packed: Packed) -> tuple[Tensor, ...]:
        ctx.packed = packed
        found: list[Tensor] = []
        start = 0
        for bucket in packed.buckets:
            count = bucket.index_bL.numel()
            if bucket.whole and not packed.shares:
                part = x_NHd[start : start + count]
            else:
                part = x_NHd.index_select(0, bucket.index_bL.flatten())
            found.append(part.view(*bucket.index_bL.shape, *x_NHd.shape[1:]))
            start += bucket.mine_M.numel()
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        packed: Packed = ctx.packed
        flat = [grad.reshape(-1, *grad.shape[2:]) for grad in grads]
        if packed.shares:
            every_Md = torch.cat(flat).flatten(1)
            summed = torch.ops.aten.embedding_dense_backward(
                every_Md, packed.sources_M, packed.tokens_N.numel(), -1, False
            )
            return summed.view(-1, *grads[0].shape[2:]), None
        own = [
            grad if bucket.whole else grad.index_select(0, bucket.mine_M)
            for bucket, grad in zip(packed.buckets, flat, strict=True)
        ]
        return _filled(own, packed.filled), None


class _Collect(torch.autograd.Function):
    """Padded buckets → stream: the cells that are a bucket's own, in order."""

    @staticmethod
    def forward(ctx: Any, packed: Packed, *outs: Tensor) -> Tensor:
        ctx.packed = packed
        flat = [out.reshape(-1, *out.shape[2:]) for out in outs]
        own = [
            out if bucket.whole else out.index_select(0, bucket.mine_M)
            for bucket, out in zip(packed.buckets, flat, strict=True)
        ]
        return _filled(own, packed.filled)

    @staticmethod
    def backward(ctx: Any, grad_NHd: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        packed: Packed = ctx.packed
        found: list[Tensor | None] = [None]
        parts = grad_NHd.split([*(bucket.mine_M.numel() for bucket in packed.buckets), packed.filled])
        for bucket, part in zip(packed.buckets, parts[:-1], strict=True):
            shape = (*bucket.index_bL.shape, *grad_NHd.shape[1:])
            if bucket.whole:
                found.append(part.reshape(shape))
            else:
                padded = part.new_zeros((bucket.index_bL.numel(), *grad_NHd.shape[1:]))
                found.append(padded.index_copy_(0, bucket.mine_M, part).view(shape))
        return tuple(found)


def _filled(parts: list[Tensor], filled: int) -> Tensor:
    """Parts of a stream one behind the other, and zeros for the tokens that belong to no row."""
    if filled:
        parts = [*parts, parts[0].new_zeros((filled, *parts[0].shape[1:]))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def pack(tokens_BT: Tensor, real_BT: Tensor, share: bool, usual: Callable[[int], int] = lambda count: count) -> Packed:
    """The layout of padded rows, whatever side their padding is on. With `share`, common beginnings are told once.

    `usual` gives the length that a stream of so many tokens is filled up to.
    A row without a real token gets one place, so that every cell has a state to point at.
    """
    device = tokens_BT.device
    tokens, real = tokens_BT.cpu().numpy(), real_BT.cpu().numpy()
    empty = ~real.any(1)
    if empty.any():
        real = real.copy()
        real[empty, 0] = True
    length_B = real.sum(1)
    flat = tokens[real]
    start_B = np.concatenate([[0], np.cumsum(length_B)[:-1]])
    leader_B, common_B = _families(flat, start_B, length_B) if share else (np.arange(len(length_B)), 0 * length_B)
    order, bounds = _bucketed(length_B)
    own_B = length_B - common_B  # tokens of a row that nobody before it has told
    place_B = np.zeros_like(own_B)  # where a row's own tokens begin in the stream
    place_B[order] = np.concatenate([[0], np.cumsum(own_B[order])[:-1]])
    width = int(length_B.max())
    step = np.arange(width)
    # the place in the stream of token j of each row: among the leader's where they are common
    base = np.where(step < common_B[:, None], place_B[leader_B][:, None], (place_B - common_B)[:, None])
    index_BL = base + step
    own_BL = (step >= common_B[:, None]) & (step < length_B[:, None])
    real_BL = step < length_B[:, None]
    total = int(own_B.sum())
    filled = usual(total) - total
    tokens_N, position_N = (np.zeros(total + filled, dtype=np.int64) for _ in range(2))
    first_BL = np.minimum(start_B[:, None] + step, len(flat) - 1)
    tokens_N[index_BL[own_BL]] = flat[first_BL[own_BL]]
    position_N[index_BL[own_BL]] = np.broadcast_to(step, index_BL.shape)[own_BL]
    index_BL = np.where(real_BL, index_BL, 0)
    last_BT = np.take_along_axis(index_BL, np.maximum(real.cumsum(1) - 1, 0), 1)
    made = [_bucket(index_BL[rows], own_BL[rows], real_BL[rows], device) for rows in np.split(order, bounds)]
    stream = [torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (tokens_N, position_N, last_BT)]
    return Packed(stream[0], stream[1], stream[2], tuple(made), bool(common_B.any()), filled)


def _bucket(index_bL: Any, own_bL: Any, real_bL: Any, device: torch.device) -> _Bucket:
    width = int(real_bL.sum(1).max())
    index_bL, own_bL, real_bL = (x[:, :width] for x in (index_bL, own_bL, real_bL))
    parts = index_bL, np.flatnonzero(own_bL), real_bL
    tensors = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in parts)
    return _Bucket(*tensors, whole=bool(own_bL.all()))


def _bucketed(length_B: Any) -> tuple[Any, Any]:
    """Rows by length, stable, and where among them the second and every further bucket begins."""
    order = np.argsort(-length_B, kind="stable")
    ordered = length_B[order]
    bounds: list[int] = []
    longest = ordered[0]
    while len(bounds) < _BUCKETS - 1:
        shorter = int(np.searchsorted(-ordered, -_SPREAD * longest, side="right"))
        if shorter >= len(ordered):
            break
        bounds.append(shorter)
        longest = ordered[shorter]
    return order, bounds


def _families(flat: Any, start_B: Any, length_B: Any) -> tuple[Any, Any]:
    """For each row the row whose beginning it shares, and how many tokens of it; itself and 0 where none.

    Neighbours alone are compared: whoever cuts a batch lays rows that begin alike side by side. A row keeps one token
    to itself, so that each has a place of its own.
    """
    rows = [flat[s : s + n] for s, n in zip(start_B, length_B, strict=True)]
    leader_B, common_B = np.arange(len(rows)), np.zeros_like(length_B)
    first = 0
    for row in range(1, len(rows)):
        most = min(len(rows[first]), len(rows[row]) - 1)
        differs = np.flatnonzero(rows[first][:most] != rows[row][:most])
        common = int(differs[0]) if len(differs) else most
        if common >= _WORTH:
            leader_B[row], common_B[row] = first, common
        else:
            first = row
    return leader_B, common_B
