"""The harness of the sabotaged twins: claims about formulas, how to sabotage one, and numbers to try them on."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Formula = Callable[..., Any]


class Claim(NamedTuple):
    """One formula, the check that knows its definition, and the twins that the check has to reject."""

    formula: Formula
    check: Callable[[Formula], None]
    twins: Mapping[str, Formula]


def sign_flipped(formula: Formula) -> Formula:
    return lambda *args, **more: -formula(*args, **more)


def with_argument(formula: Formula, name: str, change: Callable[[Any], Any]) -> Formula:
    """The formula with one of its arguments altered on the way in."""

    def twin(*args: Any, **more: Any) -> Any:
        bound = inspect.signature(formula).bind(*args, **more)
        bound.apply_defaults()
        bound.arguments[name] = change(bound.arguments[name])
        return formula(*bound.args, **bound.kwargs)

    twin.__signature__ = inspect.signature(formula)  # type: ignore[attr-defined]  # so that a twin can be altered again
    return twin


def swapped(formula: Formula) -> Formula:
    return lambda first, second, *args, **more: formula(second, first, *args, **more)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def doubles(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=1e-9, atol=1e-9)


MASK = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]]).bool()
"""Late starts, gaps and unequal lengths; row 2 has a single token."""


def filled(x: Tensor, value: float = 7.5) -> Tensor:
    """Garbage, finite so that a dropped mask shows as a wrong number, in the cells off the mask."""
    return x.masked_fill(~MASK, value)


def cells(row: int) -> list[int]:
    return MASK[row].nonzero()[:, 0].tolist()


def nls(x: float) -> float:
    """−log σ(x), from the definition."""
    return -math.log(1 / (1 + math.exp(-x)))


def pair_of(change: Callable[[Any, Any], Any], formula: Formula) -> Formula:
    return lambda *args, **more: change(*formula(*args, **more))


def claim(formula: Formula, check: Callable[[Formula], None], mask: str = "", **twins: Formula) -> Claim:
    """Every formula's twins: its sign flipped, its mask and its clip gone where it has them, and its own mistakes."""
    if mask:
        twins["mask_dropped"] = with_argument(formula, mask, torch.ones_like)
    if "clip" in inspect.signature(formula).parameters:
        twins["clip_removed"] = with_argument(formula, "clip", lambda _: math.inf)
    return Claim(formula, check, {"sign_flipped": sign_flipped(formula), **twins})


def altered(formula: Formula, **changes: Any) -> Formula:
    """The formula with some arguments always set to these values."""
    for name, value in changes.items():
        formula = with_argument(formula, name, lambda _, value=value: value)
    return formula
