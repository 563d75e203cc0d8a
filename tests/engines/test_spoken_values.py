"""Values that were spoken with the tokens stand in for a pass of their own, where they mean the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from palate.algorithms import _ppo_rollout
from palate.batches import Scored
from palate.cast import Cast
from palate.engines.engine import Sampling
from palate.models.heads import ScalarHead
from palate.models.load import Loaded
from palate.models.make import Make, make
from palate.models.seats import Layout, take_seats
from palate.stages import _seats


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return make(Make(hidden_size=32, layers=2, heads=2, context=64, vocabulary=280), ["the soup was hot"], key=7)


def scored_by(cast: Cast, loaded: Loaded) -> Scored:
    engine = _seats.engine(cast, loaded.tokenizer, Sampling(max_new_tokens=7), [])
    rollouts = engine.generate([[5, 6, 7], [8, 9]], list(range(8)))
    zeros_B = torch.zeros(8)
    return Scored(rollouts, zeros_B, torch.zeros_like(rollouts.logp_BT), {}, {})


@torch.no_grad()
def test_values_spoken_with_the_tokens_are_those_of_a_pass(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    cast = Cast(take_seats(Layout(kind="shared"), loaded, ("policy", "reference", "value"), 3))
    head = cast.seat("value").head
    assert isinstance(head, ScalarHead)
    torch.nn.init.normal_(head.last.weight)  # it starts at zero
    scored = scored_by(cast, loaded)
    assert scored.rollouts.value_BT is not None
    silent = replace(scored, rollouts=replace(scored.rollouts, value_BT=None))
    passes: list[str] = []
    values = Cast.values

    def counted(self: Cast, role: str, *batch: object) -> torch.Tensor:
        passes.append(role)
        return values(self, role, *batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Cast, "values", counted)
    found = _ppo_rollout.hear(cast, scored, "last", "sampled")
    assert not passes
    expected = _ppo_rollout.hear(cast, silent, "last", "sampled")
    assert passes == ["value"]
    assert bool((expected.value_BT != 0).any())
    torch.testing.assert_close(found.value_BT, expected.value_BT, atol=1e-5, rtol=0)
    for position, old in (("last", "recomputed"), ("after", "sampled")):
        other = _ppo_rollout.hear(cast, scored, position, old)  # pyright: ignore[reportArgumentType]
        assert other.value_BT.equal(_ppo_rollout.hear(cast, silent, position, old).value_BT)  # pyright: ignore[reportArgumentType]


def test_a_value_that_reads_another_trunk_is_not_spoken(loaded: Loaded) -> None:
    cast = Cast(take_seats(Layout(kind="separate"), loaded, ("policy", "reference", "value"), 3))
    assert scored_by(cast, loaded).rollouts.value_BT is None
