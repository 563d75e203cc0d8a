"""What a head over the vocabulary says of given tokens, without ever holding N × V numbers.

Logits are made for a block of rows at a time, turned into log-probabilities in place, and dropped. What the backward
pass needs of a block is kept while it is small, and computed again where it is not. Nothing here knows of roles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from palate.models import linear

_BLOCK = 1 << 22
"""Numbers of one block of logits: 16 MiB in float32, about what a processor's cache holds."""
_LEAST, _MOST = 128, 2048
"""Rows of a block: fewer leave the matrix product slow, more gain nothing."""
KEEP = 1 << 24
"""Probabilities that one call keeps for its backward pass, 64 MiB in float32; the rest is computed again."""


@dataclass(frozen=True)
class Shape:
    """What a family does to its logits: z · `scale`, then tanh(z / cap) · cap, then divided by the `temperature`."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class Words:
    """Of N given tokens: `logit_N` and `total_N` = log Σ exp of all logits of the row, after everything `Shape` does.

    `entropy_N` is the distribution's, in nats, `likeliest_N` the likeliest token; both where they were asked for.
    """

    logit_N: Tensor
    total_N: Tensor
    entropy_N: Tensor | None
    likeliest_N: Tensor | None

    @property
    def logp_N(self) -> Tensor:
        """log p of each token."""
        return self.logit_N - self.total_N


Said = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""What `Words` holds, in its order."""


def words(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    token_N: Tensor,
    vocabulary: int,
    shape: Shape,
    entropy: bool = False,
    likeliest: bool = False,
) -> Words:
    """What `said` says, with names."""
    return Words(*said(head, hidden_ND, token_N, vocabulary, shape, entropy, likeliest))


def said(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    token_N: Tensor,
    vocabulary: int,
    shape: Shape,
    entropy: bool = False,
    likeliest: bool = False,
) -> Said:
    """Logits of `token_N` under a head N×D → N×V, of which the first `vocabulary` count; differentiable.

    A plain linear layer is multiplied out here; any other head is asked block by block, and again when its gradient is.
    Under autocast the products are in its format, and their sums and gradients in float32.
    """
    rows = max(_LEAST, min(_MOST, _BLOCK // vocabulary))
    if _plain(head):
        layer = cast(nn.Linear, head)
        bias_V = None if layer.bias is None else layer.bias[:vocabulary]  # pyright: ignore[reportUnnecessaryComparison]
        asked = token_N.shape[0]
        more = linear.rounded(asked, hidden_ND) - asked
        if more:
            hidden_ND, token_N = functional.pad(hidden_ND, (0, 0, 0, more)), functional.pad(token_N, (0, more))
        found = cast(
            Said,
            _Words.apply(hidden_ND, layer.weight[:vocabulary], bias_V, token_N, shape, rows, entropy, likeliest),
        )
        return found if not more else cast(Said, tuple(None if x is None else x[:asked].clone() for x in found))
    parts = [
        _asked(head, hidden_nD, token_n, vocabulary, shape, entropy, likeliest)
        for hidden_nD, token_n in zip(hidden_ND.split(rows), token_N.split(rows), strict=True)
    ]
    joined = [None if one[0] is None else torch.cat(cast(Any, one)) for one in zip(*parts, strict=True)]
    return cast(Said, tuple(joined))


def _plain(head: Callable[[Tensor], Tensor]) -> bool:
    """Whether the head is a linear layer and nothing else: an adapter would listen by a hook."""
    listened = getattr(head, "_forward_hooks", None) or getattr(head, "_forward_pre_hooks", None)
    return type(head) is nn.Linear and not listened


def _asked(
    head: Callable[[Tensor], Tensor],
    hidden_nD: Tensor,
    token_n: Tensor,
    vocabulary: int,
    shape: Shape,
    entropy: bool,
    likeliest: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One block through any head; its N × V numbers live while it is computed and again in its backward pass."""

    def block(given_nD: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        logits_nV = shaped(_wide(head(given_nD)[:, :vocabulary]), shape)
        logit_n, total_n = logits_nV.gather(-1, token_n[:, None])[:, 0], logits_nV.logsumexp(-1)
        every_nV = logits_nV - total_n[:, None] if entropy else logits_nV
        spread_n = -(every_nV.exp() * every_nV).sum(-1) if entropy else None
        return logit_n, total_n, spread_n, logits_nV.argmax(-1) if likeliest else None

    if not torch.is_grad_enabled():
        return block(hidden_nD)
    return cast(Any, checkpoint(block, hidden_nD, use_reentrant=False, preserve_rng_state=False))


def shaped(logits: Tensor, shape: Shape) -> Tensor:
    """Logits after everything `Shape` does to them."""
    if shape.scale != 1.0:
        logits = logits * shape.scale
    if shape.cap is not None:
        logits = torch.tanh(logits / shape.cap) * shape.cap
    return logits if shape.temperature == 1.0 else logits / shape.temperature


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _form(x: Tensor) -> torch.dtype:
    """The number format in which a product with `x` is computed here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Words(torch.autograd.Function):
    """The same for a linear head, with its gradients: of logit_N, total_N and entropy_N, to hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        token_N: Tensor,
        shape: Shape,
        rows: int,
        entropy: bool,
        likeliest: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        # The backward pass is outside of autocast, and one cast here is cheaper than one for each block.
        form = _form(hidden_ND)
        hidden_ND, weight_VD = hidden_ND.to(form), weight_VD.to(form)
        bias_V = None if bias_V is None else bias_V.to(form)
        learns, kept = any(ctx.needs_input_grad[:3]), list[Tensor]()
        parts: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        for hidden_nD, token_n in zip(hidden_ND.split(rows), token_N.split(rows), strict=True):
            logits_nV = _logits(hidden_nD, weight_VD, bias_V, shape)
            logit_n = logits_nV.gather(-1, token_n[:, None])[:, 0]
            top_n, p_nV = logits_nV.max(-1), logits_nV.softmax(-1)
            # The likeliest token's own p gives the sum: one pass for both, and p of it is never near 0.
            total_n = top_n.values - p_nV.gather(-1, top_n.indices[:, None])[:, 0].log()
            spread_n = total_n - _dot(p_nV, logits_nV) if entropy else None
            if learns and (len(kept) + 1) * rows * weight_VD.shape[0] <= KEEP:
                kept.append(p_nV)
            parts.append((logit_n, total_n, spread_n, top_n.indices if likeliest else None))
        joined = [None if one[0] is None else torch.cat(cast(Any, one)) for one in zip(*parts, strict=True)]
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N, joined[1], joined[2])
        ctx.shape, ctx.rows, ctx.kept = shape, rows, kept
        if joined[3] is not None:
            ctx.mark_non_differentiable(joined[3])
        return cast(Any, tuple(joined))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, logit_N: Tensor | None, total_N: Tensor | None, entropy_N: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, token_N, sum_N, spread_N = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        down: list[Tensor] = []
        weight, bias = None, None
        for number, at in enumerate(_blocks(token_N.shape[0], ctx.rows)):
            hidden_nD = hidden_ND[at]
            p_nV = ctx.kept[number] if number < len(ctx.kept) else None
            if p_nV is None:
                logits_nV = _logits(hidden_nD, weight_VD, bias_V, ctx.shape)
                p_nV = logits_nV.sub_(sum_N[at, None]).exp_()
            grad_nV = _of_logits(
                p_nV, token_N[at], sum_N[at], ctx.shape, *_pick(at, logit_N, total_N, entropy_N, spread_N)
            )
            if needs_bias:
                part = grad_nV.sum(0)
                bias = part if bias is None else bias.add_(part)
            grad_nV = grad_nV.to(hidden_ND.dtype)
            if needs_hidden:
                down.append(linear.input_gradient(grad_nV, weight_VD))
            if needs_weight:
                part = _wide(linear.weight_gradient(grad_nV, hidden_nD))
                weight = part if weight is None else weight.add_(part)
        ctx.kept.clear()
        return (torch.cat(down) if needs_hidden else None, weight, bias, *[None] * 5)  # autograd casts to the inputs'


def _dot(one_nV: Tensor, other_nV: Tensor) -> Tensor:
    """The inner product of each row, without their product in memory."""
    return torch.bmm(one_nV[:, None], other_nV[:, :, None])[:, 0, 0]


def _blocks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, max(rows, 1), size))


def _pick(at: slice, *grads: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x[at] for x in grads]


def _logits(hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, shape: Shape) -> Tensor:
    """Wide logits of a block, a fresh tensor."""
    logits_nV = _wide(linear.linear(hidden_nD, weight_VD, bias_V))
    factor = shape.scale / (shape.temperature if shape.cap is None else shape.cap)
    if factor != 1.0:
        logits_nV = logits_nV.mul_(factor)
    return logits_nV if shape.cap is None else logits_nV.tanh_().mul_(shape.cap / shape.temperature)


def _of_logits(
    p_nV: Tensor,
    token_n: Tensor,
    sum_n: Tensor,
    shape: Shape,
    logit_n: Tensor | None,
    total_n: Tensor | None,
    entropy_n: Tensor | None,
    spread_n: Tensor | None,
) -> Tensor:
    """The gradient at the head's own output, from the probabilities, which it overwrites.

    d total = p, d logit = the token's own place, d entropy = −p (log p + entropy); then back through scale and cap.
    """
    bent_nV = None
    if shape.cap is not None:  # 1 − (z / cap)², z the capped logit
        z_nV = (p_nV.log() + sum_n[:, None]) * (shape.temperature / shape.cap)
        bent_nV = 1 - z_nV.square_()
    if entropy_n is not None and spread_n is not None:
        moved_nV = torch.special.xlogy(p_nV, p_nV).add_(p_nV * spread_n[:, None]).mul_(-entropy_n[:, None])
        grad_nV = moved_nV if total_n is None else moved_nV.addcmul_(p_nV, total_n[:, None])
    else:
        grad_nV = p_nV.mul_(0.0 if total_n is None else total_n[:, None])
    if logit_n is not None:
        grad_nV.scatter_add_(-1, token_n[:, None], logit_n[:, None])
    if bent_nV is not None:
        grad_nV.mul_(bent_nV)
    factor = shape.scale / shape.temperature
    return grad_nV if factor == 1.0 else grad_nV.mul_(factor)
