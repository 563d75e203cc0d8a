"""What the measurements of growth and memory share: a random model, and the calls by which a stage makes a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from palate.batches import Examples, Rollouts, Scored
from palate.cast import Cast, Layout, assemble
from palate.cutting import FROZEN, Microbatch
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.models.load import Loaded
from palate.models.tokenizer import BYTES, SPECIAL, train_bpe
from palate.models.trunk import Trunk
from palate.parallel import World
from palate.randomness import key
from palate.settings import build
from palate.step import Optimiser, Stepper, minibatches

KEY = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 6000
    context: int = 1024

    @property
    def multiplied(self) -> int:
        """Weights that take part in a matrix product for each token: the blocks' and, once, the tied head's."""
        return 12 * self.layers * self.width**2 + self.vocabulary * self.width


SMALL = Shape()
GPT2 = Shape(12, 768, 12, 50257, 1024)


def model(shape: Shape) -> Loaded:
    """A GPT-2 with random weights. Its tokenizer has the bytes alone; the ids beyond are words without a text."""
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(KEY)
        made = GPT2LMHeadModel(config)
    tokenizer = train_bpe([], BYTES + len(SPECIAL))
    return Loaded(Trunk(made, shape.vocabulary), tokenizer, None, "random GPT-2")


def ids(shape: Shape, rows: int, tokens: int, *about: int | str) -> np.ndarray:
    """Random token ids, rows × tokens, none of them special."""
    numbers = np.random.Generator(np.random.Philox(key=key("rig", *about)))
    return numbers.integers(len(SPECIAL), shape.vocabulary, (rows, tokens))


def examples(shape: Shape, rows: int, tokens: int) -> Examples:
    """Demonstrations of equal length; every token but the first is trained."""
    tokens_BT = torch.from_numpy(ids(shape, rows, tokens, "examples"))
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    action_BT = real_BT.clone()
    action_BT[:, 0] = False
    return Examples(tokens_BT, real_BT, action_BT)


class Bench:
    """One algorithm on one random model: who speaks, who answers, and the optimiser of what trains."""

    def __init__(self, loaded: Loaded, algorithm: Mapping[str, Any], layout: Layout, sampling: Sampling) -> None:
        self.algorithm: Any = build("algorithms", algorithm)
        first, *others = self.algorithm.trains
        roles = tuple(dict.fromkeys((first, *self.algorithm.needs, *others)))
        self.cast: Cast = assemble(layout, loaded, roles, KEY)
        seat = self.cast.seat("policy")
        self.engine = LocalEngine(seat.trunk, loaded.tokenizer, sampling, adapter=seat.adapter)
        self.stepper = Stepper(self.cast.parameters(self.algorithm.trains), Optimiser(), World())

    def learn(self, batch: Any) -> dict[str, float]:
        """One optimiser step, in micro-batches of as many tokens as a stage takes that sets nothing."""
        afforded = Microbatch(tokens=self.cast.budget // FROZEN)
        return self.stepper.step(batch, lambda part: self.algorithm.loss(self.cast, part), afforded, rate=1e-5)

    def answers(self, prompts: Sequence[Sequence[int]], number: int) -> Rollouts:
        """A rollout of the algorithm's group for each prompt."""
        group = getattr(self.algorithm, "group", 1)
        keys = [key("rig", number, i) for i in range(len(prompts) * group)]
        return self.engine.generate(prompts, keys, version=number)

    def iteration(self, prompts: Sequence[Sequence[int]], number: int) -> None:
        """Answer, score at random, prepare, and all optimiser steps on it. Nothing is published or written."""
        rows = self.answers(prompts, number)
        score_B = torch.from_numpy(np.random.Generator(np.random.Philox(key=number)).normal(size=rows.size)).float()
        nothing_BT = torch.zeros_like(rows.logp_BT)
        with torch.no_grad():
            scored = Scored(rows, score_B, nothing_BT, {}, self.algorithm.memory())
            learnt = self.algorithm.prepare(self.cast, scored)
        for epoch in range(self.algorithm.passes):
            for batch in minibatches(learnt, self.algorithm.minibatches, KEY, number, epoch):
                self.learn(batch)
