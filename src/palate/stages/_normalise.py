"""Give a reward model's numbers a fixed scale, so that a KL coefficient means the same in every run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from palate import credit
from palate.batches import Tokens
from palate.cast import Cast
from palate.data.collate import examples
from palate.data.encode import Encoding, encode_demonstrations, encode_prompts
from palate.data.source import Data, load
from palate.engines.engine import Sampling
from palate.models.load import Loaded, Loading
from palate.randomness import key
from palate.records import Record
from palate.settings import PalateError, Settings
from palate.stages import _seats
from palate.workspace import Workspace

_CHUNK = 32
"""Rows of one forward pass."""


class Normalise(Settings):
    """Which answers are to have which mean and spread of reward (details 21 and 22)."""

    before: bool = True
    """Set the scale before training."""
    after: bool = True
    """Set the scale again after training."""
    over: Literal["answers", "demonstrations"] = "answers"
    """`answers`: sampled by `model` on the data's prompts (2019 work). `demonstrations`: as written (TL;DR work)."""
    model: str | None = None
    """Whose answers; the model the stage starts from when not given."""
    data: Data | None = None
    """The prompts or demonstrations; the stage's own data when not given."""
    rows: int = Field(default=256, ge=2)
    """How many answers or demonstrations."""
    sampling: Sampling = Sampling()
    """How those answers are drawn."""
    mean: float = 0.0
    """The mean they get."""
    std: float | None = Field(default=1.0, gt=0)
    """The standard deviation they get; none leaves the scale and only shifts (TL;DR work)."""

    @field_validator("data", mode="before")
    @classmethod
    def _data(cls, given: Any) -> Any:
        return _seats.data(given)


def normalise(
    asked: Normalise,
    cast: Cast,
    judge: Loaded,
    start: str | None,
    records: Sequence[Record],
    encoding: Encoding,
    here: Workspace,
    how: Loading,
) -> tuple[float, float]:
    """Set gain and bias of the reward head so that the asked answers have the asked mean and deviation.

    Returns (gain, bias). The trained gain is thrown away, as in the reference, so that the scale is always fresh.
    """
    seat = cast.roles["reward"]
    if seat.head is None:
        raise PalateError("normalise: this stage trains no reward head.")
    known = load(asked.data, here.seed, "all") if asked.data is not None else records
    tokens = (_answers if asked.over == "answers" else _demonstrations)(asked, judge, start, known, encoding, here, how)
    with torch.no_grad():
        seat.head.gain.fill_(1.0)
        seat.head.bias.fill_(0.0)
        score_N = torch.cat([cast.scores("reward", part.to(cast.device)) for part in tokens.split(_CHUNK)])
        gain, bias = credit.gain_and_bias(score_N, asked.mean, asked.std)
        seat.head.gain.fill_(gain)
        seat.head.bias.fill_(bias)
    return gain, bias


def _answers(
    asked: Normalise,
    judge: Loaded,
    start: str | None,
    records: Sequence[Record],
    encoding: Encoding,
    here: Workspace,
    how: Loading,
) -> Tokens:
    name = asked.model or start
    if name is None:
        raise PalateError("normalise.model: name whose answers set the scale; a model made from nothing has none yet.")
    speaker = _seats.open_model(name, here, "policy", how)
    room = speaker.trunk.context - asked.sampling.max_new_tokens
    prompts = encode_prompts(records, speaker.tokenizer, encoding, room).rows[: asked.rows]
    keys = [key(here.seed, here.name, "normalise", p.key) for p in prompts]
    engine = _seats.engine_for(speaker, asked.sampling)
    rollouts = engine.generate([p.tokens for p in prompts], keys)
    if not speaker.tokenizer.same_words(judge.tokenizer):
        raise PalateError(
            f"normalise.model: {name} has another tokenizer than the reward model. Take one with its own."
        )
    return Tokens(rollouts.tokens_BT, rollouts.real_BT, rollouts.action_BT)


def _demonstrations(
    asked: Normalise,
    judge: Loaded,
    start: str | None,
    records: Sequence[Record],
    encoding: Encoding,
    here: Workspace,
    how: Loading,
) -> Tokens:
    rows = encode_demonstrations(records[: asked.rows], judge.tokenizer, encoding, judge.trunk.context).rows
    return examples(rows, judge.tokenizer.pad)
