"""What models weigh on paper: parameters, and the state of training them by layout. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["separate", "shared", "adapters", "hydra"]
KINDS: tuple[Kind, ...] = ("separate", "shared", "adapters", "hydra")
FourthRole = Literal["own", "on the trunk", "none"]
"""Where the reward model sits: weights of its own, what the layout shares, or nowhere (a function is the reward)."""


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder. `kv_width` is heads of keys times their width; `positions` is a learnt table's length."""

    name: str
    layers: int
    width: int
    kv_width: int
    inner: int
    vocabulary: int
    heads: int
    gated: bool = True
    tied: bool = False
    positions: int = 0
    biases: bool = False

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a block's linear layers, as transformers cuts them: GPT-2 has q, k and v in one."""
        d, f = self.width, self.inner
        if not self.gated:
            return (d, d + 2 * self.kv_width), (d, d), (d, f), (f, d)
        return (d, d), (d, self.kv_width), (d, self.kv_width), (d, d), (d, f), (d, f), (f, d)

    @property
    def block(self) -> int:
        """Parameters of a block, its two norms included."""
        norms = 2 * self.width * (2 if self.biases else 1)
        return sum(i * o + (o if self.biases else 0) for i, o in self.linears) + norms

    @property
    def final_norm(self) -> int:
        """Parameters of the norm behind the last block."""
        return self.width * (2 if self.biases else 1)

    @property
    def tables(self) -> int:
        """Parameters of embeddings, positions, and the head where it is not the embedding table itself."""
        return self.width * (self.vocabulary * (1 if self.tied else 2) + self.positions)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.layers * self.block + self.final_norm + self.tables

    @property
    def multiplied(self) -> int:
        """Weights that are multiplied for each token whose next one is asked for: those of linear layers and head."""
        return self.layers * sum(i * o for i, o in self.linears) + self.width * self.vocabulary

    @property
    def cache(self) -> int:
        """Numbers that keys and values of one token are."""
        return 2 * self.layers * self.kv_width

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter on every linear layer but the head."""
        return self.layers * rank * sum(i + o for i, o in self.linears)

    def top(self, blocks: int) -> int:
        """Parameters of the top blocks and the norm behind them: what hydra trains and copies."""
        return blocks * self.block + self.final_norm


GPT2 = Model("GPT-2 124M", 12, 768, 768, 3072, 50257, 12, gated=False, tied=True, positions=1024, biases=True)
SEVEN = Model("7 B", 32, 4096, 1024, 14336, 32000, 32)
"""Mistral 7B's sizes: grouped queries, as models of today have."""
SEVENTY = Model("70 B", 80, 8192, 1024, 28672, 128256, 64)
"""Llama 3 70B's sizes."""


@dataclass(frozen=True)
class Held:
    """Parameters in memory, by what is kept for each."""

    trained: int
    frozen: int


@dataclass(frozen=True)
class Precision:
    """Bytes for each parameter. Mixed precision keeps a copy in half precision beside the trained float32 weights."""

    weights: int
    copy: int
    gradients: int
    moments: int
    frozen: int

    @property
    def trained(self) -> int:
        """Everything that a trained parameter costs."""
        return self.weights + self.copy + self.gradients + self.moments


FLOAT32 = Precision(weights=4, copy=0, gradients=4, moments=8, frozen=4)
MIXED = Precision(weights=4, copy=2, gradients=4, moments=8, frozen=2)


def held(
    model: Model, kind: Kind, top: int = 0, rank: int = 16, fourth: FourthRole = "own", critic: bool = True
) -> Held:
    """What policy, reference, value (unless there is no `critic`) and reward hold; the heads' few thousand left out.

    `top` are the blocks that hydra trains, `rank` that of the adapters.
    """
    whole, part = model.total, model.top(top) if kind == "hydra" else 0
    small = {"separate": whole, "shared": whole, "adapters": model.adapter(rank), "hydra": part}[kind]
    reward = {"own": whole, "on the trunk": small, "none": 0}[fourth]
    two = 2 if critic and kind in ("separate", "adapters") else 1
    trained = two * small
    # The reference is one model each time: a copy, the bare trunk, or the blocks below the top and a copy of those.
    return Held(trained, whole + reward)


def state(found: Held, precision: Precision) -> Mapping[str, int]:
    """Bytes of weights, gradients and moments."""
    return {
        "weights": found.trained * (precision.weights + precision.copy) + found.frozen * precision.frozen,
        "gradients": found.trained * precision.gradients,
        "moments": found.trained * precision.moments,
    }


def gigabytes(size: float) -> str:
    """Bytes in GB of 10⁹, to three digits."""
    scaled = size / 1e9
    return f"{scaled:.0f} GB" if scaled >= 100 else f"{scaled:.3g} GB"
