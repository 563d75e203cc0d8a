"""Attention of one query in every row over remembered keys and values: what a token that is written asks for."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from palate.models.attention import Asked


def of_one(
    q_BGhd: Tensor, k_BGRd: Tensor, v_BGRd: Tensor, span: slice, asked: Asked, mask_B11L: Tensor | None
) -> Tensor:
    """softmax(scale · q kᵀ) v of one query per head, B×G×h×d, over the columns of `span`.

    On a CPU two products and a softmax are faster than the fused kernel, which is made for many queries.
    """
    k_BGLd, v_BGLd = k_BGRd[:, :, span], v_BGRd[:, :, span]
    if asked.cap is None and (q_BGhd.device.type != "cpu" or q_BGhd.dtype != torch.float32):
        return functional.scaled_dot_product_attention(q_BGhd, k_BGLd, v_BGLd, attn_mask=mask_B11L, scale=asked.scale)
    scale = q_BGhd.shape[-1] ** -0.5 if asked.scale is None else asked.scale
    score_BGhL = (q_BGhd * scale) @ k_BGLd.transpose(-1, -2)
    if asked.cap is not None:
        score_BGhL = score_BGhL.div_(asked.cap).tanh_().mul_(asked.cap)
    if mask_B11L is not None:
        score_BGhL += mask_B11L
    weight_BGhL = score_BGhL.float().softmax(-1).to(v_BGLd.dtype)
    on_cpu = v_BGRd.device.type == "cpu" and v_BGRd.dtype == torch.float32
    if on_cpu and q_BGhd.shape[2] == 1 and v_BGRd.is_contiguous():
        return _bagged(weight_BGhL, v_BGRd, span)
    return weight_BGhL @ v_BGLd


def _bagged(weight_BG1L: Tensor, v_BGRd: Tensor, span: slice) -> Tensor:
    """Σ weight · v over the columns of `span`, as a bag of embeddings: read as fast as memory gives it.

    A product of one row is not: it takes the values in pieces.
    """
    bags, room = v_BGRd.shape[0] * v_BGRd.shape[1], v_BGRd.shape[2]
    place_bL = _places(bags, room, span.start, span.stop)
    begin_b = _places(bags, span.stop - span.start, 0, 1)[:, 0]
    return functional.embedding_bag(
        place_bL.flatten(),
        v_BGRd.reshape(bags * room, -1),
        begin_b,
        mode="sum",
        per_sample_weights=weight_BG1L.flatten(),
    )


@lru_cache(maxsize=4)
def _places(bags: int, room: int, start: int, stop: int) -> Tensor:
    """Rows of a table of `bags` times `room` rows: those from `start` to `stop` of each."""
    first_b = torch.arange(0, bags * room, room, dtype=torch.int32)
    return first_b[:, None] + torch.arange(start, stop, dtype=torch.int32)
