"""Reading tests/golden/losses.json: its groups, tensors of its numbers, and how close is close enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def group(name: str) -> dict[str, Any]:
    """A group that the calling test files cover in full: the census of tests/test_golden_losses.py counts these."""
    return GOLDEN[name]


def part_of(name: str) -> dict[str, Any]:
    """A group of which the caller covers some numbers only."""
    return GOLDEN[name]


def tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def close(actual: Any, expected: Any) -> bool:
    """Equal to 1e-9 in float64 and 1e-5 in float32, relative for numbers above 1."""
    actual = torch.as_tensor(actual)
    room = 1e-5 if actual.dtype == torch.float32 else 1e-9
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape
    return torch.allclose(actual.double(), expected, rtol=room, atol=room)


def gradient(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, retain_graph=True)
