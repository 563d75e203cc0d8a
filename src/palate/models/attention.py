"""Attention over a stream of tokens without padding: one function that transformers' own modules call.

A model is run on one flat row of N real tokens, so its linear layers never see a pad; only attention has to know which
tokens belong together. While a `Layout` is `laid_out`, transformers' attention modules hand their queries, keys and
values to it. Families that do not ask transformers' registry are found out by `Trunk`, and run on padded rows.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from palate.models.lora import wear, worn

NAME = "palate"
"""Under which the function is registered with transformers."""
_UNKNOWN = ("s_aux", "position_bias", "cu_seq_lens_q", "block_table")
"""What some families hand to attention and these layouts do not read."""


class Bypassed(Exception):
    """A family's attention takes something that a layout does not know, so its padded path has to be used."""


@dataclass(frozen=True)
class Asked:
    """How one layer wants to attend: `scale` of the products, `window` of keys behind a query, `cap` of a score."""

    scale: float | None
    causal: bool
    window: int | None
    cap: float | None


class Layout(Protocol):
    """Who attends to whom among the N tokens of a stream."""

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, asked: Asked) -> Tensor:
        """What each token's heads read: N×H×d. G divides H where keys are shared by heads."""
        ...


_laid: ContextVar[tuple[PreTrainedModel, Layout] | None] = ContextVar("palate_layout", default=None)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """What transformers calls: 1×H×N×d queries, 1×G×N×d keys and values; gives 1×N×H×d."""
    laid = _laid.get()
    if laid is None or attention_mask is not None or any(more.get(name) is not None for name in _UNKNOWN):
        raise Bypassed
    causal = more.get("is_causal")
    asked = Asked(
        scale=more.get("scaling"),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        window=more.get("sliding_window"),
        cap=more.get("softcap"),
    )
    q_NHd, k_NGd, v_NGd = (x[0].transpose(0, 1) for x in (query, key, value))
    layer = cast(int, getattr(module, "layer_idx", 0))
    return laid[1].attend(layer, q_NHd, k_NGd, v_NGd, asked)[None], None


AttentionInterface.register(NAME, _attention)


@contextmanager
def laid_out(model: PreTrainedModel, layout: Layout) -> Generator[None]:
    """Within this context the model's attention follows `layout`; outside of it the model is as it was."""
    config: Any = model.config
    before, token = config._attn_implementation, _laid.set((model, layout))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _laid.reset(token)


def remembered() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` for torch.utils.checkpoint: a recomputation wears and attends as the forward pass did.

    Without it the backward pass would recompute under whatever holds by then, and the gradients would silently belong
    to another function than the loss.
    """
    return nullcontext(), _again(worn(), _laid.get())


@contextmanager
def _again(adapter: str | None, laid: tuple[PreTrainedModel, Layout] | None) -> Generator[None]:
    with wear(adapter), nullcontext() if laid is None else laid_out(*laid):
        yield


def mixed(q_BHQd: Tensor, k_BGKd: Tensor, v_BGKd: Tensor, asked: Asked, allowed: Tensor | None, causal: bool) -> Tensor:
    """softmax(scale · q kᵀ) v for padded rows, B×H×Q×d. `allowed` masks keys (True: may be read), or None.

    `causal` says that query i reads keys up to i, which needs no mask. Scores are capped as tanh(s / cap) · cap.
    """
    groups = q_BHQd.shape[1] // k_BGKd.shape[1]
    if groups > 1:
        k_BGKd, v_BGKd = (x.repeat_interleave(groups, dim=1) for x in (k_BGKd, v_BGKd))
    if asked.cap is None:
        return functional.scaled_dot_product_attention(
            q_BHQd, k_BGKd, v_BGKd, attn_mask=allowed, is_causal=causal and allowed is None, scale=asked.scale
        )
    scale = q_BHQd.shape[-1] ** -0.5 if asked.scale is None else asked.scale
    score_BHQK = torch.tanh(q_BHQd @ k_BGKd.transpose(-1, -2) * (scale / asked.cap)) * asked.cap
    if allowed is None and causal:
        allowed = torch.ones(score_BHQK.shape[-2:], dtype=torch.bool, device=q_BHQd.device).tril()
    if allowed is not None:
        score_BHQK = score_BHQK.masked_fill(~allowed, float("-inf"))
    return score_BHQK.float().softmax(-1).to(v_BGKd.dtype) @ v_BGKd
