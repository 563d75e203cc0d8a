"""Values of actions: heads beside the policy whatever the layout, saved with it and loaded with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from palate.batches import Tokens
from palate.cast import Cast, Layout, Seat, assemble
from palate.models.heads import ActionHead, ScalarHead, fresh_action_head
from palate.models.load import Loaded, load
from palate.models.lora import wear
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.models.seats import ACTING
from palate.settings import PalateError

TEXTS = ["the soup is hot and the wine is red"] * 5
ROLES = ("policy", "reference", "q1", "q2", "value", "target_q1", "target_q2")
LAYOUTS = {
    "separate": Layout(kind="separate"),
    "shared": Layout(kind="shared"),
    "adapters": Layout(kind="adapters", lora_rank=4),
    "hydra": Layout(kind="hydra", unfrozen_blocks=1),
}


def _make() -> Loaded:
    return make(Make(architecture="gpt2", hidden_size=32, layers=2, heads=4, vocabulary=280), TEXTS, 1)


def _cast(layout: str = "separate", start: Loaded | None = None) -> Cast:
    return assemble(LAYOUTS[layout], start or _make(), ROLES, 1)


def _batch() -> Tokens:
    tokens = torch.randint(3, 260, (3, 9), generator=torch.Generator().manual_seed(2))
    real = torch.ones_like(tokens, dtype=torch.bool)
    action = real.clone()
    action[:, :3] = False
    return Tokens(tokens, real, action)


def test_a_fresh_head_is_d_2d_relu_v_with_torchs_own_bounds():
    head = fresh_action_head(32, 50, 1, "q1")
    shapes = [tuple(p.shape) for p in head.parameters()]
    assert shapes == [(64, 32), (64,), (50, 64), (50,)]
    for layer, inputs in ((head.layers[0], 32), (head.layers[2], 64)):
        for p in layer.parameters():
            assert 0.9 * inputs**-0.5 < float(p.detach().abs().max()) <= inputs**-0.5
    x = torch.randn(5, 32)
    first, last = head.layers[0], head.layers[2]
    torch.testing.assert_close(head(x), torch.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias)
    assert head(x.bfloat16()).dtype == torch.float32
    again, other = fresh_action_head(32, 50, 1, "q1"), fresh_action_head(32, 50, 1, "q2")
    assert torch.equal(head(x), again(x))
    assert not torch.equal(head(x), other(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_sit_beside_the_policy_in_every_layout(layout: str):
    cast = _cast(layout)
    policy = cast.seat("policy")
    assert list(cast.roles) == list(ROLES)
    for role in (*ACTING, "value"):
        assert cast.seat(role).trunk is policy.trunk
        assert cast.seat(role).adapter == policy.adapter
    assert isinstance(cast.seat("value").head, ScalarHead)
    assert cast.seat("value").head.kind == "mlp"
    reference = cast.seat("reference")
    assert (reference.trunk, reference.adapter) != (policy.trunk, policy.adapter)
    assert set(cast.acting()) == {*ACTING, "value"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_pass_says_what_every_role_says_alone(layout: str):
    cast, batch = _cast(layout), _batch()
    cast.logp("policy", batch)  # a frozen bottom is tried out at its first use
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    hook = cast.seat("policy").trunk.base.register_forward_hook(count)
    acts = cast.acts("policy", ("q1", "q2"), ("target_q1", "target_q2"), "value", batch)
    hook.remove()
    assert passes == 1
    torch.testing.assert_close(acts.logp_N, cast.logp("policy", batch)[acts.asked_BT])
    torch.testing.assert_close(acts.value_N, cast.values("value", batch)[acts.asked_BT])
    torch.testing.assert_close(acts.entropy_N, cast.logp("policy", batch, entropy=True)[1][acts.asked_BT])
    states = _states(cast, batch)
    for role, found in zip(("q1", "q2", "target_q1", "target_q2"), (*acts.q_HN, *acts.target_HN), strict=True):
        worth_NV = cast.seat(role).head(states)
        torch.testing.assert_close(found, worth_NV.gather(-1, acts.token_N[:, None])[:, 0])
        if role in ("q1", "q2"):
            torch.testing.assert_close(acts.total_HN[int(role[1]) - 1], worth_NV.logsumexp(-1))
    assert not any(q.requires_grad for q in acts.target_HN)
    ends = acts.after_N.reshape(3, 6)
    assert torch.equal(ends[:, :-1], acts.value_N.reshape(3, 6)[:, 1:])
    assert not ends[:, -1].any()


def _states(cast: Cast, batch: Tokens) -> Tensor:
    """The policy's states before each action, one after the other."""
    seat = cast.seat("policy")
    with wear(seat.adapter):
        hidden = seat.trunk.hidden(batch.tokens_BT, batch.real_BT)
    return hidden[:, :-1][batch.action_BT[:, 1:]]


def test_the_slow_ones_begin_as_copies_and_never_train():
    cast = _cast()
    for q in ("q1", "q2"):
        ours, theirs = cast.seat(q).head, cast.seat(f"target_{q}").head
        assert isinstance(ours, ActionHead)
        assert isinstance(theirs, ActionHead)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert {p.data_ptr() for p in ours.parameters()}.isdisjoint(p.data_ptr() for p in theirs.parameters())
        assert not any(p.requires_grad for p in theirs.parameters())
    assert not any("target" in name for name in cast.parameters(ROLES))


def test_without_values_of_actions_the_value_stays_where_its_layout_puts_it():
    cast = assemble(Layout(), _make(), ("policy", "value"), 1)
    assert cast.seat("value").trunk is not cast.seat("policy").trunk
    assert cast.acting() == {}


def test_casts_that_cannot_be():
    with pytest.raises(PalateError, match="values of actions sit beside the policy"):
        assemble(Layout(), _make(), ("q1", "value"), 1)
    cast = _cast()
    cast.roles["value"] = Seat(_make().trunk, None, cast.seat("value").head)
    with pytest.raises(PalateError, match="role 'value' has no ScalarHead beside 'policy'"):
        cast.acts("policy", ("q1",), ("target_q1",), "value", _batch())
    with pytest.raises(PalateError, match="role 'reference' has no ActionHead beside 'policy'"):
        _cast().acts("policy", ("reference",), ("target_q1",), "value", _batch())
    with pytest.raises(PalateError, match="no scalar head"):
        _cast().values("q1", _batch())


@pytest.mark.parametrize("layout", ["shared", "adapters"])
def test_saved_and_loaded_they_are_the_same_bit_for_bit(tmp_path: Path, layout: str):
    start = _make()
    cast = _cast(layout, start)
    with torch.no_grad():
        for role in (*ACTING, "value"):
            for p in cast.seat(role).head.parameters():  # type: ignore[union-attr]
                p.add_(0.1 * torch.randn_like(p))
    seat = cast.seat("policy")
    save(tmp_path / "m", seat.trunk, start.tokenizer, Card("t", "b"), None, seat.adapter, heads=cast.acting())
    loaded = load(tmp_path / "m")
    x = torch.randn(4, 32)
    assert set(loaded.heads) == {*ACTING, "value"}
    for role, head in loaded.heads.items():
        assert torch.equal(head(x), cast.seat(role).head(x))  # type: ignore[misc]
    again = assemble(Layout(), loaded, ROLES, 99)
    assert all(again.seat(role).head is head for role, head in loaded.heads.items())
    assert not any(p.requires_grad for p in loaded.heads["target_q1"].parameters())
    weights = [p.name for p in (tmp_path / "m").glob("*.safetensors")]
    assert weights == ["model.safetensors"], "a server takes every weight file beside the model's for the model's own"
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), nn.Module)


def test_a_model_without_them_has_none_and_a_trunk_needs_none(tmp_path: Path):
    start = _make()
    save(tmp_path / "plain", start.trunk, start.tokenizer, Card("t", "b"))
    assert load(tmp_path / "plain").heads == {}
    save(tmp_path / "m", start.trunk, start.tokenizer, Card("t", "b"), heads=_cast("shared").acting())
    assert load(tmp_path / "m", "trunk").heads == {}


@pytest.mark.parametrize("damage", ["half", "empty", "another"])
def test_damaged_ones_are_one_message(tmp_path: Path, damage: str):
    start = _make()
    save(tmp_path / "m", start.trunk, start.tokenizer, Card("t", "b"), heads=_cast("shared").acting())
    note, weights = tmp_path / "m/heads/heads.json", tmp_path / "m/heads/heads.safetensors"
    if damage == "half":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "empty":
        note.write_text("[")
    else:
        note.write_text(json.dumps({"q1": {"tokens": 7}}))
    with pytest.raises(PalateError, match=r"m: the model cannot be loaded: .*Check the folder's files"):
        load(tmp_path / "m")
