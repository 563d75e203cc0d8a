"""How a batch is cut into what one pass through a model takes: by real tokens, by rows, or by both.

A cut changes memory and speed, never a result: losses are sums over rows. Every rank cuts the whole batch alike.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from palate.batches import Rows
from palate.models.trunk import Trunk
from palate.parallel import World

R = TypeVar("R", bound=Rows)

FROZEN = 4
"""A pass without gradient keeps nothing for a backward pass and takes so many times the tokens of one with it."""
_SHARE = 4
"""Activations of one micro-batch may fill one part in so many of a device's memory."""
_KEPT_A_LAYER = 24
"""Numbers of the hidden width's size that a block keeps of a token: 17 in a GPT-2, 23 in a Llama, by
`palate.check.memory.activations`. Of the vocabulary's size there are none: heads go by blocks of rows."""
_LEAST, _MOST_ON_CPU, _MOST = 256, 4096, 65536


@dataclass(frozen=True)
class Microbatch:
    """The most that one pass takes: so many rows, so many real tokens; None is no limit. One row always goes."""

    rows: int | None = None
    tokens: int | None = None

    def within(self, other: Microbatch) -> Microbatch:
        """Both limits kept."""
        return Microbatch(_lower(self.rows, other.rows), _lower(self.tokens, other.tokens))

    def said(self) -> str:
        """The limit in words."""
        return self._each({"rows": self.rows, "tokens": self.tokens}, "{1:,} {0}") or "all rows"

    def settings(self) -> str:
        """The limit as a stage's settings."""
        return self._each({"microbatch_size": self.rows, "tokens_per_microbatch": self.tokens}, "{0}: {1}")

    def _each(self, limits: Mapping[str, int | None], form: str) -> str:
        return " and ".join(form.format(name, limit) for name, limit in limits.items() if limit is not None)


def _lower(one: int | None, other: int | None) -> int | None:
    return min((limit for limit in (one, other) if limit is not None), default=None)


def cut(batch: R, most: Microbatch, world: World) -> list[R]:
    """Consecutive parts within the limit, small enough that every rank has work where there are rows for it."""
    length_B = lengths(batch)
    total, size = max(1, sum(length_B)), max(1, batch.size)
    tokens, rows = world.rows_each(total, most.tokens or total), world.rows_each(size, most.rows or size)
    starts, here = [0], 0
    for row, length in enumerate(length_B):
        if row > starts[-1] and (here + length > tokens or row - starts[-1] >= rows):
            starts.append(row)
            here = 0
        here += length
    ends = [*starts[1:], batch.size]
    return [batch.select(torch.arange(i, j)) for i, j in zip(starts, ends, strict=True)]


def lengths(batch: Rows) -> list[int]:
    """Real tokens of each row, all its answers together; 1 for rows that hold none."""
    text = _text(batch)
    return [1] * batch.size if text is None else text[1].sum(-1).clamp(min=1).tolist()


def neighbours(batch: R) -> R:
    """The same rows, those that begin alike beside each other: in lexicographic order of their real tokens, stable.

    A model that reads a common beginning once (`palate.models.packed`) then finds it. A row of several answers, as a
    pair is, stays one row and is placed by its first.
    """
    text = _text(batch)
    if text is None:
        return batch
    tokens, real = text[0].cpu().numpy().astype(">u4"), text[1].cpu().numpy()
    spelt = [row[here].tobytes() for row, here in zip(tokens, real, strict=True)]
    order = sorted(range(batch.size), key=spelt.__getitem__)
    return batch if order == list(range(batch.size)) else batch.select(torch.tensor(order))


def _text(batch: Rows) -> tuple[Tensor, Tensor] | None:
    """(tokens, which of them are real), a row's answers one after the other; None for rows without tokens."""
    for shape in ("BT", "BKT"):
        tokens, real = getattr(batch, f"tokens_{shape}", None), getattr(batch, f"real_{shape}", None)
        if isinstance(tokens, Tensor) and isinstance(real, Tensor):
            return tokens.flatten(1), real.flatten(1)
    return None


def affordable(trunk: Trunk) -> int:
    """Real tokens of one pass with gradient, by the model's size and its device's memory; a power of two.

    All memory there is counts, not what happens to be free: the same machine gives the same cut. On a CPU more than a
    few thousand tokens only leave the caches, so that is the most there.
    """
    config: Any = trunk.model.config.get_text_config()
    layers = 1 if trunk.recomputes else int(getattr(config, "num_hidden_layers", 12))
    numbers = layers * _KEPT_A_LAYER * trunk.width
    on_gpu = trunk.device.type == "cuda"
    room = torch.cuda.get_device_properties(trunk.device).total_memory if on_gpu else _memory()
    fits = room // _SHARE // (4 * numbers)
    return max(_LEAST, min(1 << max(0, fits.bit_length() - 1), _MOST if on_gpu else _MOST_ON_CPU))


def _memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
