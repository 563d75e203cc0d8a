"""The token budget of a stage: what it is cut by, what its frozen passes take, and that a resumed run keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import palate.cast
import palate.step
from palate.cast import Cast
from palate.cutting import FROZEN, Microbatch
from palate.settings import Stopped
from palate.step import Stepper
from tests.stages import tiny_runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[Microbatch]:
    """The limit of every cut that an optimiser step makes."""
    found: list[Microbatch] = []
    cut = palate.step.cut

    def watched(batch: Any, most: Microbatch, world: Any) -> Any:
        found.append(most)
        return cut(batch, most, world)

    monkeypatch.setattr(palate.step, "cut", watched)
    return found


def stage(model: Path, folder: Path, kind: str, **sizes: Any) -> dict[str, Any]:
    prompts = str(tiny_runs.write_prompts(folder / "prompts.jsonl"))
    given = tiny_runs.sft(model, prompts) if kind == "sft" else tiny_runs.ppo(model, prompts, total_episodes=16)
    return {**{name: value for name, value in given.items() if name != "microbatch_size"}, **sizes}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, Microbatch(tokens=64)),
        ({"tokens_per_microbatch": 30}, Microbatch(tokens=30)),
        ({"microbatch_size": 3}, Microbatch(rows=3)),
        ({"microbatch_size": 3, "tokens_per_microbatch": 30}, Microbatch(rows=3, tokens=30)),
    ],
)
@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_what_a_stage_asks_for_is_what_it_is_cut_by(
    kind: str,
    sizes: dict[str, int],
    expected: Microbatch,
    model: Path,
    tmp_path: Path,
    limits: list[Microbatch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(palate.cast, "affordable", lambda trunk: 64)
    budgets: set[int] = set()
    chunked = Cast.chunked

    def watched(self: Cast, batch: Any, speak: Any) -> Any:
        budgets.add(self.budget)
        return chunked(self, batch, speak)

    monkeypatch.setattr(Cast, "chunked", watched)
    tiny_runs.run(tmp_path, stage(model, tmp_path, kind, **sizes))
    assert set(limits) == {expected}
    assert budgets == ({FROZEN * (expected.tokens or 64)} if kind == "ppo" else set())


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_run_that_goes_on_elsewhere_is_cut_as_it_began(
    kind: str, model: Path, tmp_path: Path, limits: list[Microbatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with less memory would choose less; the checkpoint says what was chosen, so the end is the same."""
    given = stage(model, tmp_path, kind)
    monkeypatch.setattr(palate.cast, "affordable", lambda trunk: 40)
    whole = tiny_runs.run(tmp_path, given, name="whole")
    step, calls = Stepper.step, iter(range(99))

    def stopped(self: Stepper, *asked: Any) -> dict[str, float]:
        if next(calls) == 3:
            raise Stopped
        return step(self, *asked)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", stopped)
        with pytest.raises(Stopped):
            tiny_runs.run(tmp_path, given, name="halved")
    monkeypatch.setattr(palate.cast, "affordable", lambda trunk: 15)
    halved = tiny_runs.run(tmp_path, given, name="halved")
    assert set(limits) == {Microbatch(tokens=40)}
    ours, theirs = (load_file(run / f"1-{kind}" / "model" / "model.safetensors") for run in (whole, halved))
    assert all(ours[name].equal(theirs[name]) for name in ours)
