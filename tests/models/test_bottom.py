"""Frozen bottoms: the numbers of passes without a store, each row read once, nothing stale, no more than fits."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from palate.algorithms.ppo import Algorithm
from palate.batches import Tokens
from palate.cast import Cast
from palate.models.bottom import Bottom, States
from palate.models.heads import fresh_head
from palate.models.hydra import block_stack, branch, freeze_below, frozen_copy
from palate.models.seats import Seat
from palate.models.trunk import Trunk
from palate.settings import Stopped
from tests.stages import tiny_runs

VOCABULARY = 60
FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "opt", "gpt_neox"]
ROWS, LENGTH = 6, 24


def _batch() -> Tokens:
    """Rows of several lengths, padded on both sides; the first three begin alike, the last is told twice."""
    draw = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=draw)
    tokens[1:3, :14] = tokens[0, :14]
    real = torch.arange(LENGTH) < torch.tensor([[24], [20], [17], [9], [20], [9]])
    tokens[5], real[5] = tokens[3].roll(4), real[3].roll(4)
    action = real & (torch.arange(LENGTH) >= 8)
    return Tokens(tokens_BT=tokens, real_BT=real, action_BT=action)


def _cast(build, family: str, unfrozen: int = 1, value_blocks: int = 0, stores: bool = True, layers: int = 3) -> Cast:
    trunk = Trunk(build(family, num_hidden_layers=layers), VOCABULARY)
    freeze_below(trunk, unfrozen)
    reference = frozen_copy(trunk)
    value = branch(trunk, value_blocks) if value_blocks else trunk
    if not stores:
        for one in (trunk, reference, value):
            one.ground = None
    roles = {"policy": Seat(trunk, None, None), "reference": Seat(reference, None, None)}
    return Cast(roles | {"value": Seat(value, None, fresh_head(trunk.width, "reference", 3))})


def _ground(cast: Cast, role: str = "policy") -> Bottom:
    ground = cast.seat(role).trunk.ground
    assert isinstance(ground, Bottom)
    return ground


def _said(cast: Cast, batch: Tokens) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What is said of a batch by all, and the gradient of a number that hangs on all of it."""
    with torch.no_grad():
        reference_BT = cast.logp("reference", batch)
    logp_BT, entropy_BT, value_BT = cast.logp_and_values("policy", "value", batch)
    ((logp_BT - reference_BT + 1).square().sum() + value_BT.square().sum()).backward()
    found = cast.parameters(("policy", "value"))
    return [reference_BT, logp_BT, entropy_BT, value_BT], {n: p.grad for n, p in found.items() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "unfrozen", "value_blocks"),
    [
        *((family, 1, 0) for family in FAMILIES),
        *((f, *split) for f in ("gpt2", "gemma2") for split in ((1, 2), (0, 0))),
    ],
)
def test_what_is_said_and_its_gradient_are_those_without_a_store(build, family, unfrozen, value_blocks):
    with_store, without = (_cast(build, family, unfrozen, value_blocks, stores) for stores in (True, False))
    batch = _batch()
    for again in range(2):  # the second time every row is there
        (said, gradient), (expected, slope) = _said(with_store, batch), _said(without, batch)
        assert _ground(with_store).works
        assert len(_ground(with_store).states) == ROWS - 1, again
        assert gradient.keys() == slope.keys()
        assert gradient
        for mine, theirs in zip(said, expected, strict=True):
            assert (mine - theirs).abs().max() <= 2e-6 * theirs.abs().max().clamp(min=1)
        scale = max(float(g.abs().max()) for g in slope.values())
        for name, theirs in slope.items():
            assert (gradient[name] - theirs).abs().max() <= 2e-6 * scale, name
        for cast in (with_store, without):
            for parameter in cast.parameters(("policy", "value")).values():
                parameter.grad = None


def _count_tokens(cast: Cast, block: int) -> list[int]:
    """Tokens that the linear layers of a block see from now on, in whichever trunk, one number a call."""
    seen: list[int] = []
    for trunk in cast.trunks:
        layer = next(m for m in block_stack(trunk)[block].modules() if isinstance(m, nn.Linear))
        layer.register_forward_pre_hook(lambda m, given: seen.append(given[0].shape[:-1].numel()))
    return seen


def test_the_bottom_reads_each_row_once_for_the_reference_the_value_and_four_epochs(build):
    cast, batch = _cast(build, "llama", unfrozen=1, value_blocks=1), _batch()
    assert _ground(cast).states is _ground(cast, "reference").states is _ground(cast, "value").states
    _said(cast, batch.select(torch.tensor([3])))  # what the store is tried out with does not count
    below, above = _count_tokens(cast, 1), _count_tokens(cast, 2)
    with torch.no_grad():
        cast.logp("reference", batch)
        cast.values("value", batch)
    for epoch in range(4):
        for rows in torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).chunk(3):
            cast.logp_and_values("policy", "value", batch.select(rows).trimmed())
    assert sum(below) == 24 + 20 + 17 + 20  # row 3 was there already, and row 5 is the same
    assert sum(above) > 8 * sum(below)


def test_another_split_has_states_of_its_own(build):
    cast = _cast(build, "llama", unfrozen=1, value_blocks=2)
    policy, reference, value = (_ground(cast, role) for role in ("policy", "reference", "value"))
    assert (policy.depth, reference.depth, value.depth) == (2, 2, 1)
    assert policy.states is reference.states is not value.states


@pytest.fixture(params=[True, False])
def company(request: pytest.FixtureRequest) -> bool:
    """Whether the machine leaves a row's bits alone when it is read beside others."""
    return request.param


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_rows_bits_do_not_depend_on_who_asked_for_it_first(build, family, company):
    """So a run continued with an empty store is the run that was never interrupted."""
    batch = _batch()
    found = []
    for first in ([range(ROWS)], [[0, 3], [1, 2, 4]], [[2], [4, 0]]):
        cast = _cast(build, family)
        _said(cast, batch.select(torch.tensor([1])))
        if not company:
            _ground(cast).states.company = False
        for rows in first:
            cast.logp("policy", batch.select(torch.tensor(list(rows))).trimmed())
        found.append(cast.logp("policy", batch.select(torch.tensor([4, 1, 2]))))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.fixture
def three_threads() -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_bits_hold_with_a_number_of_threads_that_cuts_rows_unevenly(build, three_threads):
    trunk = Trunk(build("gpt2", hidden_size=256), VOCABULARY)
    freeze_below(trunk, 1)
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCABULARY, (12, 61), generator=draw)
    real = torch.ones_like(tokens, dtype=torch.bool)
    ground = trunk.ground
    assert isinstance(ground, Bottom)
    with torch.no_grad():
        trunk.hidden(tokens, real)
        together = [ground.states.get(row.numpy().tobytes()) for row in tokens]
        ground.states.belong(None)
        for i in range(12):
            trunk.hidden(tokens[i : i + 1], real[i : i + 1])
        alone = [ground.states.get(row.numpy().tobytes()) for row in tokens]
    assert ground.works
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _die() -> None:
    raise RuntimeError("gone")


@pytest.mark.parametrize(("end", "fault"), [(_interrupt, Stopped), (_die, RuntimeError)])
def test_a_run_stopped_or_killed_within_a_rollout_ends_as_if_it_had_not_been(
    end: Callable[[], None], fault: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on without a state in store, where the run that was never ended has those of its reference's pass."""
    model, prompts = tiny_runs.save_model(tmp_path / "model"), tiny_runs.write_prompts(tmp_path / "prompts.jsonl")
    layout = {"kind": "hydra", "unfrozen_blocks": 1, "value_blocks": 1}
    stage = tiny_runs.ppo(model, str(prompts), total_episodes=16, save_steps=1, layout=layout)
    whole = tiny_runs.run(tmp_path, copy.deepcopy(stage), name="whole") / "1-ppo"
    with monkeypatch.context() as patch:
        after = Algorithm.after

        def ending(self: Algorithm, cast: Any, number: int) -> None:
            after(self, cast, number)
            if number == 7:  # the third of the second rollout's four steps
                end()

        patch.setattr(Algorithm, "after", ending)
        with pytest.raises(fault):
            tiny_runs.run(tmp_path, copy.deepcopy(stage), name="again")
    again = tiny_runs.run(tmp_path, copy.deepcopy(stage), name="again") / "1-ppo"
    assert tiny_runs.equal(tiny_runs.weights(again), tiny_runs.weights(whole))
    ours, theirs = (tiny_runs.timeless(tiny_runs.lines(f / "metrics.jsonl")) for f in (again, whole))
    assert ours == theirs


def test_the_oldest_rows_leave_first():
    states = States(most=3 * 4 * 8 * 4)  # three rows of 4 × 8 numbers
    rows = [bytes([i]) for i in range(5)]
    for row in rows:
        states.keep({row: torch.ones(4, 8)})
    assert [states.get(row) is not None for row in rows] == [False, False, True, True, True]
    assert states.held == states.most
    states.belong("other weights")
    assert (len(states), states.held) == (0, 0)


def test_rows_that_never_fit_are_read_every_time_and_give_the_same(build):
    cast, batch = _cast(build, "llama"), _batch()
    expected, _ = _said(cast, batch)
    states = _ground(cast).states
    states.belong(None)
    states.most = 0
    below = _count_tokens(cast, 0)
    found, _ = _said(cast, batch)
    assert (len(states), states.held) == (0, 0)
    assert sum(below) == 2 * (24 + 20 + 17 + 9 + 20)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_default_store_is_bounded_by_memory(build):
    cast = _cast(build, "llama")
    _said(cast, _batch())
    most = _ground(cast).states.most
    assert most is not None
    assert 1 << 24 < most < 1 << 40


@pytest.mark.parametrize("how", ["in place", "restored", "other storage"])
def test_a_weight_below_that_changes_empties_the_store(build, how):
    cast, batch = _cast(build, "llama"), _batch()
    _said(cast, batch)
    name, weight = next((n, p) for n, p in cast.seat("policy").trunk.model.named_parameters() if "layers.0" in n)
    before = _said(cast, batch)[0][1]
    with torch.no_grad():
        if how == "in place":
            weight.mul_(1.5)
        elif how == "restored":
            cast.restore({f"policy.{name}": weight * 1.5})
        else:
            weight.data = weight.data * 1.5
    after = _said(cast, batch)[0][1]
    plain = _cast(build, "llama", stores=False)
    with torch.no_grad():
        plain.seat("policy").trunk.model.get_parameter(name).mul_(1.5)
    assert (after - before).abs().max() > 1e-3
    assert (after - _said(plain, batch)[0][1]).abs().max() <= 1e-5


def test_a_bottom_that_trains_or_was_replaced_is_not_stood_on(build):
    cast, batch = _cast(build, "llama"), _batch()
    _said(cast, batch)
    trunk, ground = cast.seat("policy").trunk, _ground(cast)
    layer = next(m for m in block_stack(trunk)[0].modules() if isinstance(m, nn.Linear))
    layer.weight.requires_grad_(True)
    cast.logp("policy", batch).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    layer.weight = nn.Parameter(layer.weight.detach() * 2, requires_grad=False)  # as sharding puts others there
    seen = _count_tokens(cast, 0)
    cast.logp("policy", batch)
    assert sum(seen) > 0
    assert ground.works


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointed_activations_give_the_same_gradient(build, family):
    plain, recomputing = _cast(build, family), _cast(build, family)
    for trunk in recomputing.trunks:
        trunk.checkpoint_activations()
    (said, gradient), (found, slope) = _said(plain, _batch()), _said(recomputing, _batch())
    assert _ground(recomputing).works
    torch.testing.assert_close(found, said)
    torch.testing.assert_close(slope, gradient)


def test_a_copied_trunk_stands_on_nothing(build):
    cast = _cast(build, "llama")
    _said(cast, _batch())
    assert copy.deepcopy(cast.seat("policy").trunk).ground is None


def test_blocks_are_themselves_again_behind_a_pass_and_behind_a_fault(build):
    cast, batch = _cast(build, "llama"), _batch()
    _said(cast, batch)
    blocks = list(block_stack(cast.seat("policy").trunk))
    assert not any("forward" in vars(block) for block in blocks)
    norm = next(m for n, m in cast.seat("policy").trunk.base.named_modules() if n == "norm")

    def broken(*given: object) -> None:
        raise ArithmeticError

    hook = norm.register_forward_pre_hook(broken)
    with pytest.raises(ArithmeticError):
        cast.logp("policy", batch)
    hook.remove()
    assert not any("forward" in vars(block) for block in blocks)


def test_a_family_whose_split_pass_differs_goes_without(build):
    cast, batch = _cast(build, "llama"), _batch()
    expected = _said(_cast(build, "llama", stores=False), batch)[0][1]
    trunk = cast.seat("policy").trunk
    block_stack(trunk)[2].register_forward_hook(
        lambda m, given, out: out + 0 * out if "forward" in vars(block_stack(trunk)[0]) else out
    )
    assert torch.equal(_said(cast, batch)[0][1], _said(cast, batch)[0][1])
    skewed = _cast(build, "llama")
    top = skewed.seat("policy").trunk
    block_stack(top)[2].register_forward_hook(
        lambda m, given, out: out + 1 if "forward" in vars(block_stack(top)[0]) else out
    )
    found = _said(skewed, batch)[0][1]
    assert _ground(skewed).works is False
    assert (found - expected).abs().max() <= 1e-5


def test_positions_scaled_by_the_longest_row_go_without(build):
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    trunk = Trunk(build("llama", rope_parameters=scaled, max_position_embeddings=16), VOCABULARY)
    freeze_below(trunk, 1)
    trunk.hidden(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool))
    assert isinstance(trunk.ground, Bottom)
    assert trunk.ground.works is False


def test_without_blocks_below_there_is_no_bottom(build):
    for unfrozen in (-1, 2):
        trunk = Trunk(build("llama"), VOCABULARY)
        freeze_below(trunk, unfrozen)
        assert trunk.ground is None
        assert frozen_copy(trunk).ground is None
