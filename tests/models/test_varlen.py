"""The variable-length kernel is used only where it was found to give what padded attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from palate.models import varlen
from palate.models.attention import Asked
from palate.models.packed import pack

CPU = torch.device("cpu")


def _by_rows(q: Any, k: Any, v: Any, ends: Any, *_: Any, scale: Any, window_size: Any, enable_gqa: bool) -> Any:
    """The kernel's contract, row by row and head by head in float64."""
    out = torch.zeros_like(q, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    assert enable_gqa == (group > 1)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        for i in range(start, end):
            first = max(start, i - window_size[0]) if window_size[0] >= 0 else start
            for h in range(q.shape[1]):
                keys, values = k[first : i + 1, h // group].double(), v[first : i + 1, h // group].double()
                weight = (keys @ q[i, h].double() * (scale or q.shape[-1] ** -0.5)).softmax(-1)
                out[i, h] = weight @ values
    return out.to(q.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts another kernel in the place of torch's, and forgets what was found of it."""

    def put(function: Any) -> None:
        varlen.agrees.cache_clear()
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)

    yield put
    varlen.agrees.cache_clear()


def test_a_kernel_that_keeps_its_contract_is_used(kernel: Any) -> None:
    kernel(_by_rows)
    assert varlen.agrees(CPU, torch.bfloat16, 4, 2, 8)
    assert varlen.agrees(CPU, torch.float32, 2, 2, 4)


WRONG = {
    "blind to rows": lambda q, k, v, ends, *a, **m: _by_rows(q, k, v, ends[[0, -1]], *a, **m),
    "blind to windows": lambda *a, **m: _by_rows(*a, **{**m, "window_size": (-1, 0)}),
    "window off by one": lambda *a, **m: _by_rows(*a, **{**m, "window_size": (m["window_size"][0] + 1, 0)}),
    "not there": None,
}


@pytest.mark.parametrize("name", WRONG)
def test_any_other_is_not(kernel: Any, name: str) -> None:
    kernel(WRONG[name])
    assert not varlen.agrees(CPU, torch.float32, 2, 2, 4)


def test_the_stream_is_its_input(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout's own cumulative lengths, in the order of the stream, give what its buckets give."""
    kernel(_by_rows)
    tokens = torch.randint(2, 9, (6, 12), generator=torch.Generator().manual_seed(1))
    real = torch.arange(12) < torch.tensor([12, 3, 7, 11, 1, 5])[:, None]
    packed = pack(tokens, real, share=True)
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(len(packed.tokens_N), heads, 4, generator=draw) for heads in (4, 2, 2))
    for asked in (Asked(None, True, None, None), Asked(0.3, True, 3, None)):
        expected = packed.attend(0, q, k, v, asked)
        torch.testing.assert_close(varlen.attend(q, k, v, packed.ends_N, asked), expected)
        monkeypatch.setattr(varlen, "fits", lambda *_: True)
        torch.testing.assert_close(packed.attend(0, q, k, v, asked), expected)
        monkeypatch.undo()
        kernel(_by_rows)


@pytest.mark.parametrize("asked", [Asked(None, False, None, None), Asked(None, True, None, 30.0)])
def test_what_it_cannot_do_it_is_not_asked(asked: Asked) -> None:
    half = torch.zeros(3, 2, 4, dtype=torch.bfloat16)
    assert not varlen.fits(half, half, asked)
    assert not varlen.fits(half, half, Asked(None, True, None, None)), "no GPU here"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_own_kernel_agrees_on_a_gpu(dtype: torch.dtype) -> None:
    varlen.agrees.cache_clear()
    assert varlen.agrees(torch.device("cuda"), dtype, 8, 2, 64)
