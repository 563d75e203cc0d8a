"""Frozen blocks at the bottom of a trunk, run once for each row of tokens.

What never changes gives a row the same states every time. The policy, the reference and a value branch that stand on
the same frozen blocks therefore read a row's states there from one store, in every pass and epoch, and run the blocks
above them alone. Model code stays transformers' own: while the top runs, each block below stands aside and says the
stored states; while the bottom runs, each block above does.

States are a function of their row alone, to the last bit, so that a run continued from a checkpoint, with nothing
stored, reads what the run that was never interrupted reads. Rows are therefore laid out without a pad, those of one
length beside each other, and common beginnings are not told once. Whether company then leaves the bits of a row as they
are depends on the machine (the number of threads, the kernels) and is tried out; where it does not, a CPU reads row
after row, and other devices go without the store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from palate.models.attention import Asked, Bypassed, mixed
from palate.models.lora import worn
from palate.models.packed import Packed, pack
from palate.models.trunk import Trunk

_SHARE = 16
"""A store may fill one part in so many of its device's memory."""
_TRIED, _ALONE = (128, 1024), 8
"""Tokens of the rows that the bottom is tried out on, at least and at most, and how many of the rows are read alone."""
_GRAIN = 1 << 15
"""torch gives a thread this many numbers of an elementwise operation at least."""


class States:
    """States by row, oldest first; at most `most` bytes are kept, and nothing of weights that have since changed."""

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.held = 0
        self.company: bool | None = None
        """Whether rows may be read beside each other; None until it was tried."""
        self._of: object = None
        self._found: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._found)

    def belong(self, of: object) -> None:
        """Say what weights and number format the states are of; those of others are dropped."""
        if of != self._of:
            self._of, self.held = of, 0
            self._found.clear()

    def get(self, row: bytes) -> Tensor | None:
        """The states L×D of a row, or None."""
        return self._found.get(row)

    def keep(self, found: Mapping[bytes, Tensor]) -> None:
        """Remember rows; the oldest leave where they do not fit."""
        for row, states_LD in found.items():
            if self.most is None:
                self.most = _memory(states_LD.device) // _SHARE
            self._found[row] = states_LD
            self.held += states_LD.nbytes
        while self.most is not None and self.held > self.most:
            self.held -= self._found.pop(next(iter(self._found))).nbytes


@dataclass(frozen=True)
class _Alike:
    """A stream of whole rows, those of one length beside each other: (how many, how long) for each length."""

    groups: tuple[tuple[int, int], ...]

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, asked: Asked) -> Tensor:
        """Attention inside each row; see `palate.models.attention.Layout`."""
        counts = [rows * length for rows, length in self.groups]
        outs: list[Tensor] = []
        for (rows, length), *parts in zip(self.groups, *(x.split(counts) for x in (q_NHd, k_NGd, v_NGd)), strict=True):
            q_bHLd, k_bGLd, v_bGLd = (x.reshape(rows, length, *x.shape[1:]).transpose(1, 2) for x in parts)
            out_bHLd = mixed(q_bHLd, k_bGLd, v_bGLd, asked, _near(length, asked, q_NHd.device), asked.causal)
            outs.append(out_bHLd.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)


def _near(length: int, asked: Asked, device: torch.device) -> Tensor | None:
    """The mask of a window that is shorter than the rows, or None."""
    if asked.window is None or asked.window >= length:
        return None
    place = torch.arange(length, device=device)
    behind_LL = place[:, None] - place
    return (behind_LL < asked.window) & (behind_LL >= 0 if asked.causal else behind_LL > -asked.window)


class Bottom:
    """The lowest `depth` blocks of a trunk and what runs before them, all frozen; what `Trunk.ground` asks for.

    `states` is shared by all trunks whose bottoms are the same tensors. It is put to use where a trial shows that the
    split pass gives the whole pass's states, and left alone as soon as a weight below trains, is another tensor than it
    was (weights sharded over ranks are), or wears an adapter.
    """

    def __init__(self, blocks: Iterable[nn.Module], depth: int, below: Iterable[nn.Module], states: States) -> None:
        """`blocks` is the whole stack, `below` every module with weights that the lowest `depth` of them need."""
        self.blocks, self.depth = list(blocks), depth
        self.below = [module for module in below if any(True for _ in module.parameters(recurse=False))]
        self.weights = self._weights()
        self.states = states
        self.works: bool | None = None
        self._rest: int | None = None  # how many values a block returns behind its states; None where no tuple

    def __deepcopy__(self, memo: object) -> None:
        """A copied trunk has weights of its own and stands on nothing until it is told so."""
        return

    @contextmanager
    def under(self, trunk: Trunk, tokens_BT: Tensor, real_BT: Tensor, packed: Packed) -> Generator[None]:
        """Within this context a pass of `trunk` over `packed` begins with the stored states of its rows."""
        if not self._usable(trunk):
            yield
            return
        ready_ND = self._gathered(trunk, tokens_BT, real_BT, packed)
        with _aside(self.blocks[: self.depth], lambda: self._said(ready_ND[None])):
            yield

    def _weights(self) -> list[nn.Parameter]:
        return [p for module in self.below for p in module.parameters(recurse=False)]

    def _usable(self, trunk: Trunk) -> bool:
        """Whether the bottom is what it was, holds still, and has been found to work."""
        if self.works is False or worn() is not None:
            return False
        now = self._weights()
        if len(now) != len(self.weights) or any(p is not q for p, q in zip(now, self.weights, strict=True)):
            return False
        if any(p.requires_grad for p in now):
            return False
        self.states.belong(_mark(now, trunk.device.type))
        if self.works is None:
            self.works = self._tried(trunk)
        return self.works

    @torch.no_grad()
    def _gathered(self, trunk: Trunk, tokens_BT: Tensor, real_BT: Tensor, packed: Packed) -> Tensor:
        """The states N×D of a packed batch, those of missing rows computed and kept."""
        empty_B = ~real_BT.any(1)
        if bool(empty_B.any()):  # such a row has one place in the stream
            real_BT = real_BT.clone()
            real_BT[empty_B, 0] = True
        tokens, real = tokens_BT.cpu().numpy(), real_BT.cpu().numpy()
        rows = [row[here] for row, here in zip(tokens, real, strict=True)]
        names = [row.tobytes() for row in rows]
        found = {name: states for name in names if (states := self.states.get(name)) is not None}
        missing = {name: row for name, row in zip(names, rows, strict=True) if name not in found}
        if missing:
            read = self._beside if self.states.company else self._alone
            new = dict(zip(missing, read(trunk, list(missing.values())), strict=True))
            found |= new
            self.states.keep(new)
        return _placed([found[name] for name in names], real_BT, packed)

    def _alone(self, trunk: Trunk, rows: Sequence[Any]) -> list[Tensor]:
        return [self._beside(trunk, [row])[0] for row in rows]

    def _beside(self, trunk: Trunk, rows: Sequence[Any]) -> list[Tensor]:
        """The states L×D of rows, by one pass through the bottom."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        lengths = [len(rows[i]) for i in order]
        groups = [(lengths.count(length), length) for length in dict.fromkeys(lengths)]
        tokens = np.concatenate([rows[i] for i in order])
        position = np.concatenate([np.arange(length) for length in lengths])
        tokens_N, position_N = (torch.from_numpy(x).to(trunk.device) for x in (tokens, position))
        said: list[Any] = []
        hook = self.blocks[self.depth - 1].register_forward_hook(lambda block, given, out: said.append(out))
        try:
            with _aside(self.blocks[self.depth :], lambda: said[0]):
                trunk.run(tokens_N, position_N, _Alike(tuple(groups)))
        finally:
            hook.remove()
        self._rest = len(said[0]) - 1 if isinstance(said[0], tuple) else None
        states_ND: Tensor = (said[0] if self._rest is None else said[0][0])[0]
        found = dict(zip(order, states_ND.split(lengths), strict=True))
        return [found[i].clone() for i in range(len(rows))]

    def _said(self, ready: Tensor) -> Any:
        """States in the form in which the model's blocks return them."""
        return ready if self._rest is None else (ready, *[None] * self._rest)

    @torch.no_grad()
    def _tried(self, trunk: Trunk) -> bool:
        """Whether the split pass gives what the whole pass gives, and a row's bits do not depend on who asks for it."""
        if _rescales(trunk.base):
            return False
        rows = _rows(trunk)
        some = range(0, len(rows), -(-len(rows) // _ALONE))
        try:
            beside = self._beside(trunk, rows)
            if self.states.company is None:
                alone, fewer = self._alone(trunk, [rows[i] for i in some]), self._beside(trunk, rows[::2])
                self.states.company = all(torch.equal(a, beside[i]) for a, i in zip(alone, some, strict=True)) and all(
                    torch.equal(a, b) for a, b in zip(fewer, beside[::2], strict=True)
                )
            if not self.states.company and trunk.device.type != "cpu":
                return False
            tokens_BT, real_BT = _padded(rows, trunk.device)
            packed = pack(tokens_BT, real_BT, share=trunk.causal)
            ready_ND = _placed(beside, real_BT, packed)
            expected_ND = trunk.run(packed.tokens_N, packed.position_N, packed).float()
            with _aside(self.blocks[: self.depth], lambda: self._said(ready_ND[None])):
                split_ND = trunk.run(packed.tokens_N, packed.position_N, packed).float()
        except (Bypassed, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError):
            return False
        slack = 64 * torch.finfo(trunk.computes_in).eps * expected_ND.abs().max()
        return bool((split_ND - expected_ND).abs().max() <= slack)


@contextmanager
def _aside(blocks: Sequence[nn.Module], said: Callable[[], Any]) -> Generator[None]:
    """Within this context blocks do not run, and return what is `said`."""
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = lambda *given, **more: said()
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


def _placed(states: Sequence[Tensor], real_BT: Tensor, packed: Packed) -> Tensor:
    """The states L×D of each row as the stream has them; where rows share a place, those of the first of them."""
    place_M = packed.last_BT[real_BT]
    cell_M = torch.arange(place_M.numel(), device=place_M.device)
    last = place_M.numel() - 1  # of tokens that belong to no row, any
    first_N = torch.full_like(packed.tokens_N, last).scatter_reduce(0, place_M, cell_M, "amin")
    return torch.cat(list(states)).index_select(0, first_N)


def _mark(weights: Sequence[Any], kind: str) -> object:
    """What is another thing as soon as a weight has moved or the products are in another number format."""
    cast_to = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return cast_to, [(id(p), p.data_ptr(), p._version) for p in weights]


def _rescales(base: nn.Module) -> bool:
    """Whether positions are scaled by the longest row there is, so that a row's states depend on others."""
    return any(vars(module).get("rope_type") in ("dynamic", "longrope") for module in base.modules())


def _rows(trunk: Trunk) -> list[Any]:
    """Rows of many lengths, with so many numbers in all that every thread has some to work on."""
    least, most = _TRIED
    total = min(most, max(least, 2 * _GRAIN * torch.get_num_threads() // trunk.width))
    longest, lengths = min(61, trunk.context), list[int]()
    while sum(lengths) < total:
        lengths.append(1 + 17 * len(lengths) % longest)
    ids = np.arange(1, 1 + sum(lengths)) * 7 % trunk.vocabulary
    return np.split(ids, np.cumsum(lengths)[:-1])


def _padded(rows: Sequence[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    real_BT = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
    tokens_BT = torch.zeros(real_BT.shape, dtype=torch.long)
    tokens_BT[real_BT] = torch.from_numpy(np.concatenate(rows))
    return tokens_BT.to(device), real_BT.to(device)


def _memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
