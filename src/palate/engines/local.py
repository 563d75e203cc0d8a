"""The local engine: batched sampling on the trunk that is being trained, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate import randomness
from palate.batches import Rollouts, Tokens
from palate.engines.draw import draw, drawn_from
from palate.engines.engine import Sampling, answers_per_prompt, lay_out
from palate.engines.publication import Publication
from palate.engines.steering import Steer
from palate.models.lora import bare_state, wear
from palate.models.tokenizer import Tokenizer
from palate.models.trunk import Trunk
from palate.parallel import World
from palate.settings import NotFinite, PalateError

_ONE_BY_ONE = 4
"""Tokens of a given text that are read as an answer is written: each over the cache of those before it."""


@dataclass
class _Draft:
    """An answer being written."""

    prompt: int
    key: int
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finished: bool = False


@dataclass
class _Live:
    """The answers of one chunk that are still being written, and what the trunk remembers of them."""

    drafts: list[_Draft]
    hidden_BD: Tensor
    last_B: Tensor
    """The token that `hidden_BD` is the state of."""
    real_BL: Tensor
    cache: Any

    def keep(self, index: Tensor) -> None:
        """Only these rows go on; the rest leave the cache."""
        self.drafts = [self.drafts[i] for i in index.tolist()]
        self.real_BL = self.real_BL[index]
        self.cache.batch_select_indices(index)


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
    ) -> None:
        """`batch_size` is how many answers are written at once; it moves memory and speed, not answers.

        `steer` changes the logits before anything else does; none leaves them to the policy.

        In a world of several ranks each writes its share and all hold the whole; every rank makes the same calls.
        """
        self.world = world or World()
        self.trunk, self.tokenizer, self.sampling = trunk, tokenizer, sampling
        self.adapter, self.batch_size, self.steer = adapter, batch_size, steer
        if not (trunk.causal and trunk.speaks):
            fault = "has no language-model head" if trunk.causal else "reads both ways (an encoder)"
            raise PalateError(f"{trunk.family}: this model {fault}, so it cannot write. Take a causal language model.")
        self._ends = self._end_tokens()

    def _end_tokens(self) -> Tensor:
        """EOS and the stop tokens; nothing where answers never stop."""
        stops, eos = self.sampling.stop_token_ids, self.tokenizer.eos
        unknown = [i for i in stops if not 0 <= i < self.tokenizer.size]
        if unknown:
            raise PalateError(
                f"sampling.stop_token_ids: there is no token {unknown[0]}; ids run from 0 to {self.tokenizer.size - 1}."
            )
        if eos is None and not stops and not self.sampling.fixed_length:
            raise PalateError(
                "sampling: the tokenizer has no EOS, so no answer could end. Name stop_token_ids, set "
                "fixed_length: true, or name one of its tokens as the end with the model's end_token."
            )
        ends = [] if self.sampling.fixed_length else [*stops, *([] if eos is None else [eos])]
        return torch.tensor(ends, dtype=torch.long, device=self.trunk.device)

    @torch.no_grad()
    def publish(self, publication: Publication) -> None:
        """The weights are the trainer's own, so there is nothing to take; that they are is shown all the same."""
        publication.verify(bare_state(self.trunk.model, self.adapter), self.listen(publication.canary), "local engine")

    @torch.no_grad()
    def listen(self, text: Tokens) -> Tensor:
        """Log-probabilities B×T that this engine, by its own way through cache and draw, gives to given text.

        Rows are without padding; all but the last few tokens are read at once, those one by one. 0 off the action mask.
        """
        said_BT, length = text.tokens_BT, text.tokens_BT.shape[1]
        logp_BT, cache, start = torch.zeros(said_BT.shape, device=said_BT.device), None, 0
        with wear(self.adapter):
            for end in range(max(1, length - _ONE_BY_ONE), length):
                hidden_BSD, cache = self.trunk.extend(said_BT[:, start:end], text.real_BT[:, :end], cache)
                logits_NV = self._logits(hidden_BSD.flatten(0, 1), said_BT[:, start:end].flatten())
                every_NV = drawn_from(logits_NV, self.sampling, self._ends, early=False)
                following = said_BT[:, start + 1 : end + 1].reshape(-1, 1)
                logp_BT[:, start + 1 : end + 1] = every_NV.gather(-1, following).view(said_BT.shape[0], -1)
                start = end
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
        drafts = [_Draft(row // per_prompt, key) for row, key in enumerate(keys)]
        asked = [tuple(prompt_ids[d.prompt]) for d in drafts]
        order = sorted(range(len(drafts)), key=lambda row: (len(asked[row]), asked[row]))
        rows = self.world.rows_each(len(order), self.batch_size)
        chunks = [[drafts[row] for row in order[start : start + rows]] for start in range(0, len(order), rows)]
        with wear(self.adapter), self.world.at_hand(self.trunk), self.world.together(NotFinite):
            for chunk, matters in self.world.deal(chunks):
                if matters:
                    self._write(chunk, prompt_ids, greedy)
        drafts = self._together(drafts, order, rows)
        return lay_out(
            prompt_ids,
            [d.tokens for d in drafts],
            [d.logps for d in drafts],
            [d.finished for d in drafts],
            pad=self.tokenizer.pad,
            version=version,
            temperature=self.sampling.temperature,
            device=self.trunk.device,
            limit=self.sampling.max_new_tokens,
        )

    def _together(self, drafts: list[_Draft], order: Sequence[int], rows: int) -> list[_Draft]:
        """Every draft as the rank that wrote it left it."""
        own = [order[start : start + rows] for start in range(0, len(order), rows)]
        mine = [[(row, drafts[row]) for row in chunk] for chunk in own[self.world.rank :: self.world.size]]
        written = {row: draft for chunk in self.world.gather(mine) for row, draft in chunk}
        return [written[row] for row in range(len(drafts))]

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

    def _write(self, drafts: list[_Draft], prompt_ids: Sequence[Sequence[int]], greedy: bool) -> None:
        """Write the answers of one chunk, all places at once, dropping those that ended."""
        live = self._read(drafts, prompt_ids)
        for t in range(self.sampling.max_new_tokens):
            token_B, logp_B = self._next(live, t, greedy)
            ended_B = torch.isin(token_B, self._ends)
            if self.sampling.stop:
                ended_B = ended_B | self._stopped(live.drafts, token_B)
            for draft, token, logp, ended in _rows(live.drafts, token_B, logp_B, ended_B):
                draft.tokens.append(token)
                draft.logps.append(logp)
                draft.finished = ended
            if t + 1 == self.sampling.max_new_tokens or bool(ended_B.all()):
                return
            if bool(ended_B.any()):
                going = (~ended_B).nonzero()[:, 0]
                live.keep(going)
                token_B = token_B[going]
            live.real_BL = torch.cat([live.real_BL, torch.ones_like(live.real_BL[:, :1])], -1)
            live.last_B = token_B
            hidden_B1D, live.cache = self.trunk.extend(token_B[:, None], live.real_BL, live.cache)
            live.hidden_BD = hidden_B1D[:, -1]

    def _stopped(self, drafts: list[_Draft], token_B: Tensor) -> Tensor:
        """Whether each answer, with its new token, now holds one of the texts that end it.

        Every token has at least one byte, so a stop text lies in the last tokens, as many as it has bytes.
        """
        window = max(len(text.encode()) for text in self.sampling.stop)
        tails = [[*d.tokens[-window:], token] for d, token in zip(drafts, token_B.tolist(), strict=True)]
        said = [self.tokenizer.decode(tail) for tail in tails]
        held = [any(text in one for text in self.sampling.stop) for one in said]
        return torch.tensor(held, device=token_B.device)

    def _read(self, drafts: list[_Draft], prompt_ids: Sequence[Sequence[int]]) -> _Live:
        """Read each distinct prompt once (padded on the left), then deal it out to its answers."""
        asked = [tuple(prompt_ids[d.prompt]) for d in drafts]
        place = {ids: i for i, ids in enumerate(dict.fromkeys(asked))}
        longest = max(map(len, place))
        tokens_PL = torch.full((len(place), longest), self.tokenizer.pad)
        real_PL = torch.zeros(len(place), longest, dtype=torch.bool)
        for ids, i in place.items():
            tokens_PL[i, longest - len(ids) :] = torch.tensor(ids)
            real_PL[i, longest - len(ids) :] = True
        device = self.trunk.device
        real_PL = real_PL.to(device)
        hidden_PLD, cache = self.trunk.extend(tokens_PL.to(device), real_PL, None)
        deal = torch.tensor([place[ids] for ids in asked], device=device)
        if len(place) < len(drafts):
            cache.batch_select_indices(deal)
        return _Live(drafts, hidden_PLD[deal, -1], tokens_PL.to(device)[deal, -1], real_PL[deal], cache)

    def _logits(self, hidden_ND: Tensor, last_N: Tensor) -> Tensor:
        logits_NV = self.trunk.logits(hidden_ND)
        return logits_NV if self.steer is None else self.steer(logits_NV, hidden_ND, last_N)

    def _next(self, live: _Live, t: int, greedy: bool) -> tuple[Tensor, Tensor]:
        """Token t of every live answer and its log-probability."""
        logits_BV = self._logits(live.hidden_BD, live.last_B)
        logp_BV = drawn_from(logits_BV, self.sampling, self._ends, early=t < self.sampling.min_new_tokens)
        broken_B = logp_BV.isnan().any(-1)
        if bool(broken_B.any()):
            prompt = live.drafts[int(broken_B.nonzero()[0])].prompt
            raise NotFinite(
                f"token {t} of the answer to prompt {prompt}: the model's logits are not numbers. Its "
                f"weights have diverged or its precision overflows: lower the learning rate, or load it in "
                f"float32."
            )
        if greedy:
            token_B = logp_BV.argmax(-1)
        else:
            keys_B = np.array([d.key for d in live.drafts], dtype=np.uint64)
            uniform_B = torch.from_numpy(randomness.uniforms(keys_B, t)).to(logp_BV.device)
            token_B = draw(logp_BV, uniform_B)
        return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


def _rows(
    drafts: list[_Draft], token_B: Tensor, logp_B: Tensor, ended_B: Tensor
) -> Iterator[tuple[_Draft, int, float, bool]]:
    return zip(drafts, token_B.tolist(), logp_B.tolist(), ended_B.tolist(), strict=True)
