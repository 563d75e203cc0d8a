"""Give a reward model's numbers a fixed scale, so that a KL coefficient means the same in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from palate import credit
from palate.batches import Tokens
from palate.cast import Cast
from palate.data.collate import examples
from palate.data.encode import Encoding, encode_demonstrations, encode_prompts
from palate.data.source import Data
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.models.heads import ScalarHead
from palate.models.load import Loaded, Loading
from palate.randomness import key
from palate.records import Record
from palate.settings import PalateError, Settings
from palate.stages import _rows, _seats
from palate.workspace import Workspace


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


@dataclass(frozen=True)
class Scale:
    """What normalising needs of its stage: who is judged by whom, from which data, read how."""

    cast: Cast
    judge: Loaded
    start: str | None
    records: Sequence[Record]
    encoding: Encoding
    loading: Loading
    here: Workspace


def normalise(asked: Normalise, scale: Scale) -> tuple[float, float]:
    """Set gain and bias of the reward head so that the asked answers have the asked mean and deviation.

    Returns (gain, bias). The trained gain is thrown away, as in the reference, so that the scale is always fresh.
    """
    head = scale.cast.seat("reward").head
    if not isinstance(head, ScalarHead):
        raise PalateError("normalise: this stage trains no reward head.")
    records = _rows.read_side(asked.data, scale.here, "all") if asked.data is not None else scale.records
    tokens = (_answers if asked.over == "answers" else _demonstrations)(asked, scale, records)
    with torch.no_grad():
        head.gain.fill_(1.0)
        head.bias.fill_(0.0)
        cast = scale.cast
        score_N = cast.chunked(tokens.to(cast.device), lambda part: cast.scores("reward", part))
        gain, bias = credit.gain_and_bias(score_N, asked.mean, asked.std)
        head.gain.fill_(gain)
        head.bias.fill_(bias)
    return gain, bias


def _answers(asked: Normalise, scale: Scale, records: Sequence[Record]) -> Tokens:
    name, here = asked.model or scale.start, scale.here
    if name is None:
        raise PalateError("normalise.model: name whose answers set the scale; a model made from nothing has none yet.")
    speaker = _seats.open_model(name, here, "policy", scale.loading)
    if not speaker.tokenizer.same_words(scale.judge.tokenizer):
        raise PalateError(
            f"normalise.model: {name} has another tokenizer than the reward model. Take one that shares it."
        )
    room = speaker.trunk.context - asked.sampling.max_new_tokens
    prompts = encode_prompts(records, speaker.tokenizer, scale.encoding, room).rows[: asked.rows]
    keys = [key(here.seed, here.name, "normalise", p.key) for p in prompts]
    rollouts = LocalEngine(speaker.trunk, speaker.tokenizer, asked.sampling).generate([p.tokens for p in prompts], keys)
    return Tokens(rollouts.tokens_BT, rollouts.real_BT, rollouts.action_BT)


def _demonstrations(asked: Normalise, scale: Scale, records: Sequence[Record]) -> Tokens:
    tokenizer, context = scale.judge.tokenizer, scale.judge.trunk.context
    return examples(
        encode_demonstrations(records[: asked.rows], tokenizer, scale.encoding, context).rows, tokenizer.pad
    )
