"""Training on what the policy just said: sample, score, prepare, step. One loop for every online algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator

from palate import step
from palate.algorithms.protocol import Online
from palate.batches import Experience, Rollouts
from palate.cast import Layout
from palate.data.encode import Encoding, PromptRow
from palate.data.source import Data
from palate.engines.engine import Sampling, require_full_support
from palate.models.load import Loading
from palate.randomness import key
from palate.rewards.reward import AnyReward, stages_read
from palate.rewards.shaping import Shaping
from palate.settings import Choice
from palate.stages import _rows, _seats, _state, _tokens
from palate.stages._judging import Judging, Truncation
from palate.stages._order import Order
from palate.stages._seats import AnyAlgorithm
from palate.workspace import Workspace


class Stage(Choice):
    """Train a policy on its own answers, scored by a reward."""

    kind: str = "online"
    """Training on the policy's own answers."""
    name: str = "rlhf"
    """The stage's name; later stages read its model as `stage:NAME`."""
    model: str
    """The policy's start and the reference: a folder, a hub id or `stage:NAME`."""
    reward: AnyReward
    """What an answer is worth: a mapping with `kind`, or the folder or `stage:NAME` of a reward model."""
    watch: AnyReward | None = None
    """A second reward that is only looked at (a known truth, a better judge); logged as gold/mean."""
    value_model: str | None = None
    """A reward model the value network starts from; none starts it from the policy with a head of zeros."""
    prompts: Data
    """What to answer: a file, folder, hub id or `world:NAME/shape`."""
    algorithm: AnyAlgorithm
    """What to make of the scored answers: a mapping with `kind` and its settings."""
    loading: Loading = Loading()
    """How the models come into memory."""
    layout: Layout = Layout()
    """Which weights the roles share and which train."""
    optimiser: step.Optimiser = step.Optimiser()
    """How weights move."""
    encoding: Encoding = Encoding()
    """How prompts become tokens."""
    sampling: Sampling = Sampling()
    """How answers are drawn."""
    truncation: Truncation | None = None
    """Cut answers after a token before they are scored (details 30 to 32); none: the end token ends them."""
    total_episodes: int = Field(default=10_000, ge=1)
    """Answers to learn from over the whole stage."""
    rollout_batch_size: int = Field(default=64, ge=1)
    """Answers of one rollout, between two publications of the policy."""
    microbatch_size: int = Field(default=16, ge=1)
    """Answers of one forward and backward pass; changes memory, never the result."""
    shaping: Shaping = Shaping()
    """What happens to scores before training: a penalty for answers without an end, clipping."""
    logging_steps: int = Field(default=1, ge=1)
    """Write metrics every so many rollouts."""
    sample_steps: int = Field(default=10, ge=1)
    """Write sample answers every so many rollouts."""
    save_steps: int = Field(default=0, ge=0)
    """Write a checkpoint every so many rollouts; 0: about every tenth of the stage."""

    @model_validator(mode="after")
    def _fits(self) -> Stage:
        _seats.as_value_error(lambda: require_full_support(self.sampling, "sampling"))
        if self.sampling.fixed_length and self.truncation is None and self.shaping.missing_eos_penalty is not None:
            raise ValueError("shaping.missing_eos_penalty: fixed_length answers never end, so every one would get it.")
        algorithm: Online = self.algorithm  # pyright: ignore[reportAssignmentType]
        for parts, what in ((algorithm.minibatches, "minibatches"), (algorithm.group, "answers a prompt")):
            if self.rollout_batch_size % parts:
                raise ValueError(f"rollout_batch_size {self.rollout_batch_size} is not divisible by {parts} {what}.")
        if self.total_episodes < self.rollout_batch_size:
            raise ValueError(f"total_episodes {self.total_episodes} does not fill one rollout_batch_size.")
        return self

    @property
    def iterations(self) -> int:
        """Rollouts of the whole stage."""
        return self.total_episodes // self.rollout_batch_size

    def references(self) -> list[str]:
        """Earlier stages this one reads."""
        rewards = [r for r in (self.reward, self.watch) if r is not None]
        read = [name for reward in rewards for name in stages_read(reward)]
        return _seats.references(self.model, self.value_model) + read

    def files(self) -> list[str]:
        """Files whose content counts for the cache."""
        judges = _seats.judges(self.reward, self.watch)
        return self.prompts.files() + _seats.files(self.model, self.value_model, *judges)

    def run(self, here: Workspace) -> None:
        """Sample, score, learn; save the policy."""
        loop = _Loop(self, here)
        loop.go()
        _seats.keep(here, loop.cast, loop.loaded, "policy", self, self.prompts.files(), loop.last)


class _Loop:
    """The state of one online stage: who speaks, how far it is, what the algorithm remembers."""

    def __init__(self, stage: Stage, here: Workspace) -> None:
        self.stage, self.here = stage, here
        self.algorithm: Online = stage.algorithm  # pyright: ignore[reportAttributeAccessIssue]
        self.loaded = _seats.open_model(stage.model, here, "policy", stage.loading)
        value = _seats.open_model(stage.value_model, here, "value", stage.loading) if stage.value_model else None
        self.cast = _seats.online_cast(
            self.loaded, value, stage.layout, self.algorithm.trains, key(here.seed, stage.name)
        )
        reward, watch = (_seats.at_hand(asked, here) for asked in (stage.reward, stage.watch))
        self.judging = Judging(reward or stage.reward, watch, stage.shaping, stage.truncation, self.loaded.tokenizer)
        records, _ = _rows.read(stage.prompts, here)
        room = self.loaded.trunk.context - stage.sampling.max_new_tokens
        self.prompts = _rows.prompts(records, self.loaded.tokenizer, stage.encoding, room, here)
        self.engine = _seats.engine(self.cast, self.loaded.tokenizer, stage.sampling, records)
        per_rollout = stage.rollout_batch_size // self.algorithm.group
        self.prompts = _rows.enough(self.prompts, per_rollout)
        lengths = [len(p.tokens) for p in self.prompts]
        self.order = Order(lengths, per_rollout, False, (here.seed, stage.name))
        self.stepper = step.Stepper(self.cast.parameters(self.algorithm.trains), stage.optimiser, here.world)
        self.done, state = _state.resume(here, self.cast, self.stepper)
        self.memory: dict[str, float] = dict(state.get("memory", self.algorithm.memory()))
        self.last: dict[str, float] = dict(state.get("metrics", {}))

    def go(self) -> None:
        """From where a checkpoint left off to the last rollout."""
        stage = self.stage
        save_every = stage.save_steps or max(1, stage.iterations // 10)
        with self.here.progress(stage.iterations, stage.name, done=self.done) as bar:
            for number in range(self.done + 1, stage.iterations + 1):
                seen = self._iteration(number)
                bar.advance(seen)
                self.last = seen
                if number % stage.logging_steps == 0 or number == stage.iterations:
                    self.here.log(number, seen)
                if number % save_every == 0 and number < stage.iterations:
                    state = {"memory": self.memory, "metrics": self.last}
                    _state.save(self.here, number, self.cast, self.algorithm.trains, self.stepper, **state)

    def _iteration(self, number: int) -> dict[str, float]:
        started = time.perf_counter()
        prompts = [self.prompts[i] for i in self.order.batch(number - 1)]
        rollouts = self._rollouts(prompts, number)
        scored, heard = self.judging.score(rollouts, prompts, self.memory)
        with torch.no_grad():
            experience = self.algorithm.prepare(self.cast, scored)
        seen = self._update(experience.without_shown(), number)
        self.memory = dict(experience.memory)
        if number == 1 or number % self.stage.sample_steps == 0 or number == self.stage.iterations:
            self.here.sample(number, self.judging.table(scored, prompts))
            self.here.tokens(number, _tokens.table(experience, scored, prompts, self.loaded.tokenizer))
        seconds = time.perf_counter() - started
        clock = {"step_time": seconds, "tokens_per_second": float(rollouts.action_BT.sum()) / seconds}
        episode = float(number * self.stage.rollout_batch_size)
        return {**experience.metrics, **seen, **heard, **_shape(scored.rollouts), **clock, "episode": episode}

    def _rollouts(self, prompts: Sequence[PromptRow], number: int) -> Rollouts:
        per_prompt = range(self.algorithm.group)
        keys = [key(self.here.seed, self.stage.name, number, p.key, k, "sample") for p in prompts for k in per_prompt]
        return self.engine.generate([p.tokens for p in prompts], keys, version=number - 1)

    def _update(self, experience: Experience, number: int) -> dict[str, float]:
        """All optimiser steps on one rollout; their metrics averaged, and the first one's ratio error."""
        totals: dict[str, float] = {}
        steps, first = 0, math.nan
        rate = self.stage.optimiser.rate(number - 1, self.stage.iterations)
        for epoch in range(self.algorithm.passes):
            counter = (self.here.seed, self.stage.name, number, epoch, "minibatches")
            for minibatch in step.minibatches(experience, self.algorithm.minibatches, *counter):
                seen = self.stepper.step(minibatch, self._loss, self.stage.microbatch_size, rate)
                first = abs(seen.get("val/ratio", 1.0) - 1.0) if steps == 0 else first
                steps += 1
                for name, value in seen.items():
                    totals[name] = totals.get(name, 0.0) + value
        return {name: total / steps for name, total in totals.items()} | {"first_minibatch/ratio_error": first}

    def _loss(self, part: Experience) -> Any:
        return self.algorithm.loss(self.cast, part)


def _shape(rollouts: Rollouts) -> Mapping[str, float]:
    return {
        "response/length_mean": float(rollouts.length_B.float().mean()),
        "response/eos_rate": float(rollouts.finished_B.float().mean()),
        "val/num_eos_tokens": float(rollouts.finished_B.sum()),
    }
