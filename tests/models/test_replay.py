"""Steps that are played again: recorded as a graph that Python has no part in, they write what steps by hand write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from palate.models import decode, linear, one_query, replay
from palate.models.attention import Bypassed
from palate.models.load import Loading, trunk_of
from palate.models.replay import Recording, Replay
from palate.models.trunk import Trunk
from palate.settings import PalateError
from tests.engines.test_slots import answers, engine, keys, prompts
from tests.models.conftest import FAMILIES, VOCABULARY
from tests.models.conftest import _build as build  # pyright: ignore[reportPrivateUsage]

TAKEN: list[int] = []
"""The operations of each recording."""


def traced(work: Callable[[], Tensor]) -> Recording:
    """A recording as a GPU makes it, of operations on memory that stays: what Python knew then is fixed for good.

    Traced with tensors without contents, so that asking for a number on the way is an error, as it is on a GPU; so is a
    tensor made of Python's numbers, which would have to be copied there.
    """
    graph = make_fx(work, tracing_mode="fake", _allow_non_fake_inputs=True)()
    if any("lift_fresh" in str(node.target) for node in graph.graph.nodes):
        raise RuntimeError("the step copies from the CPU")
    TAKEN.append(len(graph.graph.nodes))
    result = graph()

    def play() -> None:
        result.copy_(graph())

    return play, result


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every memory records, in small strides and with little room, so that rows move and memory grows on the way."""
    TAKEN.clear()
    monkeypatch.setattr(replay, "allowed", lambda trunk, most_new: trunk.replays)
    monkeypatch.setattr(replay, "record", traced)
    monkeypatch.setattr(replay, "_STRIDE", 8)
    monkeypatch.setattr(decode, "_AHEAD", 5)
    uncached = one_query._places.__wrapped__  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(one_query, "_places", uncached)  # else tensors without contents would outlive their trace
    linear.use("plain")
    yield
    linear.use(None)


def both(trunk: Trunk, size: int, count: int = 13, **sampling: Any) -> tuple[Any, Any]:
    """The same answers by hand and with recorded steps."""
    trunk.replays = False
    expected = engine(trunk, size, **sampling).generate(prompts(count), keys(count))
    trunk.replays = True
    return expected, engine(trunk, size, **sampling).generate(prompts(count), keys(count))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bloom"])
def test_recorded_steps_write_what_steps_by_hand_write(family: str) -> None:
    trunk = Trunk(build(family), VOCABULARY)
    expected, found = both(trunk, 5)
    assert trunk.replays
    assert TAKEN
    assert min(TAKEN) > 20, "a whole step is in a recording"
    assert answers(found) == answers(expected)
    torch.testing.assert_close(found.logp_BT, expected.logp_BT, atol=2e-5, rtol=0)


@pytest.mark.parametrize("more", [{"sliding_window": 4}, {"sliding_window": 4, "num_key_value_heads": 1}])
def test_a_sliding_window_holds_in_recorded_steps(more: dict[str, Any]) -> None:
    expected, found = both(Trunk(build("mistral", **more), VOCABULARY), 4, fixed_length=True, stop_token_ids=())
    assert answers(found) == answers(expected)
    torch.testing.assert_close(found.logp_BT, expected.logp_BT, atol=2e-5, rtol=0)


def test_many_steps_are_played_from_few_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording for each stretch of columns and number of rows, and steps by hand for the first two alone."""
    monkeypatch.setattr(replay, "_STRIDE", 64)
    monkeypatch.setattr(decode, "_AHEAD", 64)
    trunk = Trunk(build("gpt2"), VOCABULARY)
    by_hand: list[int] = []
    step = decode.Slots._step  # pyright: ignore[reportPrivateUsage]

    def counted(slots: decode.Slots, token_B: Tensor) -> Tensor:
        by_hand.append(len(token_B))
        return step(slots, token_B)

    monkeypatch.setattr(decode.Slots, "_step", counted)
    asked = [prompts(8)[3]] * 4
    writer = engine(trunk, 4, max_new_tokens=30, fixed_length=True, stop_token_ids=())
    found = writer.generate(asked, keys(4))
    assert len(TAKEN) == 1
    assert by_hand == [4, 4]
    trunk.replays = False
    expected = writer.generate(asked, keys(4))
    assert len(by_hand) > 30
    assert answers(found) == answers(expected)
    torch.testing.assert_close(found.logp_BT, expected.logp_BT, atol=2e-5, rtol=0)


def test_sizes_are_few_and_large_enough() -> None:
    rows = replay._rows  # pyright: ignore[reportPrivateUsage]
    assert [rows(n, 64) for n in (64, 33, 32, 17, 16, 1)] == [64, 64, 32, 32, 16, 16]
    assert [rows(n, 5) for n in (5, 4, 3, 2, 1)] == [5, 5, 3, 2, 2]
    assert rows(1, 1) == 1
    columns = replay._columns  # pyright: ignore[reportPrivateUsage]
    for count in range(1, 3000):
        found = columns(count, 10_000)
        assert count <= found <= max(count + replay._STRIDE, count * 1.25)  # pyright: ignore[reportPrivateUsage]
    assert columns(1000, 1010) == 1010
    assert len({columns(count, 10_000) for count in range(1, 3000)}) < 40


def test_a_step_that_reads_a_number_is_done_by_hand_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = Trunk(build("gpt2"), VOCABULARY)
    run = Trunk.run

    def curious(self: Trunk, tokens_N: Tensor, *more: Any) -> Tensor:
        assert int(tokens_N[0]) >= 0
        return run(self, tokens_N, *more)

    monkeypatch.setattr(Trunk, "run", curious)
    trunk.replays = False
    expected = engine(trunk, 5).generate(prompts(9), keys(9))
    trunk.replays = True
    with pytest.warns(UserWarning, match="gpt2: steps of writing are not recorded as CUDA graphs"):
        found = engine(trunk, 5).generate(prompts(9), keys(9))
    assert not trunk.replays
    assert torch.equal(found.logp_BT, expected.logp_BT)
    assert answers(engine(trunk, 5).generate(prompts(9), keys(9))) == answers(expected), "and nobody is warned again"


def test_a_family_that_needs_a_mask_while_recording_is_done_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    def bypassed(work: Callable[[], Tensor]) -> Recording:
        raise Bypassed

    monkeypatch.setattr(replay, "record", bypassed)
    trunk = Trunk(build("gpt2"), VOCABULARY)
    with pytest.warns(UserWarning, match="but run one by one: Bypassed"):
        engine(trunk, 5).generate(prompts(9), keys(9))


def frozen_clock(work: Callable[[], Tensor]) -> Recording:
    """What would come of a column that was written down: every step into the first one."""
    result = work().clone()
    return lambda: None, result


def slightly_off(work: Callable[[], Tensor]) -> Recording:
    play, result = traced(work)

    def wrong() -> None:
        play()
        result.mul_(1.001)

    return wrong, result


def test_a_recording_that_says_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "record", slightly_off)
    trunk = Trunk(build("llama"), VOCABULARY)
    trunk.replays = False
    expected = engine(trunk, 5).generate(prompts(9), keys(9))
    trunk.replays = True
    with pytest.warns(UserWarning, match="a recorded step gives other states"):
        found = engine(trunk, 5).generate(prompts(9), keys(9))
    assert torch.equal(found.logp_BT, expected.logp_BT)


def test_a_recording_of_what_python_knew_then_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that never changes again passes the first step, so the second has to reject it."""
    monkeypatch.setattr(replay, "record", frozen_clock)
    monkeypatch.setattr(replay, "_STRIDE", 64)
    monkeypatch.setattr(decode, "_AHEAD", 64)
    with pytest.raises(PalateError, match=r"llama: a step recorded .* Set loading\.cuda_graphs: false"):
        both(Trunk(build("llama"), VOCABULARY), 5, fixed_length=True, stop_token_ids=())


def test_a_step_that_copies_from_the_cpu_cannot_be_recorded() -> None:
    with pytest.raises(RuntimeError, match="copies from the CPU"):
        traced(lambda: torch.ones(2) * torch.tensor([1.0, 2.0]))


def test_steps_are_recorded_where_it_is_asked_for_possible_and_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = build("gpt2")
    assert not replay.allowed(Trunk(model, VOCABULARY), 100), "a CPU records nothing"
    trunk = trunk_of(model, VOCABULARY, Loading(device="cpu", cuda_graphs=False))
    assert not trunk.replays
    trunk = trunk_of(model, VOCABULARY, Loading(device="cpu"))
    trunk.computes_on = torch.device("cuda")
    assert not replay.allowed(trunk, 100), "weights that lie elsewhere would be copied in every step"
    monkeypatch.setattr(replay, "_WHERE", "cpu")
    assert replay.allowed(trunk, 100)
    assert not replay.allowed(trunk, 3)
    monkeypatch.setattr(replay, "local", torch.clone)
    assert not replay.allowed(trunk, 100), "sharded weights are gathered in every step"
    monkeypatch.undo()
    trunk.replays = False
    monkeypatch.setattr(replay, "_WHERE", "cpu")
    assert not replay.allowed(trunk, 100)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mistral"])
def test_on_a_gpu_graphs_write_what_steps_by_hand_write(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(replay, "_WORTH", 1)
    trunk = trunk_of(build(family), VOCABULARY, Loading(device="cuda"))
    expected, found = both(trunk, 5, max_new_tokens=40)
    assert trunk.replays, "recorded to the end"
    assert answers(found) == answers(expected)
    torch.testing.assert_close(found.logp_BT, expected.logp_BT, atol=1e-4, rtol=0)
    assert isinstance(decode.Slots(trunk, 4, 40)._replay, Replay)  # pyright: ignore[reportPrivateUsage]
