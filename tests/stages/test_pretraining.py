"""The pretraining mix: both published forms against golden numbers, which rows are drawn, what it does to a policy."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palate import losses
from palate.algorithms import ppo, sft
from palate.batches import Examples, Loss, Rows, Term, Tokens
from palate.cutting import Microbatch
from palate.data.encode import TokenRow
from palate.parallel import World
from palate.settings import PalateError, Stopped, build
from palate.stages._pretraining import Mix, Pretraining
from palate.step import Average, Job, Optimiser, Stepper
from tests.laws import test_microbatch_law as micro
from tests.stages import tiny_runs as tiny

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text())["sft_ptx_cross_entropy"]


class Scripted:
    """A cast of one policy whose logits are the golden ones."""

    def __init__(self) -> None:
        self.logits_BTV = nn.Parameter(torch.tensor(GOLDEN["logits"], dtype=torch.float64))

    def logp(self, role: str, batch: Tokens) -> Tensor:
        """Rows are named by their first token, so that any cut finds its logits."""
        rows = [0 if int(first) == GOLDEN["input_ids"][0][0] else 1 for first in batch.tokens_BT[:, 0]]
        return losses.token_logp(self.logits_BTV[rows], batch.tokens_BT)


def golden_texts() -> Examples:
    tokens = torch.tensor(GOLDEN["input_ids"])
    action = torch.tensor(GOLDEN["loss_mask_on_target_tokens"]).bool()
    return Examples(tokens, torch.ones_like(action), action)


def mix_of(coef: float, mode: str, rows: int = 2, batch: int = 2) -> Mix:
    settings = Pretraining(data="texts.jsonl", coef=coef, mode=mode, batch_size=batch)  # pyright: ignore
    every = [TokenRow([1, 2, 3], [False, True, True]) for _ in range(rows)]
    return Mix(settings, every, 0, (1, "stage", "pretraining"))


def total_of(mix: Mix, cast: Scripted, microbatch: int, policy: float = 0.37, value: float = 0.0) -> tuple[float, Any]:
    """The whole objective as the step divides and weighs it, and the gradient of the texts' logits."""
    answers = Rows.select(golden_texts(), torch.tensor([0]))
    one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def objective(part: Rows) -> Loss:
        terms = {
            "loss/policy_avg": Term(policy * one * 2.0, "tokens"),  # two answer tokens
            "loss/value_avg": Term(value * one * 2.0, "values", 0.1),
        }
        return mix.beside(Loss(terms, {}))

    class Answers(Examples):
        def counts(self) -> dict[str, float]:
            return {**super().counts(), "values": 2.0}

    batch = Answers(**vars(answers))
    texts = Job(golden_texts(), lambda part: mix.loss(cast, part), Microbatch(rows=microbatch))  # type: ignore[arg-type]
    stepper = Stepper({"one": one, "logits": cast.logits_BTV}, Optimiser(), World())
    caught: dict[str, Tensor] = {}
    stepper.adam.register_step_pre_hook(
        lambda *_: caught.update(one=one.grad.clone(), ptx=cast.logits_BTV.grad.clone())
    )
    seen = stepper.step(batch, objective, Microbatch(rows=1), 0.0, [texts])
    assert seen["loss/policy_avg"] == pytest.approx(policy, abs=1e-12)
    # The first job is linear in `one`, so its weighted total is its gradient there.
    return float(caught["one"]) + mix.settings.coef * seen["loss/pretraining_avg"], caught["ptx"]


@pytest.mark.parametrize(("mode", "name"), [("add", "ppo_ptx_instructgpt_total"), ("convex", "ppo_ptx_coati_convex")])
@pytest.mark.parametrize("microbatch", [1, 2])
def test_both_published_mixes_through_the_step(mode: str, name: str, microbatch: int) -> None:
    case = GOLDEN["expected"][name]
    coef, cast = case.get("gamma", case.get("ptx_coef")), Scripted()
    total, gradient = total_of(mix_of(coef, mode), cast, microbatch)
    assert total == pytest.approx(case["value"], abs=1e-9)
    for wrong in GOLDEN["must_not"].values():
        assert abs(total - (coef * wrong + (0.37 if mode == "add" else (1 - coef) * 0.37))) > 1e-3
    texts = golden_texts()
    logits = cast.logits_BTV.detach().clone().requires_grad_()
    logp_BT = losses.token_logp(logits, texts.tokens_BT)
    (coef * -logp_BT[texts.action_BT].sum() / 5).backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-12)


def test_the_convex_mix_leaves_the_value_loss_as_it_is() -> None:
    without, _ = total_of(mix_of(0.9, "convex"), Scripted(), 2)
    beside, _ = total_of(mix_of(0.9, "convex"), Scripted(), 2, value=3.0)
    assert beside - without == pytest.approx(0.1 * 3.0, abs=1e-12)


def test_a_share_is_no_gamma() -> None:
    with pytest.raises(ValueError, match=r"27\.8 is no share"):
        Pretraining(data="texts.jsonl", coef=27.8, mode="convex")  # pyright: ignore


@pytest.mark.parametrize(("rows", "batch"), [(12, 4), (10, 4), (3, 8)])
def test_every_row_is_drawn_once_in_each_epoch(rows: int, batch: int) -> None:
    mix = mix_of(1.0, "add", rows, batch)
    stream = [row for step in range(3 * rows) for row in mix.drawn(step)]
    epochs = [stream[i : i + rows] for i in range(0, len(stream) - rows + 1, rows)]
    assert all(Counter(epoch) == Counter(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "epochs are shuffled anew"
    assert [mix_of(1.0, "add", rows, batch).drawn(step) for step in (7, 2)] == [mix.drawn(7), mix.drawn(2)]
    first = [row for _ in range(3) for row in mix.drawn(0)]  # the bug of an iterator made anew at each step
    assert Counter(first[:rows]) != Counter(range(rows)) or batch >= rows


def two_jobs(microbatch: int, texts_at_once: int) -> dict[str, Tensor]:
    cast, batch, algorithm = micro.ppo_case("separate")
    texts = Examples(*micro.rows(5, 14, 9, 4, 11))
    mix = mix_of(2.0, "add")
    stepper = Stepper(cast.parameters(algorithm.trains), Optimiser(learning_rate=0.0), World())
    caught: dict[str, Tensor] = {}
    named = dict(zip(stepper.names, stepper.parameters, strict=True))
    stepper.adam.register_step_pre_hook(
        lambda *_: caught.update({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
    )
    beside = [Job(texts, lambda part: mix.loss(cast, part), Microbatch(rows=texts_at_once))]
    stepper.step(batch, lambda part: algorithm.loss(cast, part), Microbatch(rows=microbatch), 0.0, beside)
    return caught


def test_the_micro_batch_law_holds_for_two_batches_of_their_own_sizes() -> None:
    whole = two_jobs(6, 5)
    for sizes in ((1, 2), (5, 1), (2, 3)):
        assert micro.distance(whole, two_jobs(*sizes)) < 1e-6
    cast, batch, algorithm = micro.ppo_case("separate")
    alone = micro.gradients(cast, batch, algorithm, 6)
    texts = micro.gradients(cast, Examples(*micro.rows(5, 14, 9, 4, 11)), sft.Algorithm(), 5)
    named = {n: alone.get(n, 0) + 2.0 * texts[n] if n in texts else alone[n] for n in whole}
    assert micro.distance(whole, named) < 1e-6, "each batch is divided by its own count and by nothing else"


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    model = tiny.save_model(tmp_path / "model")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{p} even, {n} odd."}) + "\n" for n, p in enumerate(tiny.PROMPTS)))
    return model, texts


def stage(model: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    return tiny.ppo(model, str(tiny.write_prompts(prompts)), **changes)


def nll(model: Path, texts: Path, folder: Path) -> float:
    """−log p per token of the texts under a saved model: what a step of training on them would say."""
    given = tiny.sft(str(model), str(texts), optimiser={"learning_rate": 0.0}, max_steps=4, num_train_epochs=1)
    rows = tiny.lines(tiny.run(folder, given, name=f"nll-{model.parent.parent.name}") / "1-sft" / "metrics.jsonl")
    return sum(row["loss"] for row in rows) / len(rows)


def test_texts_hold_what_drift_would_lose(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, texts = models
    rate = {"optimiser": {"learning_rate": 3e-3, "schedule": "constant"}, "algorithm": {"kl_coef": 0.0}}
    mix = {"data": str(texts), "coef": 2.0, "batch_size": 8}
    ends = {
        name: tiny.run(tmp_path, stage(model, tmp_path / "prompts.jsonl", **rate, **more), name=name) / "1-ppo"
        for name, more in (("without", {}), ("with", {"pretraining": mix}))
    }
    found = {name: nll(end / "model", texts, tmp_path) for name, end in ends.items()}
    assert found["with"] < found["without"] - 0.3, found
    seen = tiny.lines(ends["with"] / "metrics.jsonl")
    assert all(row["loss/pretraining_avg"] > 0 for row in seen)
    assert seen[-1]["loss/pretraining_avg"] < seen[0]["loss/pretraining_avg"]


@pytest.mark.parametrize("mode", ["add", "convex"])
def test_a_stop_in_the_middle_of_a_rollout_loses_nothing(models: tuple[Path, Path], tmp_path: Path, mode: str) -> None:
    model, texts = models
    mix = {"data": str(texts), "coef": 0.5, "mode": mode, "batch_size": 3}
    given = stage(model, tmp_path / "prompts.jsonl", pretraining=mix, ema=0.9, total_episodes=24)
    assert stopped_equals_whole(tmp_path, given, step=6)


def stopped_equals_whole(folder: Path, given: dict[str, Any], step: int) -> bool:
    """Whether a stage stopped behind optimiser step `step` and started again ends as one gone through at once."""
    whole = tiny.run(folder, given, name="whole") / "1-ppo"
    with pytest.MonkeyPatch.context() as patch:
        after = ppo.Algorithm.after

        def stopping(self: Any, cast: Any, number: int) -> None:
            after(self, cast, number)
            if number == step:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(ppo.Algorithm, "after", stopping)
        with pytest.raises(Stopped):
            tiny.run(folder, given, name="stopped")
    again = tiny.run(folder, given, name="stopped") / "1-ppo"
    rows = [tiny.timeless(tiny.lines(place / "metrics.jsonl")) for place in (whole, again)]
    return rows[0] == rows[1] and tiny.equal(tiny.weights(whole), tiny.weights(again))


def test_a_stage_draws_a_batch_of_texts_for_each_of_its_steps(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, texts = models
    mix = {"data": str(texts), "coef": 0.5, "batch_size": 4}
    given = stage(model, tmp_path / "prompts.jsonl", pretraining=mix, total_episodes=16)
    loop, steps = tiny.online_loop(tmp_path / "loop", given), list[int]()
    assert loop.mix is not None
    job = loop.mix.job
    loop.mix.job = lambda cast, step, rows: (steps.append(step), job(cast, step, rows))[1]  # type: ignore[method-assign]
    loop.go()
    assert steps == list(range(8)), "two rollouts of four steps"
    seen = Counter(row for step in steps for row in loop.mix.drawn(step))
    assert set(seen.values()) == {2}, "32 of 16 texts: two epochs"


def test_data_without_a_token_to_learn_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = models
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "a" * 200, "completion": "b"}) + "\n")
    mix = {"data": str(empty), "coef": 1.0, "encoding": {"max_length": 8, "long_prompts": "drop"}}
    with pytest.raises(PalateError, match=r"pretraining\.data: no record is left"):
        tiny.run(tmp_path, stage(model, tmp_path / "prompts.jsonl", pretraining=mix))


def test_the_average_is_what_its_recursion_says() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    average = Average({"w": weight}, 0.9)
    stepper = Stepper({"w": weight}, Optimiser(learning_rate=0.1, schedule="constant"), World(), average=average)
    texts, one = golden_texts(), Microbatch(rows=1)
    expected, path = weight.detach().clone(), [weight.detach().clone()]
    for _ in range(5):
        stepper.step(texts, lambda part: Loss({"l": Term(weight.square().sum() * part.size, "rows")}, {}), one, 0.1)
        path.append(weight.detach().clone())
        expected = 0.9 * expected + 0.1 * path[-1]
    torch.testing.assert_close(average.averages["w"], expected, rtol=1e-12, atol=0)
    assert not torch.allclose(expected, 0.1 * path[-1] + 0.9 * path[-2])  # a twin that forgets
    with stepper.averaged():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), path[-1])
    kept = stepper.state()
    fresh = Stepper({"w": weight}, Optimiser(), World(), average=Average({"w": weight}, 0.9))
    fresh.restore(kept)
    assert torch.equal(fresh.average.averages["w"], average.averages["w"])  # type: ignore[union-attr]
    assert set(fresh.adam.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_saved_model_is_the_average(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = models
    given = stage(model, tmp_path / "prompts.jsonl", total_episodes=16)
    plain = tiny.weights(tiny.run(tmp_path, given, name="plain") / "1-ppo")
    loop = tiny.online_loop(tmp_path / "loop", {**given, "ema": 0.5})
    path: list[dict[str, Tensor]] = [dict(loop.cast.weights("policy"))]
    path[0] = {n: w.clone() for n, w in path[0].items()}
    loop.stepper.adam.register_step_post_hook(
        lambda *_: path.append({n: w.clone() for n, w in loop.cast.weights("policy").items()})
    )
    loop.go()
    mean = path[0]
    for later in path[1:]:
        mean = {n: 0.5 * w + 0.5 * later[n] for n, w in mean.items()}
    saved = tiny.weights(tiny.run(tmp_path, {**given, "ema": 0.5}, name="averaged") / "1-ppo")
    assert len(path) == 1 + 8
    for name, weight in saved.items():
        torch.testing.assert_close(weight, mean[name], rtol=1e-5, atol=1e-6)
    assert not tiny.equal(saved, plain)


def test_training_on_data_at_rest_saves_the_average_too(models: tuple[Path, Path], tmp_path: Path) -> None:
    model, texts = models
    ends = []
    for ema in (None, 0.999999, 1e-6):
        given = tiny.sft(str(model), str(texts), ema=ema, num_train_epochs=1)
        ends.append(tiny.weights(tiny.run(tmp_path, given, name=f"ema-{ema}") / "1-sft"))
    plain, still, swift = ends
    start = tiny.load_file(model / "model.safetensors")
    for name in plain:
        torch.testing.assert_close(still[name], start[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(swift[name], plain[name], rtol=0, atol=1e-6)
    assert not all(torch.allclose(plain[name], start[name], atol=1e-4) for name in plain)


def test_the_names_of_the_settings_are_told_apart() -> None:
    with pytest.raises(PalateError, match="mode"):
        build("stages", tiny.ppo("m", "p", pretraining={"data": "t", "coef": 1, "mode": "gamma"}), "stages.0")
