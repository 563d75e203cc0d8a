"""Training on data at rest: demonstrations, rankings. One loop for every offline algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from palate import step
from palate.algorithms.protocol import Offline, Rereads
from palate.batches import Rows
from palate.cast import Layout
from palate.cutting import FROZEN, cut
from palate.data.encode import Encoding
from palate.data.source import Data
from palate.models.load import Loading
from palate.models.make import Make
from palate.randomness import key
from palate.records import Record
from palate.settings import Choice, PalateError, Stopped
from palate.stages import _guard, _reference, _rows, _seats, _state
from palate.stages._normalise import Normalise, Scale, normalise
from palate.stages._order import Order
from palate.stages._seats import AnyAlgorithm
from palate.workspace import Workspace


class Stage(Choice):
    """Train a model on data at rest (demonstrations or rankings)."""

    kind: str = "train"
    """Training on data at rest."""
    name: str = "train"
    """The stage's name; later stages read its model as `stage:NAME`."""
    model: str | Make
    """Where to start: a folder, a hub id, `stage:NAME`, or the settings of a model to make from nothing."""
    data: Data
    """What to learn from: a file, folder, hub id or `world:NAME/shape`, or a mapping with more settings."""
    algorithm: AnyAlgorithm
    """What to make of it: a mapping with `kind` and its settings."""
    loading: Loading = Loading()
    """How the model comes into memory."""
    layout: Layout = Layout()
    """Which weights train: all of them, or adapters."""
    optimiser: step.Optimiser = step.Optimiser()
    """How weights move."""
    encoding: Encoding = Encoding()
    """How records become tokens."""
    num_train_epochs: int = Field(default=1, ge=1)
    """Passes over the data."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimiser steps, whatever the epochs say."""
    batch_size: int = Field(default=32, ge=1)
    """Rows (demonstrations, or prompts with their ranked answers) of one optimiser step."""
    microbatch_size: int | None = Field(default=None, ge=1)
    """Rows of one forward and backward pass at most; changes memory, never the result."""
    tokens_per_microbatch: int | None = Field(default=None, ge=1)
    """Real tokens of one forward and backward pass at most; without either limit chosen by model size and memory."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities of all rows once, before training, and keep them on disk; the
    reference then takes no memory."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per optimiser step of a moving average of the model, which is then what is saved."""
    group_by_length: bool = False
    """Draw rows of similar length into one batch: less padding, slightly less random order."""
    normalise: Normalise | None = None
    """Give the reward head a fixed scale before and after training (details 21 and 22)."""
    eval_steps: int = Field(default=0, ge=0)
    """Measure the held-out share of the data every so many steps; 0: at the end only."""
    logging_steps: int = Field(default=10, ge=1)
    """Write metrics every so many steps."""
    save_steps: int = Field(default=0, ge=0)
    """Write a checkpoint every so many steps; 0: about every tenth of the stage."""

    def references(self) -> list[str]:
        """Earlier stages this one reads."""
        return _seats.references(self.model, self.normalise.model if self.normalise else None)

    def files(self) -> list[str]:
        """Files whose content counts for the cache."""
        scale = self.normalise or Normalise()
        data = [file for source in (self.data, scale.data) if source for file in source.files()]
        return data + _seats.files(self.model, scale.model)

    def run(self, here: Workspace) -> None:
        """Train, measure, save the model."""
        read = _rows.read(self.data, here)
        training = _guard.survive(here, lambda rate: _Training(self, here, read, rate))
        with training.stepper.averaged():
            self._keep(training)

    def _keep(self, training: _Training) -> None:
        if self.normalise is not None and self.normalise.after:
            gain, bias = normalise(self.normalise, training.scale)
            training.last |= {"reward/gain": gain, "reward/bias": bias}
        role = training.algorithm.trains[0]
        _seats.keep(training.here, training.cast, training.loaded, role, self, self.data.files(), training.last)


class _Training:
    """The loop over one stage's data."""

    def __init__(
        self, stage: Stage, here: Workspace, read: tuple[Sequence[Record], Sequence[Record]], rate: float
    ) -> None:
        self.stage, self.here = stage, here
        self.algorithm: Offline = stage.algorithm  # pyright: ignore[reportAttributeAccessIssue]
        role, train = self.algorithm.trains[0], read[0]
        self.loaded = _seats.open_model(stage.model, here, role, stage.loading, texts=_rows.texts(train))
        encoder = (self.algorithm.reads, self.loaded.tokenizer, stage.encoding, self.loaded.trunk.context, here)
        rows, held = (_rows.encode(records, *encoder) for records in read)
        self.rows: Sequence[_rows.Row] = _rows.surveyed(rows, self.algorithm.survey, here)
        self.held: Sequence[_rows.Row] = _rows.held_like(held, rows, self.rows, self.algorithm.survey)
        if len(self.rows) < stage.batch_size:
            raise PalateError(
                f"{stage.name}: {len(self.rows)} rows do not fill one batch of {stage.batch_size}. "
                "Lower batch_size or bring more data."
            )
        counter = key(here.seed, stage.name)
        known = ("reference",) if stage.precompute_reference else ()
        most = stage.tokens_per_microbatch
        self.cast = _seats.offline_cast(self.loaded, stage.layout, self.algorithm, counter, here, known, most)
        # before any forward pass: after one without gradient, zero2 leaves whole copies in the place of sharded weights
        trained = self.cast.parameters(self.algorithm.trains)
        if known:
            self._precompute(role)
        lengths = [_rows.length(row) for row in self.rows]
        self.order = Order(lengths, stage.batch_size, stage.group_by_length, (here.seed, stage.name))
        self.steps = stage.max_steps or self.order.per_epoch * stage.num_train_epochs
        average = step.Average(self.cast.parameters((role,)), stage.ema) if stage.ema else None
        self.stepper = step.Stepper(trained, stage.optimiser, here.world, here.warn, average)
        start = stage.model if isinstance(stage.model, str) else None
        self.scale = Scale(self.cast, self.loaded, start, train, stage.encoding, stage.loading, here)
        self._resume(rate)
        if stage.normalise is not None and stage.normalise.before and self.done == 0:
            normalise(stage.normalise, self.scale)
            if average is not None:
                average.begin()

    def _precompute(self, role: str) -> None:
        """Give every row the reference's log-probabilities, while the weights are still the start's."""
        if "reference" not in self.algorithm.needs or "reference" in self.algorithm.moves:
            raise PalateError("precompute_reference: this algorithm has no fixed reference. Leave the setting out.")
        if isinstance(self.algorithm, Rereads) and self.algorithm.rereads:
            raise PalateError(f"precompute_reference: {self.algorithm.rereads}")
        rows = [*self.rows, *self.held]
        found = _reference.known(rows, self.cast, role, self.loaded.tokenizer.pad, self.here)
        self.rows, self.held = found[: len(self.rows)], found[len(self.rows) :]

    def _resume(self, rate: float) -> None:
        self.done, state, _ = _state.resume(self.here, self.cast, self.stepper)
        self.last: dict[str, float] = dict(state.get("metrics", {}))
        self.tokens = float(state.get("tokens", 0.0))
        self.guard = _guard.Guard(self.here, state, rate)
        self.saved = self.done

    def go(self) -> None:
        """From where a checkpoint left off to the last step. A stop leaves a checkpoint behind."""
        with self.here.progress(self.steps, self.stage.name, done=self.done) as bar:
            try:
                while self.done < self.steps:
                    bar.advance(self._step(self.done + 1))
            except Stopped:
                with self.here.stopper.spared():
                    self._save()
                raise

    def _step(self, number: int) -> dict[str, float]:
        """One optimiser step with everything that belongs to it; a stop comes before or after it."""
        stage = self.stage
        batch = self._batch([self.rows[i] for i in self.order.batch(number - 1)])
        save_every = stage.save_steps or max(1, self.steps // 10)
        with self.here.stopper.held():
            seen = self.guard.step(number, batch, lambda: self._learn(batch, number)) or {}
            seen |= {"epoch": number / self.order.per_epoch, "num_tokens": self.tokens}
            if self.guard.skipped:
                seen["steps_skipped"] = float(self.guard.skipped)
            self.done = number
            if number % stage.logging_steps == 0 or number == self.steps:
                self.last = {**seen, **self._held(number)}
                self.here.log(number, self.last)
            if number % save_every == 0 and number < self.steps:
                self._save()
        return seen

    def _learn(self, batch: Rows, number: int) -> dict[str, float]:
        with torch.no_grad():
            prepared = self.algorithm.prepare(self.cast, batch)
        rate = self.stage.optimiser.rate(number - 1, self.steps) * self.guard.rate

        def loss(part: Any) -> Any:
            return self.algorithm.loss(self.cast, part)

        most = _seats.microbatch(self.stage, self.cast.budget // FROZEN)
        seen = self.stepper.step(prepared, loss, most, rate)
        self.algorithm.after(self.cast, number)
        self.tokens += prepared.counts()["tokens"]
        return seen

    def _save(self) -> None:
        """A checkpoint of this very moment, unless the newest one is, or steps are just being skipped."""
        if self.done == self.saved or self.guard.in_a_row:
            return
        state = {"metrics": self.last, "tokens": self.tokens, "guard": self.guard.state()}
        _state.save(self.here, self.done, self.cast, self.algorithm, self.stepper, {}, **state)
        self.saved = self.done

    def _held(self, number: int) -> dict[str, float]:
        every = self.stage.eval_steps
        if not self.held or not (number == self.steps or (every and number % every == 0)):
            return {}
        size = self.stage.batch_size
        starts = range(0, max(1, len(self.held) - 1), size)  # a last row alone goes with those before it
        ends = [*starts[1:], len(self.held)]
        batches = [self._batch(self.held[i:j]) for i, j in zip(starts, ends, strict=True)]
        with torch.no_grad():
            prepared = [self.algorithm.prepare(self.cast, batch) for batch in batches]
        most = _seats.microbatch(self.stage, self.cast.budget // FROZEN)
        parts = [part.trimmed() for batch in prepared for part in cut(batch, most, self.here.world)]
        found = step.evaluate(parts, lambda part: self.algorithm.loss(self.cast, part), self.here.world)
        return {f"eval/{name}": value for name, value in found.items()}

    def _batch(self, rows: Sequence[_rows.Row]) -> Rows:
        return _rows.batch(rows, self.loaded.tokenizer.pad).to(self.cast.device)
