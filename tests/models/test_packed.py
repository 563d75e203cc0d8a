"""A stream without pads gives what padded rows give: states, log-probabilities and gradients, in every family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.batches import Tokens
from palate.cast import Cast, Seat
from palate.models import attention, packed
from palate.models.load import Loading, load
from palate.models.packed import pack
from palate.models.trunk import Trunk

BYPASS = ("bloom",)
"""Families whose attention does not ask transformers' registry."""
WINDOWED = {"mistral": {"sliding_window": 4}, "gemma2": {"sliding_window": 4}, "qwen2": {}}
SIZE = 60


def _batch() -> Tokens:
    """Ragged rows, padded on the left, on the right and in the middle; four begin alike, two of them are one word."""
    draw = torch.Generator().manual_seed(11)
    tokens = torch.randint(3, SIZE, (9, 24), generator=draw)
    tokens[1:4, :12] = tokens[0, :12]
    tokens[5] = tokens[4]
    real = torch.arange(24) < torch.tensor([24, 20, 13, 17, 9, 9, 3, 24, 6])[:, None]
    real[7, :15] = False
    real[8, 2:4] = False
    action = real & (torch.arange(24) >= 2)
    return Tokens(tokens, real, action)


def _both(trunk: Trunk, batch: Tokens) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """(log-probabilities, gradients) by the stream and by padded rows."""
    cast, found = Cast({"policy": Seat(trunk, None, None)}), []
    weight = torch.randn(batch.tokens_BT.shape, generator=torch.Generator().manual_seed(2))
    for packs in (True, False):
        trunk.packs = packs
        logp, entropy = cast.logp("policy", batch, entropy=True)
        trunk.zero_grad()
        (logp * weight + 0.3 * entropy).sum().backward()
        grads = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
        found.append((logp.detach(), grads))
    return found


def _agree(found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> None:
    (stream, stream_grads), (rows, rows_grads) = found
    torch.testing.assert_close(stream, rows, atol=1e-5, rtol=0)
    assert stream_grads.keys() == rows_grads.keys()
    one, other = (torch.cat([g[name].flatten() for name in rows_grads]) for g in (stream_grads, rows_grads))
    assert float((one - other).norm() / other.norm()) < 1e-5


def test_every_family_packs_but_those_that_cannot(build, family):
    assert Trunk(build(family), SIZE).packs is (family not in BYPASS)


def test_a_stream_and_padded_rows_agree(build, family):
    trunk = Trunk(build(family), SIZE)
    if family in BYPASS:
        pytest.skip("this family has padded rows only")
    _agree(_both(trunk, _batch()))


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_shorter_than_the_rows(build, family):
    trunk = Trunk(build(family, **WINDOWED[family]), SIZE)
    assert trunk.packs
    _agree(_both(trunk, _batch()))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_encoders_see_both_ways_and_share_nothing(build, family):
    trunk = Trunk(build(family, speaks=False, is_decoder=False), SIZE)
    batch = _batch()
    assert trunk.packs
    assert not trunk.causal
    stream = trunk.hidden(batch.tokens_BT, batch.real_BT)
    assert int(trunk.read(batch.tokens_BT, batch.real_BT).last_BT.max()) + 1 == int(batch.real_BT.sum())
    trunk.packs = False
    torch.testing.assert_close(stream, trunk.hidden(batch.tokens_BT, batch.real_BT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_stream_may_be_longer_than_the_context(build, family):
    small = {"n_positions": 32} if family == "gpt2" else {"max_position_embeddings": 32}
    trunk = Trunk(build(family, speaks=family == "gpt2", **small), SIZE)
    batch = _batch()
    assert int(batch.real_BT.sum()) > trunk.context == 32
    stream = trunk.hidden(batch.tokens_BT, batch.real_BT)
    trunk.packs = False
    torch.testing.assert_close(stream, trunk.hidden(batch.tokens_BT, batch.real_BT), atol=1e-5, rtol=0)


def test_checkpointed_activations_attend_as_before(build):
    trunk, batch = Trunk(build("llama"), SIZE), _batch()
    plain = _both(trunk, batch)[0]
    trunk.packs = True
    trunk.checkpoint_activations()
    _agree([_both(trunk, batch)[0], plain])


def test_common_beginnings_are_told_once(build):
    trunk, batch = Trunk(build("gpt2"), SIZE), _batch()
    # three rows share 12 tokens with the first, and a twin keeps one token of its nine to itself
    expected = int(batch.real_BT.sum()) - 3 * 12 - 8
    assert int(trunk.read(batch.tokens_BT, batch.real_BT).last_BT.max()) + 1 == expected


def test_streams_have_usual_lengths_and_what_fills_them_is_nobodys(build, monkeypatch):
    """oneDNN prepares a kernel for each length; so few lengths come about, with the same numbers and gradients."""
    trunk, batch = Trunk(build("gpt2"), SIZE), _batch()
    found = []
    for usual in (lambda count: count, lambda count: count + 37):
        monkeypatch.setattr(trunk, "usual", usual)
        found.append(_both(trunk, batch)[0])
        trunk.packs = True
    assert trunk.read(batch.tokens_BT, batch.real_BT).hidden_ND.shape[0] == int(batch.real_BT.sum()) - 3 * 12 - 8 + 37
    _agree(found)


def test_outside_of_a_layout_the_model_is_as_it_was(build):
    model = build("llama")
    before = model.config._attn_implementation
    trunk, batch = Trunk(model, SIZE), _batch()
    trunk.hidden(batch.tokens_BT, batch.real_BT)
    assert model.config._attn_implementation == before
    padded = model(input_ids=batch.tokens_BT, attention_mask=batch.real_BT.long()).logits
    assert padded.shape == (9, 24, 64)


def test_attention_that_was_asked_for_runs_on_padded_rows(build, tmp_path):
    from palate.models.make import Make, make
    from palate.models.save import Card, save

    loaded = make(Make(hidden_size=16, layers=1, heads=2, vocabulary=300, context=32), ["a b c"], 1)
    save(
        tmp_path / "model", loaded.trunk, loaded.tokenizer, Card(title="t", base="b", data={}, settings={}, metrics={})
    )
    assert load(tmp_path / "model").trunk.packs
    assert not load(tmp_path / "model", how=Loading(attention="eager")).trunk.packs


def test_what_a_layout_does_not_know_is_not_ignored(build):
    """A family that hands attention something unknown is left on the padded path."""
    trunk = Trunk(build("llama"), SIZE)
    layer = trunk.base.layers[0].self_attn
    query = torch.zeros(1, 4, 3, 8)
    with pytest.raises(attention.Bypassed):
        attention._attention(layer, query, query, query, None)
    with attention.laid_out(trunk.base, pack(torch.ones(1, 3).long(), torch.ones(1, 3).bool(), True)):
        attention._attention(layer, query, query, query, None, scaling=1.0)
        for unknown in ("s_aux", "position_bias"):
            with pytest.raises(attention.Bypassed):
                attention._attention(layer, query, query, query, None, **{unknown: torch.zeros(4)})


WRONG = {
    "rows see the row before": lambda p: replace(
        p, buckets=tuple(replace(b, index_bL=(b.index_bL - 3).clamp(min=0), whole=False) for b in p.buckets)
    ),
    "positions run on": lambda p: replace(p, position_N=torch.arange(len(p.position_N))),
    "cells point one too far": lambda p: replace(p, last_BT=(p.last_BT + 1) % len(p.tokens_N)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_layout_is_seen(build, monkeypatch, name):
    trunk, batch = Trunk(build("gpt2"), SIZE), _batch()
    monkeypatch.setattr("palate.models.trunk.pack", lambda *a, **k: WRONG[name](packed.pack(*a, **k)))
    with pytest.raises(AssertionError):
        _agree(_both(trunk, batch))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_cell_finds_its_token(data):
    """Whatever the rows: each real cell points at its own token, behind the same beginning, in a bucket of its own."""
    rows, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 30))
    tokens = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=rows, max_size=rows))
    )
    real = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=rows, max_size=rows))
    )
    share, more = data.draw(st.booleans()), data.draw(st.integers(0, 5))
    filled = pack(tokens, real, share, lambda count: count + more)
    assert filled.filled == more
    stay = len(filled.tokens_N) - more
    found = replace(filled, tokens_N=filled.tokens_N[:stay], position_N=filled.position_N[:stay])
    assert torch.equal(found.tokens_N[found.last_BT][real], tokens[real])
    positions = real.long().cumsum(-1) - 1
    assert torch.equal(found.position_N[found.last_BT][real], positions[real])
    assert found.shares or len(found.tokens_N) == int(real.sum()) + int((~real.any(-1)).sum())
    begun = [found.tokens_N[row][mask].tolist() for row, mask in zip(found.last_BT, real, strict=True)]
    seen = [
        found.tokens_N[bucket.index_bL][i][bucket.real_bL[i]].tolist()
        for bucket in found.buckets
        for i in range(len(bucket.index_bL))
    ]
    assert sorted(row or [int(tokens[i, 0])] for i, row in enumerate(begun)) == sorted(seen)
    assert sum(len(bucket.mine_M) for bucket in found.buckets) == len(found.tokens_N)
    own = torch.cat([bucket.index_bL.flatten()[bucket.mine_M] for bucket in found.buckets])
    assert torch.equal(own, torch.arange(len(found.tokens_N)))
