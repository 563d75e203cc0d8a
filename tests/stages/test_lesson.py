"""A rollout that is being learnt from: stopped between any two of its steps, it goes on bit for bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.batches import Experience
from palate.checkpoint import CheckpointStore
from palate.models.load import load
from palate.settings import Stopped
from palate.stages._lesson import Lesson
from tests.stages import tiny_runs
from tests.stages.tiny_runs import equal, lines, run, timeless, warnings, weights

CPU = torch.device("cpu")


def lesson(seed: int = 1, dtype: torch.dtype = torch.float32) -> Lesson:
    """Numbers of every kind, among them some that are hard to write down."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((7, 6, 9), generator=generator).to(dtype)
    x[0, 0, :4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    mask = x[1] > 0
    return Lesson(
        number=3,
        experience=Experience(
            tokens_BT=torch.arange(54).view(6, 9),
            real_BT=mask | True,
            action_BT=mask,
            logp_BT=x[0],
            advantage_BT=x[2].t().contiguous().t(),
            value_BT=x[3],
            returns_BT=x[4],
            value_mask_BT=mask,
            temperature=0.1 + 0.2,
            memory={"kl_coef": 1 / 3},
            metrics={"objective/kl": 2 / 3, "returns/var": 1e-300},
        ),
        seen={"objective/scores": 0.1},
        samples=[{"prompt": "é \ud800 \n", "score": 1 / 7}],
        tokens=[{"tokens": [{"logp": -0.0}]}],
        seconds=1.5,
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_there_and_back_through_a_checkpoint_is_the_same_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Through a real file: tensors that are one tensor, a transposed one, nan, −0, subnormal numbers, odd texts."""
    mine = lesson(dtype=dtype)
    for seen in ({"val/ratio": 1.0 + 1 / 3, "lr": 0.1}, None, {"val/ratio": 0.7, "lr": 0.2}):
        mine.add(seen)
    store = CheckpointStore(tmp_path)
    store.save(2, {**mine.tensors(), "model/other": torch.zeros(2)}, {"pending": mine.state()})
    found = store.newest()
    assert found is not None
    back = Lesson.restored(Experience, found[1], found[2]["pending"], CPU)
    for field in fields(Experience):
        ours, theirs = getattr(mine.experience, field.name), getattr(back.experience, field.name)
        if isinstance(ours, Tensor):
            assert ours.dtype == theirs.dtype
            assert bits(ours).equal(bits(theirs)), field.name
        else:
            assert ours == theirs, field.name
    for field in fields(Lesson):
        if field.name != "experience":
            assert getattr(back, field.name) == getattr(mine, field.name), field.name
    for one in (mine, back):
        one.add({"val/ratio": 0.9, "lr": 0.3})
    assert back.metrics() == mine.metrics()


def test_metrics_are_means_over_the_steps_that_were_taken() -> None:
    one = lesson()
    one.add(None)
    assert one.metrics() == {"objective/scores": 0.1}, "nothing was taken, so nothing is known of a first minibatch"
    one.add({"val/ratio": 1.25, "lr": 1.0})
    one.add(None)
    one.add({"val/ratio": 0.75, "lr": 3.0})
    assert one.position == 4
    assert one.metrics() == {
        "objective/scores": 0.1,
        "val/ratio": 1.0,
        "lr": 2.0,
        "first_minibatch/ratio_error": 0.25,
    }


# --- in a real stage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_model(tmp_path_factory.mktemp("models") / "tiny")


def stage(model: Path, prompts: Path, bell: Path, **algorithm: Any) -> dict[str, Any]:
    """Three rollouts, each learnt from in two passes of two minibatches; every prompt holds the cue."""
    cue = load(str(model), "policy").tokenizer.encode("^")[0]
    mine = {"kind": "tests.stages.tricks:PoisonedPPO", "cue": cue, "bell": str(bell), "target_kl": 1.0, **algorithm}
    sizes = {"total_episodes": 24, "microbatch_size": 2, "save_steps": 2, "sample_steps": 1}
    return tiny_runs.ppo(model, str(prompts), algorithm=mine, **sizes)


def write(path: Path) -> Path:
    rows = [{"prompt": f"^ Number {n} is"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROUNDS: dict[str, Callable[[int], int]] = {
    "first micro-batch": lambda step: 2 * step - 1,
    "last micro-batch": lambda step: 2 * step,
}


@pytest.mark.parametrize("where", ROUNDS)
@pytest.mark.parametrize(
    ("step", "old"), [*((s, "recomputed") for s in (1, 2, 3, 4, 5, 12)), (2, "sampled"), (7, "sampled")]
)
def test_a_stage_stopped_between_two_minibatches_ends_bitwise_the_same(
    step: int, where: str, old: str, model: Path, tmp_path: Path
) -> None:
    """The signal comes from inside the loss of step `step` of 12; the step is taken, the stage saves and stops."""
    prompts, bell = write(tmp_path / "prompts.jsonl"), tmp_path / "bell"
    given = stage(model, prompts, bell, old_logprobs=old)
    whole = run(tmp_path, given, name="whole") / "1-ppo"
    bell.write_text(f"{int(signal.SIGTERM)} {ROUNDS[where](step)}")
    with pytest.raises(Stopped):
        run(tmp_path, given, name="stopped")
    done, inside = divmod(step, 4) if step % 4 else (step // 4 - 1, 4)
    assert position(tmp_path / "stopped" / "1-ppo") == (done, inside)
    stopped = run(tmp_path, given, name="stopped") / "1-ppo"
    assert equal(weights(stopped), weights(whole))
    for name in ("metrics.jsonl", "samples.jsonl", "tokens.jsonl"):
        assert timeless(lines(stopped / name)) == timeless(lines(whole / name)), name
    assert not (stopped / "warnings.jsonl").exists() or warnings(stopped) == warnings(whole)


def position(folder: Path) -> tuple[int, int]:
    """(rollouts done, steps taken in the one that is pending) of the newest checkpoint."""
    found = CheckpointStore(folder / "checkpoints").newest()
    assert found is not None
    pending = found[2].get("pending")
    return found[0], pending["position"] if pending else 0


def test_stopped_at_every_step_it_still_ends_the_same(model: Path, tmp_path: Path) -> None:
    """Twelve stops in one stage; each start takes one step."""
    prompts, bell = write(tmp_path / "prompts.jsonl"), tmp_path / "bell"
    given = stage(model, prompts, bell)
    whole = run(tmp_path, given, name="whole") / "1-ppo"
    stops = 0
    while not (tmp_path / "halting" / "1-ppo" / "DONE").exists():
        bell.write_text(f"{int(signal.SIGINT)} 2")
        try:
            run(tmp_path, given, name="halting")
        except Stopped:
            stops += 1
    assert stops == 12
    halting = tmp_path / "halting" / "1-ppo"
    assert equal(weights(halting), weights(whole))
    assert timeless(lines(halting / "metrics.jsonl")) == timeless(lines(whole / "metrics.jsonl"))
