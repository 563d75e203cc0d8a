"""Seats: where values and rewards start, and casts that cannot be."""

from __future__ import annotations

import pytest
import torch

from palate.batches import Tokens
from palate.cast import Cast, assemble
from palate.models.heads import fresh_head
from palate.models.load import Loaded
from palate.models.make import Make, make
from palate.models.seats import Layout, Seat
from palate.models.trunk import Trunk
from palate.settings import PalateError

TEXTS = ["the soup is hot and the wine is red"] * 5
ROLES = ("policy", "value", "reference")


def _make(architecture: str = "gpt2", key: int = 1) -> Loaded:
    made = make(Make(architecture=architecture, hidden_size=32, layers=2, heads=4, vocabulary=280), TEXTS, key)
    with torch.random.fork_rng():
        torch.manual_seed(key)
        for p in made.trunk.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)
    return made


def _batch() -> Tokens:
    """Three rows padded on the right, all but the prompt's three tokens answers."""
    tokens = torch.randint(3, 260, (3, 9), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[0, 7:] = False
    action = real.clone()
    action[:, :3] = False
    return Tokens(tokens, real, action)


def _reward_model(architecture: str = "gpt2") -> Loaded:
    made = _make(architecture, key=4)
    head = fresh_head(32, "reference", 2)
    head.gain.data.fill_(2.0)
    head.trained = True
    return Loaded(made.trunk, made.tokenizer, head, "reward")


def test_a_value_network_may_start_as_the_reward_model():
    batch, reward = _batch(), _reward_model()
    scores = Cast({"reward": Seat(reward.trunk, None, reward.head)}).scores("reward", batch)
    cast = assemble(Layout(), _make(), ROLES, 1, value_start=_reward_model())
    torch.testing.assert_close(cast.values("value", batch)[0, 8], scores[0])
    assert (
        torch.count_nonzero(
            assemble(Layout(value_init="zero"), _make(), ROLES, 1, _reward_model()).values("value", batch)
        )
        == 0
    )
    random = assemble(Layout(value_init="random", value_head="mlp"), _make(), ROLES, 1)
    assert torch.count_nonzero(random.values("value", batch)) > 0


def test_a_reward_role_trains_a_fresh_head_or_the_one_it_has():
    fresh = assemble(Layout(), _make(), ("reward",), 1)
    assert not fresh.seat("reward").head.trained
    assert {n for n in fresh.parameters(("reward",)) if "head" in n} == {
        "reward.head.layers.weight",
        "reward.head.layers.bias",
    }
    had = _reward_model()
    assert assemble(Layout(), had, ("reward",), 1).seat("reward").head is had.head
    adapted = assemble(Layout(kind="adapters", lora_rank=2), _make(), ("reward",), 1)
    assert adapted.seat("reward").adapter == "reward"
    assert all(".adapters.reward." in n or "head" in n for n in adapted.parameters(("reward",)))


@pytest.mark.parametrize("kind", ["shared", "adapters", "hydra"])
def test_a_value_model_needs_a_trunk_of_its_own(kind):
    with pytest.raises(PalateError, match=f"layout {kind}: .*value_model has no place"):
        assemble(Layout(kind=kind), _make(), ROLES, 1, _reward_model())


def test_impossible_casts_are_refused():
    with pytest.raises(PalateError, match=r"called 'polcy'. Did you mean 'policy'"):
        assemble(Layout(), _make(), ("polcy",), 1)
    with pytest.raises(PalateError, match="needs a trained reward model"):
        assemble(Layout(value_init="reward"), _make(), ROLES, 1)
    stranger = make(Make(hidden_size=32, layers=1, heads=4, vocabulary=300), ["zig zag zebra"] * 9, 1)
    with pytest.raises(PalateError, match="tokenizer is not the policy's"):
        assemble(Layout(), _make(), ROLES, 1, stranger)
    mute = _make()
    with pytest.raises(PalateError, match="cannot be a policy"):
        assemble(Layout(), Loaded(Trunk(mute.trunk.base, 260), mute.tokenizer, None, "mute"), ("policy",), 1)
