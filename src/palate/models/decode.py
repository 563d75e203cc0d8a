"""What a trunk remembers of answers being written: keys and values of B rows, one new token each at a time.

`Slots` owns memory that is filled in place. All rows write their next token into the same column, whatever their
length, and begin where their prompt begins: so a step and a sliding window are slices, and a mask is needed only
where rows begin at different columns. `Padded` is transformers' own cache, for families whose attention does not ask
transformers' registry.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from palate.models import linear, replay
from palate.models.attention import Asked, Layout
from palate.models.one_query import of_one
from palate.models.packed import Packed, pack
from palate.models.trunk import Trunk
from palate.parallel import local

_AHEAD = 64
"""Columns for new tokens that are set aside at first; more come as they are needed."""
_TURN = 1 << 28
"""Bytes of weights that may be held a second time while answers are written."""


@contextmanager
def turned(trunk: Trunk) -> Generator[None]:
    """Within this context linear layers multiply by copies that are made for few rows at a time.

    Where oneDNN multiplies, a copy is in its own layout: it would else lay every weight out for every token. In a
    trunk that computes in another format than its weights', a copy is in that format: it would else be cast for every
    token. Layers that are not plain, or too many to hold twice, stay as they are; the weights must not change
    meanwhile.
    """
    copies = _cast(trunk) if trunk.compute is not None else _turned_over(trunk)
    before = {layer: vars(layer).get("forward") for layer in copies}
    try:
        for layer, (weight_OI, bias_O) in copies.items():
            layer.forward = _by(layer, weight_OI, bias_O)
        yield
    finally:
        for layer, forward in before.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _whole(layer: nn.Module) -> bool:
    """Whether all of the weight is here: of one that is sharded a block gathers its own, just in time."""
    weight = cast(Tensor, layer.weight)
    return local(weight) is weight


_Copies = dict[nn.Module, tuple[Tensor, Tensor | None]]


def _turned_over(trunk: Trunk) -> _Copies:
    plain = [m for m in trunk.model.modules() if type(m) in (nn.Linear, Conv1D) and _whole(m)]
    weights = {layer: cast(Tensor, layer.weight) for layer in plain}
    if sum(weight.nbytes for weight in weights.values()) > _TURN:
        return {}
    return {
        layer: (linear.laid(weight.t() if type(layer) is Conv1D else weight), cast("Tensor | None", layer.bias))
        for layer, weight in weights.items()
        if linear.lays(weight)
    }


def _cast(trunk: Trunk) -> _Copies:
    """However large: beside weights, gradients and Adam in float32 it is an eighth more."""
    copies: _Copies = {}
    for layer in trunk.model.modules():
        if type(layer) in (nn.Linear, Conv1D) and _whole(layer):
            weight = cast(Tensor, layer.weight).detach().to(trunk.compute)
            bias = cast("Tensor | None", layer.bias)
            weight_OI = weight.t().contiguous() if type(layer) is Conv1D else weight
            copies[layer] = weight_OI, None if bias is None else bias.detach().to(trunk.compute)
    return copies


def _by(layer: nn.Module, weight_OI: Tensor, bias_O: Tensor | None) -> Any:
    def forward(input: Tensor) -> Tensor:
        return linear.through(layer, input, weight_OI, bias_O)

    return forward


@dataclass(frozen=True)
class Read:
    """P prompts that were read: their states, and what to remember of them.

    `place_PL` is the row of `hidden_ND` of each prompt's token; behind a prompt's end, of its last token.
    """

    hidden_ND: Tensor
    place_PL: Tensor
    length_P: Tensor
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values N×G×d of each layer, in the order in which layers attend."""
    cache: Any = None

    def final(self, deal_B: Tensor) -> Tensor:
        """The states of the last tokens of some prompts."""
        return self.hidden_ND[self.place_PL[deal_B, -1]]


def remember(trunk: Trunk, slots: int, most_new: int) -> Slots | Padded:
    """An empty memory for at most `slots` answers of at most `most_new` tokens, of the kind the trunk allows."""
    return Slots(trunk, slots, most_new) if trunk.packs and trunk.causal else Padded(trunk)


@dataclass
class _Recording:
    """A layout of known tokens that keeps the keys and values of every layer."""

    packed: Packed
    layers: list[tuple[Tensor, Tensor]]

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, asked: Asked) -> Tensor:
        """Attention inside each prompt; see `palate.models.attention.Layout`."""
        self.layers.append((k_NGd, v_NGd))
        return self.packed.attend(layer, q_NHd, k_NGd, v_NGd, asked)


class Slots:
    """Keys and values of rows 0 to `size` − 1, each layer's in one tensor that is written in place.

    Columns `first` to `clock` − 1 are in use; a row's own begin at its `start`.
    """

    refills = True

    def __init__(self, trunk: Trunk, slots: int, most_new: int) -> None:
        self.trunk, self.slots, self.most_new = trunk, slots, most_new
        self.size = self._clock = self._first = self._room = 0
        self._start = np.zeros(0, dtype=np.int64)
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._turn = 0
        self._position_B = self._mask_BR = self._start_B = None
        self._replay = replay.Replay(trunk, slots) if replay.allowed(trunk, most_new) else None

    def read(self, prompts: Sequence[Sequence[int]]) -> Read:
        """Read prompts as one stream without pads."""
        tokens_PL, real_PL = _table(prompts, left=False)
        device, usual = self.trunk.device, partial(self.trunk.usual, writing=True)
        packed = pack(tokens_PL.to(device), real_PL.to(device), share=True, usual=usual)
        recording = _Recording(packed, [])
        hidden_ND = self._run(packed.tokens_N, packed.position_N, recording)
        return Read(hidden_ND, packed.last_BT, real_PL.sum(-1).to(hidden_ND.device), recording.layers)

    def admit(self, read: Read, deal_B: Tensor) -> Tensor:
        """New rows behind the others, each after the prompt `deal_B` of `read`; the states B×D they go on from."""
        length_B = read.length_P[deal_B]
        lengths = length_B.cpu().numpy()
        width, count = int(lengths.max()), len(lengths)
        self._make_way(width, read)
        step_W = torch.arange(width, device=deal_B.device)
        token_BW = (step_W - (width - length_B)[:, None]).clamp(min=0)
        place_BW = read.place_PL[deal_B].gather(1, token_BW)
        rows, columns = slice(self.size, self.size + count), slice(self._clock - width, self._clock)
        for told, kept in zip(read.layers, self._layers, strict=True):
            for told_NGd, kept_SGRd in zip(told, kept, strict=True):
                kept_SGRd[rows, :, columns] = told_NGd[place_BW].transpose(1, 2)
        self.size += count
        self._start = np.concatenate([self._start, self._clock - lengths])
        self._settle()
        return read.final(deal_B)

    def keep(self, going: Sequence[int]) -> list[int]:
        """Only the rows `going` (ascending) go on, those from behind in the gaps: which row each place holds now."""
        count = len(going)
        gaps = sorted(set(range(count)).difference(going))
        movers = [row for row in going if row >= count]
        order = list(range(count))
        for gap, row in zip(gaps, movers, strict=True):
            order[gap] = row
        if gaps:
            device = self.trunk.device
            to, by = torch.tensor(gaps, device=device), torch.tensor(movers, device=device)
            for kept_SGRd in (x for pair in self._layers for x in pair):
                used = kept_SGRd[:, :, self._first : self._clock]
                used[to] = used[by]
        self.size, self._start = count, self._start[order]
        if count:
            self._settle()
        return order

    def step(self, token_B: Tensor) -> Tensor:
        """The states B×D of one more token in every row."""
        if self._clock == self._room:
            self._make_room()
        by_hand = partial(self._step, token_B)
        if self._replay is None:
            hidden_BD = by_hand()
        else:
            start_B = cast(Tensor, self._start_B)
            hidden_BD = self._replay.step(token_B, start_B, self._clock, self._layers, by_hand)
        self._clock += 1
        self._position_B = self._position_B + 1  # pyright: ignore[reportOptionalOperand]
        return hidden_BD

    def _step(self, token_B: Tensor) -> Tensor:
        self._turn = 0
        return self._run(token_B, self._position_B, self)  # pyright: ignore[reportArgumentType]

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, asked: Asked) -> Tensor:
        """Attention of one new token in every row, which is written first; see `palate.models.attention.Layout`.

        Layers are told apart by their turn, which is the same in every pass.
        """
        keys_SGRd, values_SGRd = self._layers[self._turn]
        self._turn += 1
        count, heads, width = q_NHd.shape
        keys_SGRd[:count, :, self._clock], values_SGRd[:count, :, self._clock] = k_NGd, v_NGd
        end = self._clock + 1
        first = self._first if asked.window is None else max(self._first, end - asked.window)
        groups = k_NGd.shape[1]
        q_BGhd = q_NHd.reshape(count, groups, heads // groups, width)
        mask = None if self._mask_BR is None else self._mask_BR[:, None, None, first:end]
        span = slice(first, end)
        return of_one(q_BGhd, keys_SGRd[:count], values_SGRd[:count], span, asked, mask).reshape(count, heads, -1)

    def _run(self, tokens_N: Tensor, position_N: Tensor, layout: Layout) -> Tensor:
        if self.trunk.model.training:  # only asks transformers to recompute activations, of which there are none
            self.trunk.model.eval()
        return self.trunk.run(tokens_N, position_N, layout)

    def _settle(self) -> None:
        """What follows from where the rows begin: positions, and a mask where they do not begin together."""
        device = self.trunk.device
        self._first = int(self._start.min())
        self._start_B = start_B = torch.from_numpy(self._start).to(device)
        self._position_B = self._clock - start_B
        self._mask_BR = None
        if int(self._start.max()) > self._first:
            dtype = self._layers[0][0].dtype
            before_BR = torch.arange(self._room, device=device) < start_B[:, None]
            self._mask_BR = torch.zeros(before_BR.shape, dtype=dtype, device=device).masked_fill_(before_BR, -torch.inf)

    def _make_way(self, width: int, read: Read) -> None:
        """Before the clock there is place for prompts of this width, and something behind it."""
        if not self.size:
            self._clock = self._first = width
        if not self._layers:
            self._room = width + min(_AHEAD, self.most_new)
            self._layers = [
                (self._blank(told_k, self._room), self._blank(told_v, self._room)) for told_k, told_v in read.layers
            ]
        if self._clock < width or self._clock > self._room:
            self._move(max(self._clock, width), max(self._room, max(self._clock, width) + min(_AHEAD, self.most_new)))

    def _blank(self, like: Tensor, room: int) -> Tensor:
        """Zeros: what is masked out has to be a number all the same."""
        groups, width = (like.shape[1], like.shape[-1]) if like.dim() == 3 else like.shape[1::2]
        return like.new_zeros((self.slots, groups, room, width))

    def _make_room(self) -> None:
        """A column for the next token: by moving to the left where much lies unused there, by more memory else."""
        used = self._clock - self._first
        if self._first >= self._room // 4:
            self._move(used, self._room)
        else:
            wanted = max(min(2 * self._room, self._clock + self.most_new), used + used // 3 + _AHEAD)
            self._move(self._clock, wanted)

    def _move(self, clock: int, room: int) -> None:
        """Lay what is used down again so that it ends at another clock, in tensors of `room` columns."""
        by, live, used = clock - self._clock, slice(0, self.size), slice(self._first, self._clock)
        there = slice(self._first + by, clock)
        moved: list[Tensor] = []
        for kept_SGRd in (x for pair in self._layers for x in pair):
            into = kept_SGRd if room == self._room else self._blank(kept_SGRd, room)
            if self.size:
                into[live, :, there] = kept_SGRd[live, :, used].clone()
            moved.append(into)
        self._layers = list(zip(moved[::2], moved[1::2], strict=True))
        self._clock, self._room, self._start = clock, room, self._start + by
        if self.size:
            self._settle()


class Padded:
    """Rows in transformers' own cache, padded on the left. It takes new rows only when it is empty."""

    refills = False

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.size = 0
        self._real_BL = torch.zeros(0, 0, dtype=torch.bool)
        self._cache: Any = None

    def read(self, prompts: Sequence[Sequence[int]]) -> Read:
        """Read prompts; the cache they leave serves one `admit`."""
        tokens_PL, real_PL = (x.to(self.trunk.device) for x in _table(prompts, left=True))
        hidden_PLD, cache = self.trunk.extend(tokens_PL, real_PL, None)
        length_P, width = real_PL.sum(-1), real_PL.shape[1]
        step_L = torch.arange(width, device=real_PL.device)
        begin_P = torch.arange(len(prompts), device=real_PL.device) * width + width - length_P
        place_PL = begin_P[:, None] + torch.minimum(step_L, length_P[:, None] - 1)
        self._real_BL = real_PL
        return Read(hidden_PLD.flatten(0, 1), place_PL, length_P, [], cache)

    def admit(self, read: Read, deal_B: Tensor) -> Tensor:
        """The rows of an empty memory, each after the prompt `deal_B` of what was just read; their states B×D."""
        self._cache = read.cache
        if not torch.equal(deal_B, torch.arange(len(read.length_P), device=deal_B.device)):
            self._cache.batch_select_indices(deal_B)
        self._real_BL, self.size = self._real_BL[deal_B], len(deal_B)
        return read.final(deal_B)

    def keep(self, going: Sequence[int]) -> list[int]:
        """Only the rows `going` (ascending) go on, in this order, which is given back."""
        if going:
            index = torch.tensor(going, device=self.trunk.device)
            self._cache.batch_select_indices(index)
            self._real_BL = self._real_BL[index]
        self.size = len(going)
        return list(going)

    def step(self, token_B: Tensor) -> Tensor:
        """The states B×D of one more token in every row."""
        self._real_BL = torch.cat([self._real_BL, torch.ones_like(self._real_BL[:, :1])], -1)
        hidden_B1D, self._cache = self.trunk.extend(token_B[:, None], self._real_BL, self._cache)
        return hidden_B1D[:, -1]


def _table(prompts: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Ragged prompts as P×L ids and the mask of the real ones, padded on one side."""
    length_P = np.array([len(ids) for ids in prompts])
    place_L = np.arange(int(length_P.max()))
    real_PL = place_L >= (len(place_L) - length_P)[:, None] if left else place_L < length_P[:, None]
    tokens_PL = np.zeros(real_PL.shape, dtype=np.int64)
    tokens_PL[real_PL] = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in prompts])
    return torch.from_numpy(tokens_PL), torch.from_numpy(real_PL)
