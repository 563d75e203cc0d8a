"""The local engine: batched sampling on the trunk that is being trained, with a key-value cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from palate import randomness
from palate.batches import Rollouts, Tokens
from palate.engines.draw import allowed, draw, drawn_from
from palate.engines.endings import Endings
from palate.engines.engine import Sampling, Written, answers_per_prompt, lay
from palate.engines.publication import Publication
from palate.engines.steering import Steer
from palate.models.decode import Padded, Read, Slots, remember, turned
from palate.models.heads import ScalarHead
from palate.models.lora import bare_state, wear
from palate.models.tokenizer import Tokenizer
from palate.models.trunk import Trunk
from palate.parallel import World
from palate.settings import NotFinite, PalateError

_ONE_BY_ONE = 4
"""Tokens of a given text that are read as an answer is written: each over the cache of those before it."""
_REFILL = 4
"""New answers begin when this part of the slots is free, 1 in so many: prompts are read faster several at a time."""


@dataclass(frozen=True)
class _Live:
    """The answers that are being written, in the order of the memory's rows.

    `hidden_BD` is the state of `last_B`, the newest token; `count_B` tokens are written; `uniform_BM` decides them all.
    """

    row_B: Tensor
    count_B: Tensor
    last_B: Tensor
    hidden_BD: Tensor
    uniform_BM: Tensor

    def select(self, order: Tensor) -> _Live:
        """The rows named by `order`."""
        return _Live(*(getattr(self, f.name)[order] for f in fields(self)))


@dataclass(frozen=True)
class _Asked:
    """What is to be written: the prompt, key and owner of each row. `waiting` are the rows that have no slot yet."""

    prompts: Sequence[Sequence[int]]
    prompt_R: Sequence[int]
    key_R: NDArray[np.uint64]
    waiting: deque[int]
    greedy: bool

    def ids(self, row: int) -> tuple[int, ...]:
        """The prompt of a row."""
        return tuple(self.prompts[self.prompt_R[row]])


@dataclass(frozen=True)
class _Told:
    """Prompts that were read, and where each is."""

    read: Read
    place: Mapping[tuple[int, ...], int]


class LocalEngine:
    """Answers from a trunk in this process, with its weights as they are when `generate` is called."""

    def __init__(
        self,
        trunk: Trunk,
        tokenizer: Tokenizer,
        sampling: Sampling,
        adapter: str | None = None,
        batch_size: int = 64,
        world: World | None = None,
        steer: Steer | None = None,
        value: ScalarHead | None = None,
    ) -> None:
        """`batch_size` is how many answers are written at once; it moves memory and speed, not answers.

        `steer` changes the logits before anything else does; none leaves them to the policy. `value` is a head that
        reads the same trunk and adapter: then answers come with `value_BT`.

        In a world of several ranks each writes its share and all hold the whole; every rank makes the same calls.
        """
        self.world = world or World()
        self.trunk, self.tokenizer, self.sampling = trunk, tokenizer, sampling
        self.adapter, self.batch_size, self.steer, self.value = adapter, batch_size, steer, value
        if not (trunk.causal and trunk.speaks):
            fault = "has no language-model head" if trunk.causal else "reads both ways (an encoder)"
            raise PalateError(f"{trunk.family}: this model {fault}, so it cannot write. Take a causal language model.")
        self._endings = Endings(tokenizer, sampling, trunk.device)

    @torch.no_grad()
    def publish(self, publication: Publication) -> None:
        """The weights are the trainer's own, so there is nothing to take; that they are is shown all the same."""
        publication.verify(bare_state(self.trunk.model, self.adapter), self.listen(publication.canary), "local engine")

    @torch.no_grad()
    def listen(self, text: Tokens) -> Tensor:
        """Log-probabilities B×T that this engine, by its own way through cache and draw, gives to given text.

        Rows are without padding; all but the last few tokens are read at once, those one by one. 0 off the action mask.
        """
        said_BT, (rows, length) = text.tokens_BT, text.tokens_BT.shape
        logp_BT = torch.zeros(said_BT.shape, device=said_BT.device)
        with wear(self.adapter), turned(self.trunk):
            memory = remember(self.trunk, rows, _ONE_BY_ONE)
            start = max(1, length - _ONE_BY_ONE)
            told = memory.read(said_BT[:, :start].tolist())
            hidden_BD = memory.admit(told, torch.arange(rows, device=said_BT.device))
            states = [*told.hidden_ND[told.place_PL].unbind(1)[:-1], hidden_BD]
            for place in range(start, length - 1):
                states.append(memory.step(said_BT[:, place]))
            for place, state_BD in enumerate(states, 1):
                if place < length and bool(text.action_BT[:, place].any()):
                    logits_BV = self._logits(state_BD, said_BT[:, place - 1])
                    every_BV = drawn_from(logits_BV, self.sampling, self._endings.ids, early=False)
                    logp_BT[:, place] = every_BV.gather(-1, said_BT[:, place, None])[:, 0]
        return logp_BT * text.action_BT

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], keys: Sequence[int], version: int = 0, greedy: bool = False
    ) -> Rollouts:
        """One answer per key; see `Engine.generate`. `greedy` takes the likeliest token, without randomness.

        `logp_BT` is of the distribution drawn from; for greedy answers, of the one not drawn from.
        """
        per_prompt = answers_per_prompt(len(prompt_ids), len(keys))
        for index, ids in enumerate(prompt_ids):
            self._check(index, ids)
        prompt_R = [row // per_prompt for row in range(len(keys))]
        # Long prompts first: those that begin later find room, and rows of like length begin together.
        order = sorted(range(len(keys)), key=lambda row: _longest_first(prompt_ids[prompt_R[row]]))
        each = self.world.rows_each(len(order), self.batch_size)
        parts = [order[start : start + each] for start in range(0, len(order), each)]
        mine = deque(row for part in parts[self.world.rank :: self.world.size] for row in part)
        asked = _Asked(prompt_ids, prompt_R, np.array(keys, dtype=np.uint64), mine, greedy)
        written = self._blank(len(keys))
        with wear(self.adapter), self.world.at_hand(self.trunk), self.world.together(NotFinite), turned(self.trunk):
            self._write(asked, written)
        written = self._together(written)
        return lay(
            prompt_ids,
            written,
            pad=self.tokenizer.pad,
            version=version,
            temperature=self.sampling.temperature,
            limit=self.sampling.max_new_tokens,
        )

    def _blank(self, rows: int) -> Written:
        """Pages for every answer, zeros: what other ranks write is added."""
        shape, device = (rows, self.sampling.max_new_tokens), self.trunk.device
        number = torch.zeros(shape, device=device)
        none_R = torch.zeros(rows, dtype=torch.long, device=device)
        value_RM = None if self.value is None else number.clone()
        return Written(torch.zeros(shape, dtype=torch.long, device=device), number, none_R, none_R.bool(), value_RM)

    def _together(self, mine: Written) -> Written:
        """Every answer as the rank that wrote it left it."""
        if self.world.size == 1:
            return mine
        every = {f.name: getattr(mine, f.name) for f in fields(mine)}
        added = {
            name: self.world.sum(x.long() if x.dtype == torch.bool else x) for name, x in every.items() if x is not None
        }
        return replace(mine, **{**added, "finished_B": added["finished_B"].bool()})

    def _check(self, index: int, ids: Sequence[int]) -> None:
        room = self.trunk.context - self.sampling.max_new_tokens
        if len(ids) == 0:
            raise PalateError(f"prompt {index} has no token: begin it with text or with the BOS token.")
        if len(ids) > room:
            shown = self.tokenizer.decode(list(ids[:16]))
            raise PalateError(
                f"prompt {index} ({shown!r}…) has {len(ids)} tokens; the model's context of "
                f"{self.trunk.context} leaves {max(room, 0)} beside max_new_tokens "
                f"{self.sampling.max_new_tokens}. Shorten or drop the prompt, or lower max_new_tokens."
            )

    def _write(self, asked: _Asked, written: Written) -> None:
        """Write the answers, as many at once as there are slots; those that end make way for those that wait."""
        slots = min(self.batch_size, len(asked.waiting))
        memory = remember(self.trunk, slots, self.sampling.max_new_tokens)
        told: _Told | None = None
        live: _Live | None = None
        while live is not None or asked.waiting:
            enough = min(max(1, slots // _REFILL), len(asked.waiting)) if memory.refills else slots
            if asked.waiting and slots - memory.size >= enough:
                told, live = self._begin(memory, told, asked, live)
            if live is not None:
                live = self._next(live, asked, written, memory)
            if live is not None:
                live = replace(live, hidden_BD=memory.step(live.last_B))

    def _begin(
        self, memory: Slots | Padded, told: _Told | None, asked: _Asked, live: _Live | None
    ) -> tuple[_Told | None, _Live]:
        """Answers that wait take the free slots. A prompt is read once, also when its answers do not begin together.

        What was read is given back where more answers to one of these prompts wait.
        """
        free = min(self.batch_size - memory.size, len(asked.waiting))
        rows = [asked.waiting.popleft() for _ in range(free)]
        known = [row for row in rows if told is not None and asked.ids(row) in told.place]
        fresh = rows[len(known) :]  # rows are in the order of their prompts
        begun = [] if live is None else [live]
        if told is not None and known:
            begun.append(self._dealt(memory, told, asked, known))
        if told is None or fresh:
            place = {ids: i for i, ids in enumerate(dict.fromkeys(map(asked.ids, fresh)))}
            told = _Told(memory.read(list(place)), place)
            begun.append(self._dealt(memory, told, asked, fresh))
        more = memory.refills and asked.waiting and asked.ids(asked.waiting[0]) in told.place
        return told if more else None, _joined(begun)

    def _dealt(self, memory: Slots | Padded, told: _Told, asked: _Asked, rows: Sequence[int]) -> _Live:
        """These answers, at their beginning, in slots of the memory."""
        device = self.trunk.device
        deal_B = torch.tensor([told.place[asked.ids(row)] for row in rows], device=device)
        row_B = torch.tensor(rows, device=device)
        hidden_BD = memory.admit(told.read, deal_B)
        last_B = torch.tensor([asked.ids(row)[-1] for row in rows], device=device)
        places = np.arange(0 if asked.greedy else self.sampling.max_new_tokens)
        uniform_BM = torch.from_numpy(randomness.uniforms(asked.key_R[rows][:, None], places)).to(device)
        return _Live(row_B, torch.zeros_like(row_B), last_B, hidden_BD, uniform_BM)

    def _logits(self, hidden_ND: Tensor, last_N: Tensor) -> Tensor:
        logits_NV = self.trunk.logits(hidden_ND)
        return logits_NV if self.steer is None else self.steer(logits_NV, hidden_ND, last_N)

    def _next(self, live: _Live, asked: _Asked, written: Written, memory: Slots | Padded) -> _Live | None:
        """Write one token of every live answer; those that go on, in the order of the memory's rows."""
        row_B, place_B = live.row_B, live.count_B
        logits_BV = self._logits(live.hidden_BD, live.last_B)
        least = self.sampling.min_new_tokens
        logits_BV = allowed(logits_BV, self.sampling, self._endings.ids, place_B < least if least else False)
        probability_BV = logits_BV.softmax(-1)
        if asked.greedy:
            token_B = logits_BV.argmax(-1)
        else:
            token_B = draw(probability_BV, live.uniform_BM.gather(1, place_B[:, None])[:, 0])
        logp_B = probability_BV.gather(1, token_B[:, None])[:, 0].log()
        written.tokens_BM[row_B, place_B] = token_B
        written.logp_BM[row_B, place_B] = logp_B
        if self.value is not None and written.value_BM is not None:
            written.value_BM[row_B, place_B] = self.value(live.hidden_BD)
        count_B = place_B + 1
        written.count_B[row_B] = count_B
        ended_B = self._endings.reached(written.tokens_BM, row_B, count_B)
        written.finished_B[row_B] = ended_B
        over_B = ended_B | (count_B >= self.sampling.max_new_tokens)
        state = torch.stack([over_B, logp_B.isnan()]).tolist()  # the only wait for the device in a step
        if any(state[1]):
            self._refuse(asked, row_B[logp_B.isnan()].tolist(), count_B[logp_B.isnan()].tolist())
        live = replace(live, count_B=count_B, last_B=token_B)
        going = [row for row, over in enumerate(state[0]) if not over]
        if len(going) == memory.size:
            return live
        order = memory.keep(going)
        return live.select(torch.tensor(order, device=self.trunk.device)) if order else None

    def _refuse(self, asked: _Asked, rows: Sequence[int], counts: Sequence[int]) -> None:
        prompt, count = min((asked.prompt_R[row], count) for row, count in zip(rows, counts, strict=True))
        raise NotFinite(
            f"token {count - 1} of the answer to prompt {prompt}: the model's logits are not numbers. Its "
            f"weights have diverged or its precision overflows: lower the learning rate, or load it in "
            f"float32."
        )


def _joined(parts: Sequence[_Live]) -> _Live:
    """Rows of several parts, one behind the other."""
    return _Live(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(_Live)))


def _longest_first(ids: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Where a prompt comes: answers that begin later find room in the memory, and neighbours are alike."""
    return -len(ids), tuple(ids)
