"""The one optimiser step: it moves weights by finite numbers only, and cuts finer when memory runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from palate.batches import Loss, Mean, Rows, Term
from palate.cutting import Microbatch
from palate.parallel import World
from palate.settings import NotFinite, PalateError
from palate.step import Optimiser, Stepper


@dataclass(frozen=True)
class Points(Rows):
    """Rows of a least-squares problem."""

    x_BD: Tensor
    y_B: Tensor


def points(rows: int = 12, spoil: tuple[int, float] | None = None) -> Points:
    generator = torch.Generator().manual_seed(4)
    x_BD, y_B = torch.randn(rows, 5, generator=generator), torch.randn(rows, generator=generator)
    if spoil is not None:
        y_B[spoil[0]] = spoil[1]
    return Points(x_BD, y_B)


class Line:
    """A linear model under a stepper; `before` is called with each micro-batch, `after` with its error."""

    def __init__(self, **settings: Any) -> None:
        self.weight = nn.Parameter(torch.arange(5.0) / 5)
        self.bias = nn.Parameter(torch.zeros(()))
        self.before: Callable[[Points], None] = lambda part: None
        self.after: Callable[[Points, Tensor], None] = lambda part, error: None
        self.told: list[str] = []
        named = {"weight": self.weight, "bias": self.bias}
        self.stepper = Stepper(named, Optimiser(**settings), World(), self.told.append)

    def loss(self, part: Points) -> Loss:
        self.before(part)
        error_B = part.x_BD @ self.weight + self.bias - part.y_B
        self.after(part, error_B)
        seen = {"error": Mean(error_B.abs().sum().detach(), float(part.size))}
        return Loss({"square": Term(error_B.square().sum(), "rows")}, seen)

    def step(self, batch: Points, microbatch: int = 12) -> dict[str, float]:
        return self.stepper.step(batch, self.loss, Microbatch(rows=microbatch), 1e-2)

    def everything(self) -> dict[str, Tensor]:
        """Weights and Adam's state, as copies."""
        mine = {"weight": self.weight.detach(), "bias": self.bias.detach(), **self.stepper.state()}
        return {name: x.clone() for name, x in mine.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("microbatch", [12, 5, 1])
@pytest.mark.parametrize("steps", [0, 2])
def test_numbers_that_are_not_finite_move_nothing(value: float, microbatch: int, steps: int) -> None:
    line = Line(max_grad_norm=1.0)
    for _ in range(steps):
        line.step(points())
    before = line.everything()
    with pytest.raises(NotFinite, match="square, gradient norm: not a finite number; no weight was moved"):
        line.step(points(spoil=(7, value)), microbatch)
    assert same(line.everything(), before)
    line.step(points())
    twin = Line(max_grad_norm=1.0)
    for _ in range(steps + 1):
        twin.step(points())
    assert same(line.everything(), twin.everything()), "as if the skipped step had never been asked for"


def test_a_gradient_that_is_not_finite_under_a_finite_loss_moves_nothing() -> None:
    """√0 is 0 and its slope is infinite."""
    line = Line()
    before = line.everything()

    def root(part: Points) -> Loss:
        return Loss({"root": Term((line.weight[0] * part.x_BD[:, 0]).abs().sqrt().sum(), "rows")}, {})

    with pytest.raises(NotFinite, match=r"^gradient norm: not a finite number"):
        line.stepper.step(points(), root, Microbatch(rows=4), 1e-2)
    assert same(line.everything(), before)


def test_a_loss_that_raises_halfway_leaves_no_gradient_for_the_next_step() -> None:
    line, twin, calls = Line(), Line(), iter(range(9))

    def raise_at_second(part: Points) -> None:
        if next(calls) == 1:
            raise NotFinite("a value is nan")

    line.before = raise_at_second
    with pytest.raises(NotFinite, match="a value is nan"):
        line.step(points(), 4)
    line.step(points(), 4)
    twin.step(points(), 4)
    assert same(line.everything(), twin.everything())


# --- memory -----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, Callable[[], BaseException]] = {
    "torch, on the CPU": lambda: RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "torch, on a GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "Python": MemoryError,
}


def at_most(rows: int, fault: Callable[[], BaseException]) -> Callable[[Points], None]:
    def check(part: Points) -> None:
        if part.size > rows:
            raise fault()

    return check


@pytest.mark.parametrize("name", FAULTS)
def test_memory_that_runs_out_halves_the_micro_batch_and_keeps_the_gradient(name: str) -> None:
    line, plenty = Line(), Line()
    line.before = at_most(4, FAULTS[name])
    found, expected = (x.stepper.gradient(points(), x.loss, Microbatch(rows=12)) for x in (line, plenty))
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, rtol=1e-6, atol=1e-6)
    assert line.stepper.most == Microbatch(rows=3)
    [told] = line.told
    assert "micro-batch of 12 rows. From now on it has 3 rows; the gradient is the same" in told
    assert "Set microbatch_size: 3 to begin" in told
    assert line.step(points()).keys() == plenty.step(points()).keys()
    assert len(line.told) == 1, "told once"


@dataclass(frozen=True)
class Words(Points):
    """Points that come as so many tokens."""

    tokens_BT: Tensor
    real_BT: Tensor


def words(*lengths: int) -> Words:
    real_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Words(**vars(points(len(lengths))), tokens_BT=real_BT.long() * 5, real_BT=real_BT)


def test_a_budget_of_tokens_is_halved_too_and_remembered() -> None:
    """A long row that goes alone is no reason to give up; each try halves the largest part of several rows."""
    line, plenty, taken = Line(), Line(), list[tuple[int, int]]()
    batch = words(9, 9, 9, 9, 40, 6, 6, 6)

    def check(part: Any) -> None:
        if part.size > 1 and int(part.real_BT.sum()) > 20:
            raise MemoryError
        taken.append((part.size, int(part.real_BT.sum())))

    line.before = check
    found, expected = (x.stepper.gradient(batch, x.loss, Microbatch(tokens=1000)) for x in (line, plenty))
    for parameter, gradient in expected.items():
        assert torch.allclose(found[parameter], gradient, rtol=1e-6, atol=1e-6)
    most = line.stepper.most
    assert most.rows is None
    assert most.tokens is not None
    assert 18 <= most.tokens < 27
    [told] = line.told
    assert f"a micro-batch of 1,000 tokens. From now on it has {most.tokens} tokens" in told
    assert f"Set tokens_per_microbatch: {most.tokens} to begin" in told
    taken.clear()
    line.stepper.gradient(batch, line.loss, Microbatch(tokens=1000))
    assert len(line.told) == 1, "told once"
    assert sum(size for size, _ in taken) == 8
    assert all(size == 1 or count <= most.tokens for size, count in taken), "remembered"


def test_both_limits_are_kept_when_memory_runs_out() -> None:
    line = Line()
    line.before = at_most(2, MemoryError)
    line.stepper.gradient(words(*[5] * 12), line.loss, Microbatch(rows=6, tokens=1000))
    assert line.stepper.most == Microbatch(tokens=7)  # 6 rows hold 30, 3 rows 15


def test_the_metrics_of_the_failed_try_are_not_counted() -> None:
    line, plenty, sizes = Line(), Line(), list[int]()
    line.before = lambda part: sizes.append(part.size)
    calls = iter(range(99))

    def late(part: Points, error_B: Tensor) -> None:
        if part.size == 6 and next(calls) == 1:
            raise MemoryError

    line.after = late
    assert line.step(points(), 6) == pytest.approx(plenty.step(points(), 6), rel=1e-6)
    assert sizes == [6, 6, 3, 3, 3, 3]
    line.step(points(), 6)
    assert sizes[6:] == [3, 3, 3, 3], "remembered"
    line.step(points(), 2)
    assert sizes[10:] == [2] * 6, "and never a reason to take more than was asked for"


def test_nothing_of_the_failed_try_is_held_when_the_next_begins() -> None:
    """Activations hang on the loss, the exception on its frames: a reference left would keep a whole try in memory."""
    line = Line()
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def watch(part: Points) -> None:
        alive.append(sum(ref() is not None for ref in held))

    def keep_watch(part: Points, error_B: Tensor) -> None:
        held.append(weakref.ref(error_B))
        if part.size == 12 or len(held) == 3:
            raise MemoryError

    line.before, line.after = watch, keep_watch
    line.step(points())
    assert line.stepper.most == Microbatch(rows=3)
    first_of_each_try = [alive[0], alive[1], alive[3]]  # tries: one part of 12; two of 6; four of 3
    assert first_of_each_try == [0, 0, 0]


def test_one_row_that_does_not_fit_is_a_fault_with_a_next_move() -> None:
    line = Line()
    before = line.everything()
    line.before = at_most(0, MemoryError)
    with pytest.raises(PalateError, match=r"memory: one row.*does not fit.*checkpoint_activations") as caught:
        line.step(points())
    assert caught.value.exit_code == 2
    assert same(line.everything(), before)


def test_another_fault_is_not_taken_for_a_lack_of_memory() -> None:
    line = Line()
    line.before = at_most(4, lambda: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        line.step(points())
    assert line.stepper.most == Microbatch()


@pytest.mark.slow
def test_a_real_stage_whose_memory_runs_out(tmp_path: Path) -> None:
    """The kernel refuses memory to a process of its own; its weights are those of a run with the smaller size."""
    fixed = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.stages.short_of_memory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **fixed})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    room = (found["32"]["grew"] + found["16"]["grew"]) / 2
    assert found["16"]["grew"] < 0.7 * found["32"]["grew"]
    assert found["stopped"]["fault"].startswith("Stopped")
    assert found["stopped"]["grew"] <= room, "the failed try was gone before the next began"
    assert found["gone on"] == {"grew": found["gone on"]["grew"], "fault": ""}
    said = (tmp_path / "short" / "1-sft" / "warnings.jsonl").read_text().splitlines()
    assert len(said) == 1, "once, and not again after a stop: the size is in the checkpoint"
    assert "micro-batch of 32 rows. From now on it has 16 rows" in said[0]
    ours, theirs = (load_file(tmp_path / n / "1-sft" / "model" / "model.safetensors") for n in ("short", "free-16"))
    assert same(ours, theirs)
    assert found["greedy"]["fault"].startswith("PalateError: memory: one row with its gradient does not fit")
