"""Engine: who answers. The settings of sampling, what every engine promises, and why an answer stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from palate.batches import Rollouts
from palate.engines.publication import Publication
from palate.models.tokenizer import Tokenizer
from palate.settings import PalateError, Settings


class Sampling(Settings):
    """How answers are drawn, in this order: suppress early ends, temperature, top-k, top-p, draw."""

    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by this before the softmax; training divides by the same number."""
    top_k: int = Field(default=0, ge=0)
    """Draw from the k likeliest tokens only; 0 is off. Not for training: see docs/sampling.md."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the fewest likeliest tokens that hold this probability; 1 is off. Not for training."""
    max_new_tokens: int = Field(default=64, ge=1)
    """The longest answer in tokens, its end token included."""
    min_new_tokens: int = Field(default=0, ge=0)
    """End tokens cannot be drawn before the answer has this many other tokens. Not for training."""
    fixed_length: bool = False
    """Never stop: every answer has exactly max_new_tokens tokens, end tokens in the middle included."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer beside the tokenizer's EOS; the token stays in the answer, as EOS does."""

    stop: tuple[str, ...] = ()
    """Texts that end an answer. Their tokens stay in the answer that is trained; rewards and people do not see them."""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every answer at once. Take it out")
        if self.fixed_length and (self.stop_token_ids or self.stop or self.min_new_tokens):
            raise ValueError(
                "fixed_length never stops, so stop_token_ids, stop and min_new_tokens have no effect: remove one "
                "side. To cut fixed-length answers before they are scored, set truncate_token"
            )
        return self

    @property
    def full_support(self) -> bool:
        """Whether every token of the vocabulary can be drawn at every place."""
        return self.top_k == 0 and self.top_p == 1.0 and self.min_new_tokens == 0


class Engine(Protocol):
    """What the loop asks of an engine, wherever it runs."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the answers."""
        ...

    def publish(self, publication: Publication) -> None:
        """Speak with these weights from now on, and show it: PalateError, naming the layer, when that failed."""
        ...

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], keys: Sequence[int], version: int = 0, greedy: bool = False
    ) -> Rollouts:
        """One answer per key. With K times as many keys as prompts, prompt i gets keys K·i to K·i + K − 1.

        An answer depends on its prompt, its key and the weights alone. Rows are [prompt][answer][padding] in
        the order of the keys; `prompt_B` counts from 0 in the order of `prompt_ids`.
        """
        ...


def answers_per_prompt(prompts: int, keys: int) -> int:
    """K, how many answers each prompt gets; a programming error where the counts do not divide."""
    if prompts == 0 or keys == 0 or keys % prompts:
        raise ValueError(f"{keys} keys cannot be dealt evenly to {prompts} prompts")
    return keys // prompts


def require_full_support(sampling: Sampling, where: str) -> None:
    """Refuse top-k, top-p and a minimum length where log-probabilities are trained on (see docs/sampling.md).

    Training takes the softmax over the whole vocabulary. A sampler that drew from a part of it reports
    log-probabilities larger by −log(kept mass), so every importance ratio would be off by the kept mass.
    """
    if sampling.full_support:
        return
    given = {
        "top_k": (sampling.top_k, 0),
        "top_p": (sampling.top_p, 1.0),
        "min_new_tokens": (sampling.min_new_tokens, 0),
    }
    name, (value, off) = next((n, pair) for n, pair in given.items() if pair[0] != pair[1])
    instead = "fixed_length or a missing-EOS penalty" if name == "min_new_tokens" else "temperature"
    raise PalateError(
        f"{where}.{name}: {value} draws from a part of the vocabulary while training scores all of it, "
        f"so every ratio would carry the kept mass. Set it to {off} (off) and shape answers with {instead}; "
        f"generate and evaluate may use it."
    )


def stop_reasons(rollouts: Rollouts, eos: int | None) -> list[str]:
    """Why each answer ended: `eos`, `stop` (a stop token) or `length` (cut by max_new_tokens)."""
    last_B = last_action(rollouts.action_BT)
    final_B = rollouts.tokens_BT.gather(1, last_B[:, None])[:, 0]
    named = ("eos" if token == eos else "stop" for token in final_B.tolist())
    finished = rollouts.finished_B.tolist()
    return [name if done else "length" for name, done in zip(named, finished, strict=True)]


def last_action(action_BT: Tensor) -> Tensor:
    """The index of each row's last action token; 0 where a row has none."""
    place_T = torch.arange(action_BT.shape[1], device=action_BT.device)
    return (action_BT * place_T).amax(-1)


def lay_out(
    prompt_ids: Sequence[Sequence[int]],
    answer_ids: Sequence[Sequence[int]],
    logps: Sequence[Sequence[float]],
    finished: Sequence[bool],
    *,
    pad: int,
    version: int,
    temperature: float,
    device: torch.device,
    limit: int | None = None,
) -> Rollouts:
    """Rows [prompt][answer][padding] from ragged lists, the answers to one prompt adjacent."""
    tokens_BM, written_BM = _table(answer_ids, np.int64)
    written = Written(
        tokens_BM=torch.from_numpy(tokens_BM),
        logp_BM=torch.from_numpy(_table(logps, np.float32)[0]),
        count_B=torch.from_numpy(written_BM.sum(-1)),
        finished_B=torch.tensor(list(finished)),
    )
    rows = lay(prompt_ids, written, pad=pad, version=version, temperature=temperature, limit=limit)
    return rows.to(device)


@dataclass(frozen=True)
class Written:
    """B answers of up to M tokens, from the first column on; what stands behind the first `count_B` means nothing.

    `value_BM` are the values of the states before the tokens, where someone spoke them.
    """

    tokens_BM: Tensor
    logp_BM: Tensor
    count_B: Tensor
    finished_B: Tensor
    value_BM: Tensor | None = None


def lay(
    prompt_ids: Sequence[Sequence[int]],
    written: Written,
    *,
    pad: int,
    version: int,
    temperature: float,
    limit: int | None = None,
) -> Rollouts:
    """Rows [prompt][answer][padding], the answers to one prompt adjacent; on the device of what was written."""
    count_B, device = written.count_B, written.count_B.device
    prompt_B = torch.arange(len(count_B), device=device) // answers_per_prompt(len(prompt_ids), len(count_B))
    prompts_PL, asked_PL = (torch.from_numpy(x).to(device) for x in _table(prompt_ids, np.int64))
    start_B1 = asked_PL.sum(-1)[prompt_B, None]
    end_B1 = start_B1 + count_B[:, None]
    place_T = torch.arange(int(end_B1.max()), device=device)
    real_BT, action_BT = place_T < end_B1, (place_T >= start_B1) & (place_T < end_B1)
    own_BT = (place_T - start_B1).clamp(0, written.tokens_BM.shape[1] - 1)
    asked_BT = place_T.expand_as(own_BT).clamp(max=prompts_PL.shape[1] - 1)

    def placed(x_BM: Tensor) -> Tensor:
        return x_BM.gather(1, own_BT).masked_fill(~action_BT, 0)

    said_BT = torch.where(action_BT, placed(written.tokens_BM), prompts_PL[prompt_B].gather(1, asked_BT))
    return Rollouts(
        tokens_BT=said_BT.masked_fill(~real_BT, pad),
        real_BT=real_BT,
        action_BT=action_BT,
        logp_BT=placed(written.logp_BM),
        finished_B=written.finished_B,
        prompt_B=prompt_B,
        version=version,
        temperature=temperature,
        limit=limit,
        value_BT=None if written.value_BM is None else placed(written.value_BM),
    )


def _table(ragged: Sequence[Sequence[float]], kind: type[np.generic]) -> tuple[Any, Any]:
    """Ragged rows as one table, zeros behind their ends, and where it holds something."""
    length_B = np.array([len(row) for row in ragged])
    real_BL = np.arange(max(1, int(length_B.max()))) < length_B[:, None]
    table_BL = np.zeros(real_BL.shape, dtype=kind)
    table_BL[real_BL] = np.concatenate([np.asarray(row, dtype=kind) for row in ragged])
    return table_BL, real_BL
