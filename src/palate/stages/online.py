"""Training on what the policy just said: sample, score, prepare, step. One loop for every online algorithm."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from pydantic import Field, model_validator

from palate import step
from palate.algorithms.protocol import Online, Rests, Sifts
from palate.batches import Learnt, Rollouts, without_shown
from palate.cast import Layout
from palate.cutting import FROZEN
from palate.data.encode import Encoding, PromptRow
from palate.data.source import Data
from palate.engines.engine import Sampling, require_full_support
from palate.models.load import Loading
from palate.randomness import key
from palate.rewards.reward import AnyReward, stages_read
from palate.rewards.shaping import Shaping
from palate.settings import Choice, NotFinite, Stopped
from palate.stages import _greedy, _guard, _invariants, _resampling, _rows, _seats, _state, _tokens
from palate.stages._judging import Judging, Truncation
from palate.stages._lesson import Lesson
from palate.stages._order import Order
from palate.stages._pretraining import Mix, Pretraining
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
    pretraining: Pretraining | None = None
    """Texts learnt beside the answers, so that the policy keeps what it knew; none learns from answers alone."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per optimiser step of a moving average of the policy (InstructGPT 0.992), which is then what is saved."""
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
    microbatch_size: int | None = Field(default=None, ge=1)
    """Answers of one forward and backward pass at most; changes memory, never the result."""
    tokens_per_microbatch: int | None = Field(default=None, ge=1)
    """Real tokens of one forward and backward pass at most; without either limit chosen by model size and memory."""
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
        return self._data_files() + _seats.files(self.model, self.value_model, *judges)

    def _data_files(self) -> list[str]:
        texts = self.pretraining.data.files() if self.pretraining else []
        return self.prompts.files() + texts

    def run(self, here: Workspace) -> None:
        """Sample, score, learn; save the policy."""
        loop = _guard.survive(here, lambda rate: _Loop(self, here, rate))
        with loop.stepper.averaged():
            _seats.keep(here, loop.cast, loop.loaded, "policy", self, self._data_files(), loop.last)


class _Loop:
    """The state of one online stage: who speaks, how far it is, what the algorithm remembers."""

    def __init__(self, stage: Stage, here: Workspace, rate: float) -> None:
        self.stage, self.here = stage, here
        self.algorithm: Online = stage.algorithm  # pyright: ignore[reportAttributeAccessIssue]
        self.loaded = _seats.open_model(stage.model, here, "policy", stage.loading)
        value = _seats.open_model(stage.value_model, here, "value", stage.loading) if stage.value_model else None
        counter = key(here.seed, stage.name)
        most = stage.tokens_per_microbatch
        self.cast = _seats.online_cast(self.loaded, value, stage.layout, self.algorithm, counter, here, most)
        reward, watch = (_seats.at_hand(asked, here) for asked in (stage.reward, stage.watch))
        self.judging = Judging(
            reward or stage.reward,
            watch,
            stage.shaping,
            stage.truncation,
            self.loaded.tokenizer,
            here.world,
            stage.sampling.stop,
        )
        records, _ = _rows.read(stage.prompts, here)
        room = self.loaded.trunk.context - stage.sampling.max_new_tokens
        self.prompts = _rows.prompts(records, self.loaded.tokenizer, stage.encoding, room, here)
        self.engine = _seats.engine(self.cast, self.loaded.tokenizer, stage.sampling, records)
        per_rollout = stage.rollout_batch_size // self.algorithm.group
        self.prompts = _rows.enough(self.prompts, per_rollout)
        lengths = [len(p.tokens) for p in self.prompts]
        self.order = Order(lengths, per_rollout, False, (here.seed, stage.name))
        self.canary = _invariants.canary(self.prompts[0].tokens, stage.sampling.temperature, self.cast.device)
        self.mix = Mix.of(stage.pretraining, self.loaded, stage.name, here)
        trained = self.cast.parameters(self.algorithm.trains)
        average = step.Average(self.cast.parameters(("policy",)), stage.ema) if stage.ema else None
        self.stepper = step.Stepper(trained, stage.optimiser, here.world, here.warn, average)
        self._resume(rate)

    def _resume(self, rate: float) -> None:
        """Where the newest checkpoint left off, in the middle of a rollout's steps if it was written there."""
        self.done, state, tensors = _state.resume(self.here, self.cast, self.stepper)
        self.drawn = int(state.get("drawn", self.done))
        self.memory: dict[str, float] = dict(state.get("memory", self.algorithm.memory()))
        self.last: dict[str, float] = dict(state.get("metrics", {}))
        self.guard = _guard.Guard(self.here, state, rate)
        pending = state.get("pending")
        self.lesson = Lesson.restored(self.algorithm.learns, tensors, pending, self.cast.device) if pending else None
        self.saved = (self.done, self.lesson.position if self.lesson else 0)

    def go(self) -> None:
        """From where a checkpoint left off to the last rollout. A stop leaves a checkpoint behind."""
        with self.here.progress(self.stage.iterations, self.stage.name, done=self.done) as bar:
            try:
                while self.done < self.stage.iterations:
                    seen = self._iteration(self.done + 1)
                    bar.advance(seen)
            except Stopped:
                with self.here.stopper.spared():
                    self._save()
                raise

    def _iteration(self, number: int) -> dict[str, float]:
        try:
            self.lesson = self.lesson or self._collect(number)
        except NotFinite as fault:
            with self.here.stopper.held():
                self.guard.skip(number, fault)
                return self._close(number, {})
        self._learn(self.lesson)
        return self._close(number, self.lesson.metrics())

    def _collect(self, number: int) -> Lesson:
        """A rollout, scored and prepared. Nothing of the loop changes here, so a stop may come at any moment."""
        started = time.perf_counter()
        self.engine.publish(_invariants.publication(self.cast, self.canary, number - 1))
        pad = self.loaded.tokenizer.pad
        answered = _resampling.filled(lambda turn: self._ask(number, turn), self.algorithm, pad, number)
        counter = key(self.here.seed, self.stage.name, number, "prepare")
        scored, prompts = replace(answered.scored, key=counter), answered.prompts
        with _guard.about(scored.rollouts), torch.no_grad():
            experience = self.algorithm.prepare(self.cast, scored)
        _invariants.require_finite(experience)
        if number == 1:
            length = float(scored.rollouts.length_B.float().mean())
            _invariants.require_no_kl_yet(experience.metrics, length, self.loaded.trunk.computes_in)
        sampled = number == 1 or number % self.stage.sample_steps == 0 or number == self.stage.iterations
        return Lesson(
            number,
            without_shown(experience),
            {**experience.metrics, **answered.seen, **_shape(scored.rollouts)},
            self.judging.table(scored, prompts) if sampled else [],
            _tokens.table(experience, scored, prompts, self.loaded.tokenizer) if sampled else [],
            time.perf_counter() - started,
            self.drawn + answered.drawn,
        )

    def _ask(self, number: int, turn: int) -> _resampling.Round:
        """Answers to the next prompts, scored; `turn` counts the batches of prompts drawn for this rollout, from 0."""
        prompts = [self.prompts[i] for i in self.order.batch(self.drawn + turn)]
        rollouts = self._rollouts(prompts, number, turn)
        with _guard.about(rollouts):
            agreed = _invariants.require_agreement(self.cast, rollouts, number - 1)
            scored, heard = self.judging.score(rollouts, prompts, self.memory)
            scored, more = _greedy.with_baseline(scored, prompts, self.algorithm, self.engine, self.judging)
        return _resampling.Round(scored, prompts, {**heard, **agreed, **more})

    def _rollouts(self, prompts: Sequence[PromptRow], number: int, turn: int) -> Rollouts:
        per_prompt, again = range(self.algorithm.group), (turn,) if turn else ()
        about = self.here.seed, self.stage.name, number
        keys = [key(*about, p.key, k, "sample", *again) for p in prompts for k in per_prompt]
        return self.engine.generate([p.tokens for p in prompts], keys, version=number - 1)

    def _learn(self, lesson: Lesson) -> None:
        """The optimiser steps on one rollout that are still to be taken. Between two of them a stop may come."""
        started, number = time.perf_counter(), lesson.number
        rate = self.stage.optimiser.rate(number - 1, self.stage.iterations) * self.guard.rate
        parts = self.algorithm.minibatches
        for epoch in range(lesson.position // parts, self.algorithm.passes):
            counter = (self.here.seed, self.stage.name, number, epoch, "minibatches")
            minibatches = step.minibatches(self._of_pass(lesson.experience, epoch), parts, *counter)
            for minibatch in islice(minibatches, lesson.position % parts, None):
                if not minibatch.size:
                    lesson.add(None)
                    continue
                with self.here.stopper.held():
                    seen = self.guard.step(number, minibatch, lambda batch=minibatch: self._step(batch, lesson, rate))
                    if seen is not None:
                        self.algorithm.after(self.cast, self._steps(number, lesson.position))
                    if seen is not None and lesson.taken == 0:
                        _invariants.require_first_minibatch(seen, self.loaded.trunk.computes_in, number)
                    lesson.add(seen)
        lesson.seconds += time.perf_counter() - started

    def _of_pass(self, experience: Learnt, number: int) -> Learnt:
        return self.algorithm.of_pass(experience, number) if isinstance(self.algorithm, Sifts) else experience

    def _steps(self, number: int, position: int) -> int:
        """Optimiser steps of the stage, the one at `position` of rollout `number` included."""
        return (number - 1) * self.algorithm.passes * self.algorithm.minibatches + position + 1

    def _step(self, minibatch: Learnt, lesson: Lesson, rate: float) -> dict[str, float]:
        rests = isinstance(self.algorithm, Rests) and self.algorithm.rests(minibatch)
        mix = None if rests else self.mix
        most = _seats.microbatch(self.stage, self.cast.budget // FROZEN)

        def loss(part: Learnt) -> Any:
            found = self.algorithm.loss(self.cast, part)
            return found if mix is None else mix.beside(found)

        place = self._steps(lesson.number, lesson.position) - 1
        beside = [] if mix is None else [mix.job(self.cast, place, most)]
        return self.stepper.step(minibatch, loss, most, rate, beside)

    def _close(self, number: int, seen: Mapping[str, float]) -> dict[str, float]:
        """The rollout is behind us: write what was seen, remember, save when it is time."""
        stage, lesson = self.stage, self.lesson
        save_every = stage.save_steps or max(1, stage.iterations // 10)
        with self.here.stopper.held():
            found = {**seen, "episode": float(number * stage.rollout_batch_size)}
            if lesson is not None:
                self.memory = dict(lesson.experience.memory)
                said = lesson.experience.counts()["tokens"]
                found |= {"step_time": lesson.seconds, "tokens_per_second": said / max(lesson.seconds, 1e-9)}
            if self.guard.skipped:
                found["steps_skipped"] = float(self.guard.skipped)
            self.drawn = max(self.drawn + 1, lesson.drawn if lesson is not None else 0)
            self.last, self.done, self.lesson = found, number, None
            if number % stage.logging_steps == 0 or number == stage.iterations:
                self.here.log(number, found)
            if lesson is not None and lesson.samples:
                self.here.sample(number, lesson.samples)
                self.here.tokens(number, lesson.tokens)
            if number % save_every == 0 and number < stage.iterations:
                self._save()
        return found

    def _save(self) -> None:
        """A checkpoint of this very moment, unless the newest one is, or steps are just being skipped."""
        place = (self.done, self.lesson.position if self.lesson else 0)
        if place == self.saved or place == (0, 0) or self.guard.in_a_row:
            return
        state = {"memory": self.memory, "metrics": self.last, "guard": self.guard.state(), "drawn": self.drawn}
        pending = {"pending": self.lesson.state()} if self.lesson else {}
        more = self.lesson.tensors() if self.lesson else {}
        _state.save(self.here, self.done, self.cast, self.algorithm, self.stepper, more, **state, **pending)
        self.saved = place


def _shape(rollouts: Rollouts) -> Mapping[str, float]:
    return {
        "response/length_mean": float(rollouts.length_B.float().mean()),
        "response/eos_rate": float(rollouts.finished_B.float().mean()),
        "val/num_eos_tokens": float(rollouts.finished_B.sum()),
    }
