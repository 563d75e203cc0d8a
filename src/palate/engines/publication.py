"""Publication: which weights an engine is to speak with, and how it shows that it does.

Every publication carries a fingerprint of each effective weight (the adapter folded in) and the log-probabilities the
trainer gives a canary text. An engine with weights of its own compares both after it took the new ones: fingerprints
find the layer that was missed, the canary finds what no list of weights shows (an adapter not applied, another
temperature, a template, a cache that is stale).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from palate.batches import Tokens
from palate.settings import PalateError

_ROW, _PART = 4096, 1 << 18
"""Words that are weighed at once, and that are held as float64 at once."""

CLOSE: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (5e-5, 1e-3),
    torch.float32: (5e-5, 1e-3),
    torch.float16: (1e-2, 0.2),
    torch.bfloat16: (6e-2, 1.0),
}
"""How far two computations of the same log-probabilities may lie apart, mean and largest, by the products' format.

Sampler against trainer on random models of eight families, 2 and 8 layers, weights as drawn and four times as large,
temperatures 1 and 0.5, the worst of each: float32 1.7e-6 and 1e-5, float16 3e-3 and 0.016, bfloat16 0.021 and 0.12. The
bounds are at least three times that, for larger models; what they are to find (a temperature, an adapter) is 0.1 up."""


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
        """Raise PalateError, naming the layer, unless an engine's weights and what it says are those published.

        A tensor that lies in the very memory that was published is that tensor, and is not read again.
        """
        published = self.weights()
        wrong = [
            name
            for name, print_ in self.fingerprints.items()
            if name not in mine or not (_one_memory(mine[name], published[name]) or _of(mine[name]) == print_)
        ]
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


def _one_memory(one: Tensor, other: Tensor) -> bool:
    places = [(x.device, x.data_ptr(), x.dtype, x.shape, x.stride()) for x in (one, other)]
    return places[0] == places[1]


@torch.no_grad()
def _of(tensor: Tensor) -> int:
    """What the bits weigh as 16-bit words: first words of all elements, second words of all elements, side by side.

    Each sum is Σ word · (2 · place + 1) modulo 2⁶⁴. The factor is odd, so a changed bit shows. Two places differ by an
    even number below 2⁴⁸ and two words by less than 2¹⁶, and the product is not 0 modulo 2⁶⁴, so a swap shows.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    size = flat.element_size()
    words = flat.view(torch.int8 if size == 1 else torch.int16).view(-1, max(size // 2, 1))
    total = 0
    for plane in words.unbind(1):
        total = (total << 64) + _weight(plane)
    return total


def _weight(words: Tensor) -> int:
    """Σ word · (2 · place + 1) modulo 2⁶⁴, row by row in float64, in which sums below 2⁵³ are exact in any order."""
    total, scale = torch.zeros((), dtype=torch.int64, device=words.device), _scale(words.device)
    for number, part in enumerate(words.split(_PART)):
        rows = functional.pad(part.double(), (0, -part.numel() % _ROW)).view(-1, _ROW)
        weighed, plain = (rows @ scale).long().unbind(1)
        begin = torch.arange(len(rows), device=words.device) * _ROW + number * _PART
        total += (weighed + 2 * begin * plain).sum()
    return int(total) % (1 << 64)


@cache
def _scale(device: torch.device) -> Tensor:
    """What a row of words is multiplied by, for its weighed and for its plain sum."""
    place = torch.arange(_ROW, dtype=torch.float64, device=device)
    return torch.stack([2 * place + 1, torch.ones_like(place)], 1)
