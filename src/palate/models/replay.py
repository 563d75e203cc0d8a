"""Steps of writing that a GPU plays again by itself: recorded once, without Python and without launches in between.

A recorded step reads and writes the same memory every time. So it covers more than is there: all columns up to a
usual number, and rows up to a usual number, of which those nobody needs see themselves alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from palate.models.attention import Asked, Bypassed, Layout
from palate.models.one_query import of_one
from palate.models.trunk import Trunk, close
from palate.parallel import local
from palate.settings import PalateError

_WHERE = "cuda"
"""The kind of device whose steps are recorded."""
_WORTH = 16
"""Tokens that answers may have before recordings pay: the first costs four steps, each further one two."""
_STRIDE = 64
"""Columns by which recordings differ at least."""
_HALVINGS = 2
"""How often fewer rows get a recording of their own; below a quarter of the slots the last one does."""

_STALE = (
    "a step recorded as a CUDA graph does not follow what has changed since then, so answers would be wrong. "
    "Set loading.cuda_graphs: false for this model."
)

Layers = list[tuple[Tensor, Tensor]]
Recording = tuple[Callable[[], None], Tensor]
"""What plays a step again, and where its result lies then."""


def allowed(trunk: Trunk, most_new: int) -> bool:
    """Whether steps of this trunk are to be recorded: on a GPU that holds all weights, if none went wrong before."""
    here = all(local(weight) is weight and weight.device.type == _WHERE for weight in trunk.parameters())
    return trunk.replays and here and most_new >= _WORTH


def record(work: Callable[[], Tensor]) -> Recording:
    """Record what `work` does on this GPU. RuntimeError where it reads a number on the way, or copies from the CPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up, which cannot be recorded
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph.replay, result


@dataclass
class _Still:
    """One new token in every row, whose column is a tensor: what a recording reads anew each time.

    Rows look at the first `columns` columns, of which a mask hides those that are not theirs.
    """

    layers: Layers
    columns: int
    start_B: Tensor
    clock_1: Tensor
    turn: int = 0
    _masks: dict[int | None, Tensor] = field(default_factory=dict[int | None, Tensor])

    def attend(self, layer: int, q_NHd: Tensor, k_NGd: Tensor, v_NGd: Tensor, asked: Asked) -> Tensor:
        """Attention of one new token in every row, which is written first; see `palate.models.attention.Layout`."""
        keys_BGRd, values_BGRd = self.layers[self.turn]
        self.turn += 1
        keys_BGRd.index_copy_(2, self.clock_1, k_NGd[:, :, None].to(keys_BGRd.dtype))
        values_BGRd.index_copy_(2, self.clock_1, v_NGd[:, :, None].to(values_BGRd.dtype))
        count, heads, width = q_NHd.shape
        groups = k_NGd.shape[1]
        q_BGhd = q_NHd.reshape(count, groups, heads // groups, width)
        mask_B11L = self._mask(asked.window, keys_BGRd)[:, None, None]
        span = slice(0, self.columns)
        return of_one(q_BGhd, keys_BGRd, values_BGRd, span, asked, mask_B11L).reshape(count, heads, -1)

    def _mask(self, window: int | None, like: Tensor) -> Tensor:
        """0 at the columns that rows may read, −inf elsewhere; made once for all layers that look equally far."""
        if window not in self._masks:
            column_L = torch.arange(self.columns, device=like.device)
            hidden_BL = (column_L < self.start_B[:, None]) | (column_L > self.clock_1)
            if window is not None:
                hidden_BL |= column_L <= self.clock_1 - window
            self._masks[window] = like.new_zeros(hidden_BL.shape).masked_fill_(hidden_BL, -torch.inf)
        return self._masks[window]


class Replay:
    """Recorded steps of one memory of `slots` rows. The first ones are held against the same steps done by hand.

    A step just recorded shows that the recording is right, one played later that it follows what has changed. Where
    recording fails, or the first gives anything else, no step of this trunk is ever recorded again.
    """

    def __init__(self, trunk: Trunk, slots: int) -> None:
        self.trunk, self.slots = trunk, slots
        self._token_S, self._start_S = torch.zeros(2, slots, dtype=torch.long, device=trunk.device)
        self._clock_1 = torch.zeros(1, dtype=torch.long, device=trunk.device)
        self._known: dict[tuple[int, int], Recording] = {}
        self._place: Tensor | None = None
        self._fresh = True
        self._proven = False

    def step(
        self, token_B: Tensor, start_B: Tensor, clock: int, layers: Layers, by_hand: Callable[[], Tensor]
    ) -> Tensor:
        """The states B×D of one more token in every row, written to column `clock`; rows begin at `start_B`.

        Raises PalateError where a step played later is another than by hand: it may have written over earlier columns.
        """
        if not self.trunk.replays:
            return by_hand()
        expected_BD = None if self._proven else by_hand()
        try:
            found_BD = self._play(token_B, start_B, clock, layers)
        except (Bypassed, RuntimeError, ValueError, TypeError) as fault:
            self._give_up(str(fault).strip().split("\n")[0] or type(fault).__name__)
            return by_hand()
        if expected_BD is None:
            return found_BD
        if close(found_BD.float(), expected_BD.float(), self.trunk.computes_in):
            self._proven = not self._fresh
            return expected_BD
        if not self._fresh:
            raise PalateError(f"{self.trunk.family}: {_STALE}")
        self._give_up("a recorded step gives other states")
        return by_hand()

    def _give_up(self, why: str) -> None:
        self.trunk.replays = False
        fault = f"{self.trunk.family}: steps of writing are not recorded as CUDA graphs but run one by one: {why}"
        warnings.warn(fault, stacklevel=2)

    def _play(self, token_B: Tensor, start_B: Tensor, clock: int, layers: Layers) -> Tensor:
        count, room = len(token_B), layers[0][0].shape[2]
        self._token_S[:count], self._start_S[:count] = token_B, start_B
        self._start_S[count:] = clock  # so that rows nobody needs stand at position 0
        self._clock_1.fill_(clock)
        if self._place is not layers[0][0]:  # memory has moved: what was recorded would write to the old one
            self._known.clear()
            self._place = layers[0][0]
        size = _rows(count, self.slots), _columns(clock + 1, room)
        self._fresh = size not in self._known
        if self._fresh:
            self._known[size] = record(partial(self._work, *size, layers))
        play, result_SD = self._known[size]
        play()
        return result_SD[:count].clone()

    def _work(self, rows: int, columns: int, layers: Layers) -> Tensor:
        start_B = self._start_S[:rows]
        layout: Layout = _Still([(k[:rows], v[:rows]) for k, v in layers], columns, start_B, self._clock_1)
        return self.trunk.run(self._token_S[:rows], self._clock_1 - start_B, layout)


def _rows(count: int, slots: int) -> int:
    """The rows of the recording that serves `count`: all slots, or half, or a quarter."""
    return next(n for n in (-(-slots >> by) for by in range(_HALVINGS, -1, -1)) if n >= count)


def _columns(count: int, room: int) -> int:
    """The columns of the recording that serves `count`: a quarter or a stride more at most, so that there are few."""
    step = max(_STRIDE, 1 << max(0, count.bit_length() - 3))
    return min(room, -(-count // step) * step)
