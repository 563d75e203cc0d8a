"""Attention of rows of any length side by side, by torch's own kernel for GPUs in half precision.

The kernel needs no padded cell at all. It is asked once for each kind of head whether it gives what padded attention
gives; where it is not there, or gives anything else, nobody uses it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from palate.models.attention import Asked, mixed


def fits(q_NHd: Tensor, k_NGd: Tensor, asked: Asked) -> bool:
    """Whether the kernel can do this: half precision on a GPU, causal, without a cap, and found to be right."""
    half = q_NHd.dtype in (torch.float16, torch.bfloat16) and q_NHd.is_cuda
    if not half or not asked.causal or asked.cap is not None:
        return False
    return agrees(q_NHd.device, q_NHd.dtype, q_NHd.shape[1], k_NGd.shape[1], q_NHd.shape[2])


def attend(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, ends_N: Tensor, asked: Asked) -> Tensor:
    """N×H×d of rows that end at `ends_N` (int32, behind a 0); causal, with a window of keys where one is asked for."""
    kernel: Any = import_module("torch.nn.attention.varlen").varlen_attn
    longest = int(ends_N.diff().max())
    window = (-1 if asked.window is None else asked.window - 1, 0)
    grouped = q_NHd.shape[1] != k_NGd.shape[1]
    more = {"scale": asked.scale, "window_size": window, "enable_gqa": grouped}
    return kernel(*(x.contiguous() for x in (q_NHd, k_NGd, v_NGd)), ends_N, ends_N, longest, longest, **more)


@cache
def agrees(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> bool:
    """Whether three ragged rows, with a window and without, come out as padded attention has them, up to rounding."""
    lengths = (5, 1, 9)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), n, width, generator=draw).to(device, dtype) for n in (heads, groups, groups))
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device).int()
    with torch.no_grad():
        return all(_close(q, k, v, ends, Asked(None, True, window, None)) for window in (None, 4))


def _close(q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, ends_N: Tensor, asked: Asked) -> bool:
    try:
        found_NHd = attend(q_NHd, k_NGd, v_NGd, ends_N, asked)
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError):
        return False
    sizes = ends_N.diff().tolist()
    rows = zip(*(x.split(sizes) for x in (q_NHd, k_NGd, v_NGd)), strict=True)
    expected_NHd = torch.cat([_row(q, k, v, asked) for q, k, v in rows])
    return bool((found_NHd - expected_NHd).abs().max() <= 16 * torch.finfo(q_NHd.dtype).eps * expected_NHd.abs().max())


def _row(q_LHd: Tensor, k_LGd: Tensor, v_LGd: Tensor, asked: Asked) -> Tensor:
    place = torch.arange(q_LHd.shape[0], device=q_LHd.device)
    behind_LL = place[:, None] - place
    allowed_LL = (behind_LL >= 0) & (behind_LL < (asked.window or len(place)))
    q_HLd, k_GLd, v_GLd = (x[None].transpose(1, 2) for x in (q_LHd, k_LGd, v_LGd))
    return mixed(q_HLd, k_GLd, v_GLd, asked, allowed_LL, causal=True)[0].transpose(0, 1)
