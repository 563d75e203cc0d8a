"""A stage that learns from data at rest, set up but not run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from palate.algorithms import protocol
from palate.batches import Comparisons, Pairs, Rows, Tokens
from palate.cast import Cast
from palate.check import clock, examples, memory, rows
from palate.check.arithmetic import Offline, typical
from palate.check.found import Counts, Example, Memory, Seen, Time
from palate.check.gathered import Gathered
from palate.check.rehearsal import Rehearsal
from palate.check.update import Update
from palate.cutting import Microbatch, affordable, cut, lengths
from palate.data.encode import RankedRow
from palate.models.load import Loaded
from palate.models.tokenizer import Tokenizer
from palate.randomness import key
from palate.settings import PalateError
from palate.stages import _rows, _seats
from palate.stages._order import Order
from palate.stages.train import Stage
from palate.step import Stepper
from palate.workspace import Workspace

_SHOWN = 2


@dataclass(frozen=True)
class _Setup:
    """A stage with its data read and its model open."""

    stage: Stage
    here: Workspace
    loaded: Loaded
    rows: Sequence[rows.Row]
    held: int
    order: Order
    numbers: Offline
    most: Microbatch

    @property
    def algorithm(self) -> protocol.Offline:
        """The stage's algorithm, as what it must be here."""
        return self.stage.algorithm  # pyright: ignore[reportReturnType]

    def batch(self, number: int) -> Rows:
        """The rows of one optimiser step."""
        return _rows.batch([self.rows[i] for i in self.order.batch(number)], self.loaded.tokenizer.pad)


def look(stage: Stage, index: int, rehearsal: Rehearsal, measure: bool) -> Seen:
    """What the stage would do; its model's stand-in is left for later stages."""
    gathered, here = Gathered(stage.name), rehearsal.workspace(index)
    setup, seconds = clock.timed(lambda: _set_up(stage, here, rehearsal, gathered))
    gathered.warn(*rehearsal.warnings(here))
    if setup is None:
        return gathered.onto(Seen())
    shown, batch = _examples(setup)
    seen = Seen(
        describe(setup.loaded, stage.model, rehearsal.is_trained(stage.model)),
        setup.numbers.batches(),
        shown,
        batch,
        _rules(setup),
    )
    cost = None if gathered.faults else gathered.ask(_cost, setup, seconds, measure)
    if cost is not None:
        seen = replace(seen, memory=cost[0], time=cost[1])
    return gathered.onto(seen)


def first_update(stage: Stage, index: int, rehearsal: Rehearsal) -> Update:
    """The stage's first optimiser step, as far as its gradient. Raises PalateError for its first fault."""
    gathered = Gathered(stage.name)
    setup = _set_up(stage, rehearsal.workspace(index), rehearsal, gathered)
    if setup is None or gathered.faults:
        raise PalateError(gathered.faults[0])
    algorithm, counter = setup.algorithm, key(setup.here.seed, stage.name)
    cast = _seats.offline_cast(setup.loaded, stage.layout, algorithm, counter, setup.here)
    batch = _prepared(cast, algorithm, setup.batch(0))
    return Update(
        stage.name, cast, algorithm.trains, batch, lambda part: algorithm.loss(cast, part), setup.most, stage.optimiser
    )


def describe(loaded: Loaded, asked: object, trained: bool = True) -> str:
    """A model in a line, by the name it was asked for."""
    trunk = loaded.trunk
    count = sum(p.numel() for p in trunk.parameters())
    name = asked if isinstance(asked, str) else loaded.source
    form = str(trunk.dtype).removeprefix("torch.")
    if trunk.compute is not None:
        form += f", computing in {str(trunk.compute).removeprefix('torch.')}"
    return (
        f"{name}{'' if trained else ' (not trained yet)'}: {trunk.family}, {count:,} parameters in {form}, "
        f"{loaded.tokenizer.size:,} ids, context {trunk.context:,}"
    )


def _set_up(stage: Stage, here: Workspace, rehearsal: Rehearsal, gathered: Gathered) -> _Setup | None:
    algorithm: protocol.Offline = stage.algorithm  # pyright: ignore[reportAssignmentType]
    role = algorithm.trains[0]
    read = gathered.ask(_rows.read, stage.data, here)
    if read is None and not isinstance(stage.model, str):
        return None
    records, held = read or ([], [])
    texts = _rows.texts(records)
    loaded = gathered.ask(rehearsal.open, stage.model, here, role, stage.loading, texts)
    if loaded is None:
        return None
    start = stage.model if isinstance(stage.model, str) else None
    plain = stage.loading.end_token is None and not stage.loading.make_causal
    rehearsal.leave(here, str(here.resolve(start)) if start else None, loaded, role == "reward", plain)
    if read is None:
        return None
    context = loaded.trunk.context
    encoder = (algorithm.reads, loaded.tokenizer, stage.encoding, context, here)
    found = gathered.ask(_rows.encode, records, *encoder)
    kept = gathered.ask(_rows.encode, held, *encoder)
    if found is None or kept is None:
        return None
    found = gathered.ask(_rows.surveyed, found, algorithm.survey, here) or found
    most = _seats.microbatch(stage, affordable(loaded.trunk))
    numbers = _numbers(stage, found, len(kept), most)
    _judge(stage, found, loaded.tokenizer, context, numbers, gathered)
    lengths = [_rows.length(row) for row in found]
    batch = min(stage.batch_size, len(found))  # one batch can be shown even where it would not be filled
    order = Order(lengths, batch, stage.group_by_length, (here.seed, stage.name))
    return _Setup(stage, here, loaded, found, len(kept), order, numbers, most)


def _numbers(stage: Stage, found: Sequence[rows.Row], held: int, most: Microbatch) -> Offline:
    mean = sum(len(answer.tokens) for answer in rows.answers(found)) / len(found)
    return Offline(
        rows=len(found),
        held_out=held,
        batch=stage.batch_size,
        microbatch=typical(most, stage.batch_size, mean),
        epochs=stage.num_train_epochs,
        most_steps=stage.max_steps,
        noun="ranking" if isinstance(found[0], RankedRow) else "row",
        tokens=most.tokens,
    )


def _judge(
    stage: Stage, found: Sequence[rows.Row], tokenizer: Tokenizer, context: int, numbers: Offline, gathered: Gathered
) -> None:
    """Faults and warnings about rows and batches."""
    speaks = "policy" in stage.algorithm.trains  # pyright: ignore[reportAttributeAccessIssue]
    for text in rows.faults(found, tokenizer):
        gathered.fault(text)
    gathered.warn(*rows.warnings(found, tokenizer, stage.encoding, context, speaks))
    if numbers.rows < numbers.batch:
        gathered.fault(
            f"{numbers.rows:,} rows do not fill one batch of {numbers.batch:,}. Lower batch_size or bring more data."
        )
    elif numbers.left_over > rows.MANY_LEFT_OUT * numbers.rows:
        gathered.warn(
            f"batch_size: {numbers.left_over:,} of {numbers.rows:,} rows fill no batch and are left out of each epoch. "
            "Take a batch_size that divides them better."
        )
    if stage.microbatch_size is not None and stage.microbatch_size > stage.batch_size:
        gathered.warn(f"microbatch_size: {stage.microbatch_size} is larger than batch_size {stage.batch_size}.")


def _examples(setup: _Setup) -> tuple[tuple[Example, ...], Counts]:
    """The first rows of the first batch, and the counts of that batch."""
    tokenizer, batch = setup.loaded.tokenizer, setup.batch(0)
    flat = batch.answers() if isinstance(batch, Comparisons | Pairs) else batch
    assert isinstance(flat, Tokens)
    width = flat.tokens_BT.shape[1]
    found: list[Example] = []
    for i in setup.order.batch(0)[:_SHOWN]:
        row, title = setup.rows[i], f"row {i + 1:,} of {len(setup.rows):,}"
        if isinstance(row, RankedRow):
            found += examples.ranked_row(title, row, tokenizer, width) if len(found) < _SHOWN else []
        else:
            found += examples.answer_rows(title, row, tokenizer, width) if len(found) < _SHOWN else []
    return tuple(found), examples.of_batch(flat, tokenizer)


def _rules(setup: _Setup) -> tuple[str, ...]:
    flat = rows.answers(setup.rows)
    trained, every = sum(sum(r.trained) for r in flat), sum(len(r.tokens) for r in flat)
    longest = max(len(r.tokens) for r in flat)
    said = f"rows have {every / len(flat):,.1f} tokens on average, {longest:,} at most"
    if "reward" in setup.algorithm.trains:
        return (said, "a ranked answer is read at its last real token; its own tokens are marked, its prompt is not")
    return (f"{trained:,} of {every:,} tokens are trained ({trained / every:.0%})", said)


def _cost(setup: _Setup, seconds: float, measure: bool) -> tuple[Memory, Time | None]:
    stage, algorithm = setup.stage, setup.algorithm
    cast = _seats.offline_cast(setup.loaded, stage.layout, algorithm, key(setup.here.seed, stage.name), setup.here)
    parameters, held = memory.of_cast(cast, algorithm.trains)
    held |= memory.of_average(cast, algorithm.trains[0], stage.ema)
    if not measure:
        return memory.memory(parameters, held, "counted; activations were not measured (--quick)"), None
    typical, longest = _two_batches(setup)
    parts = cut(_prepared(cast, algorithm, longest), setup.most, setup.here.world)
    widest = max(parts, key=lambda part: sum(lengths(part)))
    weights = cast.parameters(algorithm.trains).values()
    held["activations"] = memory.activations(lambda: algorithm.loss(cast, widest.trimmed()), _weights(cast, weights))
    batch = _prepared(cast, algorithm, typical)
    stepper = Stepper(cast.parameters(algorithm.trains), stage.optimiser, setup.here.world)
    step = clock.of_step(stepper, batch, lambda part: algorithm.loss(cast, part), setup.most, stage.batch_size)
    basis = "weights counted; activations of the longest micro-batch of the first epoch, measured"
    spent = {"setting up": seconds, "optimiser steps": step * setup.numbers.steps}
    told = f"one optimiser step on a batch of median length took {step:.3g} s, × {setup.numbers.steps:,}"
    return memory.memory(parameters, held, basis), clock.total(spent, told)


def _weights(cast: Cast, trained: Any) -> list[torch.Tensor]:
    return [*trained, *(p for seat in cast.roles.values() for p in seat.trunk.parameters())]


def _prepared(cast: Cast, algorithm: protocol.Offline, batch: Rows) -> Any:
    with torch.no_grad():
        return algorithm.prepare(cast, batch.to(cast.device))


def _two_batches(setup: _Setup) -> tuple[Rows, Rows]:
    """The batches of median and of greatest padded length in the first epoch."""

    def columns(number: int) -> int:
        return max(setup.order.lengths[i] for i in setup.order.batch(number))

    numbers = sorted(range(setup.order.per_epoch), key=columns)
    return setup.batch(numbers[len(numbers) // 2]), setup.batch(numbers[-1])
