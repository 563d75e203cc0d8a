"""Publication: which weights an engine is to speak with, and how it shows that it does.

Every publication carries a fingerprint of each effective weight (the adapter folded in) and the log-probabilities the
trainer gives a canary text. An engine with weights of its own compares both after it took the new ones: fingerprints
find the layer that was missed, the canary finds what no list of weights shows (an adapter not applied, another
temperature, a template, a cache that is stale).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from palate.batches import Tokens
from palate.settings import PalateError

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
_COLUMNS = 4096
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

CLOSE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (5e-5, 1e-3),
    torch.float32: (5e-5, 1e-3),
    torch.float16: (5e-3, 0.1),
    torch.bfloat16: (3e-2, 0.5),
}
"""How far two computations of the same log-probabilities may lie apart, mean and largest, by the weights' format.

Measured in float32: at most 1.4e-6 over eight families; rounding in bfloat16 moves a logit of 20 by up to 0.08."""


@dataclass(frozen=True)
class Publication:
    """One version of the policy. `weights` gives the effective weights under transformers' names when asked."""

    version: int
    fingerprints: Mapping[str, int]
    canary: Tokens
    canary_logp_BT: Tensor
    dtype: torch.dtype
    weights: Callable[[], Mapping[str, Tensor]]

    def verify(self, mine: Mapping[str, Tensor], canary_logp_BT: Tensor, engine: str) -> None:
        """Raise PalateError, naming the layer, unless an engine's weights and what it says are those published."""
        wrong = [name for name, print_ in self.fingerprints.items() if name not in mine or print_ != _of(mine[name])]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise PalateError(
                f"{engine}: version {self.version} did not arrive whole: {wrong[0]}{more} is not what the trainer "
                "holds. Its answers would come from a stale policy. Look at how the engine takes weights."
            )
        gap = (canary_logp_BT - self.canary_logp_BT).abs()[self.canary.action_BT]
        mean, largest = CLOSE[self.dtype]
        if not bool((gap.mean() <= mean) & (gap.max() <= largest)):
            raise PalateError(
                f"{engine}: every weight of version {self.version} arrived, but the canary text has other "
                f"log-probabilities there (by {float(gap.mean()):.2g} on average, {float(gap.max()):.2g} at most). "
                "Likely an adapter that is not applied, a stale cache of repacked weights, or another number format."
            )


def fingerprints(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """A number for each tensor that any changed bit or swapped pair of elements changes."""
    return {name: _of(tensor) for name, tensor in weights.items()}


@torch.no_grad()
def _of(tensor: Tensor) -> int:
    """Of the bits as whole numbers, laid out in rows: Σ over columns and Σ over rows, each weighed by its place.

    Modulo 2⁶⁴, in which sums are the same on every device and in every order.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(_WHOLE[flat.element_size()]) if flat.dtype != torch.bool else flat.to(torch.int8)
    rows = bits[: bits.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    sums = (rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64), bits[rows.numel() :].long())
    total = 0
    for number, x in enumerate(sums):
        place = torch.arange(x.numel(), device=x.device)
        total += int((x * ((2 * place + 1) * _ODD)).sum()) * (2 * number + 1)
    return total % (1 << 64)
