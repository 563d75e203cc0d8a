"""Passes in bfloat16 beside float32 weights: gradients near the exact ones, sampler and trainer of one mind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.batches import Tokens
from palate.cast import Cast, assemble
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.engines.publication import CLOSE
from palate.models.load import Loaded, Loading, load
from palate.models.make import Make, make
from palate.models.seats import Layout
from palate.optim import Adam
from palate.settings import PalateError, Stopped, parse
from palate.step import Stepper
from tests.stages import tiny_runs

ROLES = ("policy", "value", "reference")
LAYOUTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared": {"kind": "shared"},
    "adapters": {"kind": "adapters", "lora_rank": 4},
    "hydra": {"kind": "hydra", "unfrozen_blocks": 1, "value_blocks": 1},
}
HALF = torch.bfloat16


def _made(family: str = "llama") -> Loaded:
    settings = Make(architecture=family, hidden_size=32, layers=2, heads=4, vocabulary=280, context=64)  # type: ignore[arg-type]
    made = make(settings, ["the soup is hot and the wine is red"] * 5, 1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in made.trunk.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return made


def _batch() -> Tokens:
    """Two rows that begin alike, a short one and one without pads; the first ten tokens are prompt."""
    tokens = torch.randint(3, 260, (4, 24), generator=torch.Generator().manual_seed(2))
    tokens[1, :12] = tokens[0, :12]
    real = torch.arange(24) < torch.tensor([24, 20, 13, 24])[:, None]
    action = real.clone()
    action[:, :10] = False
    return Tokens(tokens, real, action)


def _learning(cast: Cast, batch: Tokens) -> tuple[Tensor, dict[str, Tensor]]:
    """What is said, and the gradient of a loss of policy and value."""
    logp, entropy, value = cast.logp_and_values("policy", "value", batch, 0.9)
    assert {logp.dtype, entropy.dtype, value.dtype} == {torch.float32}
    parameters = cast.parameters(("policy", "value"))
    loss = -logp.sum() + (value - 1)[batch.action_BT].square().sum()
    return logp.detach(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_float32_and_within_rounding_of_the_exact_ones(name: str, again: bool) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for compute in (None, HALF):
        start = _made()
        if again:
            start.trunk.checkpoint_activations()
        start.trunk.compute = compute
        cast = assemble(Layout(**LAYOUTS[name]), start, ROLES, 3)
        with torch.random.fork_rng():
            torch.manual_seed(4)
            for p in cast.parameters(("policy", "value")).values():  # adapters and value heads begin at zero
                p.data.add_(torch.randn_like(p) * 0.05)
        assert {trunk.computes_in for trunk in cast.trunks} == {compute or torch.float32}
        assert {trunk.dtype for trunk in cast.trunks} == {torch.float32}
        found.append(_learning(cast, _batch()))
    (exact, right), (half, ours) = found
    assert 0 < (exact - half).abs().max() < CLOSE[HALF][1]
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    flat = [torch.cat([gradients[n].flatten() for n in right]) for gradients in (right, ours)]
    assert torch.cosine_similarity(flat[0], flat[1], dim=0) > 0.999
    assert 0.98 < flat[1].norm() / flat[0].norm() < 1.02


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "opt", "bloom", "gpt_neox"])
def test_every_path_of_a_trunk_computes_in_the_format(family: str) -> None:
    """Packed or padded, with the head by blocks or whole: all of them round, none of them far."""
    trunk, batch = _made(family).trunk, _batch()
    place, token = batch.real_BT[:, 1:], batch.tokens_BT[:, 1:]

    @torch.no_grad()
    def said() -> Iterator[Tensor]:
        stream = trunk.read(batch.tokens_BT, batch.real_BT)
        state_ND = stream.at(stream.last_BT[:, :-1][place])
        yield trunk.words(state_ND, token[place]).logp_N
        yield trunk.logits(state_ND).log_softmax(-1).gather(-1, token[place][:, None])[:, 0]

    exact, _ = said()
    trunk.compute = HALF
    blocks, whole = said()
    torch.testing.assert_close(blocks, whole, rtol=0, atol=2e-2)
    for half in (blocks, whole):
        assert half.dtype == torch.float32
        assert 1e-4 < (half - exact).abs().mean() < CLOSE[HALF][0]


def test_a_small_step_moves_float32_weights_that_bfloat16_could_not_hold() -> None:
    start = _made()
    start.trunk.compute = HALF
    cast = assemble(Layout(), start, ("policy",), 3)
    parameters = cast.parameters(("policy",))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    adam = Adam(list(parameters.values()), 1e-6, (0.9, 0.999), 1e-8)
    for p, gradient in zip(
        parameters.values(),
        torch.autograd.grad(-cast.logp("policy", _batch()).sum(), list(parameters.values())),
        strict=True,
    ):
        p.grad = gradient
    adam.step()
    moved = torch.cat([(p - before[name]).detach().abs().flatten() for name, p in parameters.items()])
    assert 0 < moved.max() < 2e-6
    lost = [(p.bfloat16() == before[name].bfloat16()).float().mean() for name, p in parameters.items() if p.dim() > 1]
    assert min(lost) > 0.95


@pytest.mark.parametrize("adapter", [None, "policy"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_sampler_and_trainer_agree(family: str, adapter: str | None) -> None:
    start = _made(family)
    start.trunk.compute = HALF
    layout = Layout(**LAYOUTS["adapters"]) if adapter else Layout()
    cast = assemble(layout, start, ("policy",), 3)
    for p in cast.parameters(("policy",)).values():
        p.data.add_(torch.full_like(p, 0.01))
    engine = LocalEngine(start.trunk, start.tokenizer, Sampling(max_new_tokens=16), adapter=adapter, batch_size=4)
    rows = engine.generate([[5, 6, 7, 8, 9, 10, 11, 12, 13], [7, 8], [9, 4, 3]], list(range(6)))
    with torch.no_grad():
        gap = (cast.logp("policy", rows) - rows.logp_BT)[rows.action_BT].abs()
    mean, largest = CLOSE[HALF]
    assert gap.mean() <= mean / 2
    assert gap.max() <= largest / 2


def test_the_setting_reaches_the_trunk_and_masters_are_float32(tmp_path: Path) -> None:
    folder = tiny_runs.save_model(tmp_path / "start")
    trunk = load(folder, how=Loading(compute="bfloat16")).trunk
    assert (trunk.dtype, trunk.computes_in) == (torch.float32, HALF)
    assert load(folder).trunk.computes_in == torch.float32
    assert load(folder, how=Loading(dtype="bfloat16")).trunk.computes_in == HALF
    with pytest.raises(PalateError, match="compute: bfloat16 is beside weights in float32, and dtype is bfloat16"):
        parse(Loading, {"dtype": "bfloat16", "compute": "bfloat16"})


def test_a_model_made_by_a_stage_heeds_its_loading(tmp_path: Path) -> None:
    """Three runs whose settings differ in `compute` alone: the one in bfloat16 is another, its weights float32."""
    data = str(tiny_runs.write_prompts(tmp_path / "prompts.jsonl"))
    shape = {"architecture": "llama", "hidden_size": 32, "layers": 2, "heads": 2, "vocabulary": 280, "context": 48}
    found: list[dict[str, Tensor]] = []
    for name, loading in (("plain", {}), ("again", {}), ("half", {"compute": "bfloat16"})):
        stage = tiny_runs.sft("", data, loading=loading) | {"model": shape}
        found.append(tiny_runs.weights(tiny_runs.run(tmp_path, stage, name=name) / "1-sft"))
    plain, again, half = found
    assert tiny_runs.equal(plain, again)
    assert not tiny_runs.equal(plain, half)
    assert {x.dtype for x in half.values()} == {torch.float32}


def test_adam_refuses_what_has_no_masters_and_says_what_to_set(tmp_path: Path) -> None:
    folder = tiny_runs.save_model(tmp_path / "start")
    loaded = load(folder, how=Loading(dtype="bfloat16"))
    with pytest.raises(PalateError, match="compute: bfloat16"):
        Adam(loaded.trunk.parameters(), 1e-3, (0.9, 0.999), 1e-8)


@pytest.mark.parametrize("kind", ["separate", "hydra"])
def test_a_run_in_bfloat16_holds_its_invariants_and_goes_on_bitwise(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = str(tiny_runs.write_prompts(tmp_path / "prompts.jsonl"))
    stage = tiny_runs.ppo(
        tiny_runs.save_model(tmp_path / "start", width=1.5),
        prompts,
        loading={"compute": "bfloat16"},
        layout=LAYOUTS[kind],
    )
    whole = tiny_runs.run(tmp_path, stage, name="whole")
    step, calls = Stepper.step, iter(range(99))

    def stopped(self: Stepper, *asked: Any) -> dict[str, float]:
        if next(calls) == 11:
            raise Stopped
        return step(self, *asked)

    with monkeypatch.context() as patched:
        patched.setattr(Stepper, "step", stopped)
        with pytest.raises(Stopped):
            tiny_runs.run(tmp_path, stage, name="halved")
    halved = tiny_runs.run(tmp_path, stage, name="halved")
    ours, theirs = (tiny_runs.weights(run / "1-ppo") for run in (whole, halved))
    assert {x.dtype for x in ours.values()} == {torch.float32}
    assert tiny_runs.equal(ours, theirs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_of_a_trunk_computes_as_it_does(name: str) -> None:
    start = _made()
    start.trunk.compute = HALF
    cast = assemble(Layout(**LAYOUTS[name]), start, ROLES, 3)
    assert {cast.seat(role).trunk.computes_in for role in ROLES} == {HALF}


def test_copies_in_the_format_are_made_anew_for_each_rollout_and_leave_no_trace() -> None:
    start = _made("gpt2")
    start.trunk.compute = HALF
    engine = LocalEngine(start.trunk, start.tokenizer, Sampling(max_new_tokens=8, fixed_length=True), batch_size=4)
    layers = [m for m in start.trunk.model.modules() if "forward" in vars(m)]
    ways = [layer.forward for layer in layers]
    first = engine.generate([[5, 6, 7]], [1], greedy=True)
    assert [layer.forward for layer in layers] == ways
    with torch.no_grad():
        for p in start.trunk.parameters():
            p.mul_(1.5)
    second = engine.generate([[5, 6, 7]], [1], greedy=True)
    assert not torch.equal(first.logp_BT, second.logp_BT)
    assert {p.dtype for p in start.trunk.parameters()} == {torch.float32}
