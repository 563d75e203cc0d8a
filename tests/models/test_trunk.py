"""Trunks: causality, padding, agreement with transformers, the cache, dropout, ids beyond the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from palate.models.trunk import Trunk, position_ids
from palate.settings import PalateError

GOLDEN = Path(__file__).parents[1] / "golden" / "ppo_details.json"
ENCODER = {"intermediate_size": 48, "is_decoder": False}
SIZE = 60  # the tokenizer's; the models have 64 rows


@pytest.fixture
def trunk(build, family) -> Trunk:
    return Trunk(build(family), SIZE)


def _row(length: int = 9, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, SIZE, (rows, length), generator=torch.Generator().manual_seed(3))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def test_positions_are_those_of_the_reference_systems():
    case = json.loads(GOLDEN.read_text())["padding_positions"]
    tokens = torch.tensor(case["inputs"]["tokens"])
    left = torch.tensor(case["outputs"]["left_attention_mask"]).bool()
    assert position_ids(tokens != case["inputs"]["pad_id"]).tolist() == case["outputs"]["openai_positions"]
    assert position_ids(left).tolist() == case["outputs"]["left_positions_exclusive_cumsum"]


def test_editing_a_token_leaves_every_earlier_prediction_alone(trunk):
    tokens, real = _row()
    edited = tokens.clone()
    edited[:, 5] = (tokens[:, 5] + 1) % SIZE
    before, after = (trunk.logits(trunk.hidden(t, real))[..., :SIZE] for t in (tokens, edited))
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=0)
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 1e-3
    assert trunk.causal


def test_head_and_hidden_are_the_models_own_logits(build, family):
    model = build(family).eval()
    tokens, real = _row(rows=2)
    first = 1 if family == "roberta" else 0  # its position table begins after the padding id, here 0
    expected = model(tokens, position_ids=torch.arange(9)[None] + first if first else None).logits
    trunk = Trunk(model, SIZE)
    torch.testing.assert_close(trunk.logits(trunk.hidden(tokens, real))[..., :SIZE], expected[..., :SIZE])


@pytest.mark.parametrize("where", [(0, 0, 0), (2, 0, 0), (0, 0, 3), (0, 2, 0), (1, 3, 2), (5, 1, 7)])
def test_where_padding_is_how_much_and_what_it_holds_does_not_matter(trunk, where):
    tokens, real = _row()
    expected = trunk.hidden(tokens, real)
    left, middle, right = where
    parts = [[-1] * left, tokens[0, :4].tolist(), [-1] * middle, tokens[0, 4:].tolist(), [-1] * right]
    row = torch.tensor([[i for part in parts for i in part]])
    exists = row >= 0
    for garbage in (0, 1, 2, SIZE - 1, 50259):
        found = trunk.hidden(row.masked_fill(~exists, garbage), exists)
        torch.testing.assert_close(found[exists], expected[0], atol=1e-5, rtol=0)


def test_padding_repeats_the_last_real_state(trunk):
    tokens, real = _row(7)
    real[0, 2:4] = False
    real[0, 6] = False
    hidden = trunk.hidden(tokens, real)[0]
    torch.testing.assert_close(hidden[[2, 3, 6]], hidden[[1, 1, 5]], atol=0, rtol=0)


def test_rows_of_other_lengths_in_the_batch_do_not_matter(trunk):
    tokens, real = _row(9, rows=3)
    real[0, 4:], real[1, :3] = False, False
    together = trunk.hidden(tokens.masked_fill(~real, 50259), real)
    for i in range(3):
        alone = trunk.hidden(tokens[i : i + 1, real[i]], torch.ones(1, int(real[i].sum()), dtype=torch.bool))
        torch.testing.assert_close(together[i][real[i]], alone[0], atol=1e-5, rtol=0)


def test_the_cache_gives_what_one_pass_gives(trunk):
    tokens, real = _row(9, rows=3)
    real[0, :2], real[1, 3:5], real[2, 7:] = False, False, False
    expected = trunk.hidden(tokens, real)
    parts, cache = [], None
    for start, end in ((0, 5), (5, 6), (6, 9)):
        hidden, cache = trunk.extend(tokens[:, start:end], real[:, :end], cache)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=1e-5, rtol=0)


def test_dropout_is_off_in_training_too(trunk):
    tokens, real = _row()
    trunk.train()
    trunk.model.train()
    assert torch.equal(trunk.hidden(tokens, real), trunk.hidden(tokens, real))
    assert all(m.p == 0 for m in trunk.modules() if isinstance(m, nn.Dropout))


def test_ids_beyond_the_tokenizer_cannot_be_said(trunk):
    logits = trunk.logits(trunk.hidden(*_row()))
    assert torch.isneginf(logits[..., SIZE:]).all()
    assert torch.isfinite(logits[..., :SIZE]).all()
    assert logits.dtype == torch.float32


def test_logits_are_float32_in_a_half_precision_trunk(build):
    trunk = Trunk(build("llama").to(torch.bfloat16), SIZE)
    assert trunk.hidden(*_row()).dtype == torch.bfloat16
    assert trunk.logits(trunk.hidden(*_row())).dtype == torch.float32


@pytest.mark.parametrize("name", ["roberta", "bert", "deberta-v2"])
def test_encoders_are_found_bidirectional_and_ignore_padding(build, name):
    trunk = Trunk(build(name, speaks=False, **ENCODER), SIZE)
    assert not trunk.causal
    assert not trunk.speaks
    tokens, real = _row()
    expected = trunk.hidden(tokens, real)
    row = torch.cat([torch.full((1, 2), 50259), tokens[:, :4], torch.full((1, 3), 1), tokens[:, 4:]], 1)
    exists = torch.tensor([[False] * 2 + [True] * 4 + [False] * 3 + [True] * 5])
    torch.testing.assert_close(trunk.hidden(row, exists)[exists], expected[0], atol=1e-5, rtol=0)


def test_roberta_without_its_causal_mask_is_found_out(build):
    assert not Trunk(build("roberta", **ENCODER), SIZE).causal
    assert Trunk(build("roberta"), SIZE).causal


def test_a_family_that_treats_its_logits_unknown_ways_is_refused(build):
    model = build("llama")
    model.register_forward_hook(lambda _m, _i, out: setattr(out, "logits", out.logits + 1.0))
    with pytest.raises(PalateError, match="llama: this family does something to its logits"):
        Trunk(model, SIZE)


def test_a_sequence_beyond_the_context_is_refused(build):
    trunk = Trunk(build("gpt2", max_position_embeddings=16), SIZE)
    tokens, real = _row(17)
    with pytest.raises(PalateError, match="17 tokens does not fit the context of 16"):
        trunk.hidden(tokens, real)
    real[0, 3] = False
    assert trunk.hidden(tokens, real).shape == (1, 17, 32)


def test_a_family_without_a_cache_cannot_be_sampled(build):
    trunk = Trunk(build("mamba"), SIZE)
    tokens, real = _row()
    with pytest.raises(PalateError, match="mamba: this family keeps no keys and values"):
        trunk.extend(tokens, real, None)


def test_a_trunk_without_a_head_does_not_speak(build):
    trunk = Trunk(build("llama", speaks=False), SIZE)
    assert not trunk.speaks
    with pytest.raises(PalateError, match="no language-model head"):
        trunk.logits(torch.zeros(1, 32))


def test_checkpointed_activations_give_the_same_gradient(build):
    tokens, real = _row(rows=2)
    grads = []
    for recompute in (False, True):
        trunk = Trunk(build("llama"), SIZE)
        if recompute:
            trunk.checkpoint_activations()
        trunk.logits(trunk.hidden(tokens, real))[..., :SIZE].square().sum().backward()
        grads.append([p.grad for p in trunk.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_a_checkpointing_trunk_still_caches(build):
    trunk = Trunk(build("llama"), SIZE)
    trunk.checkpoint_activations()
    tokens, real = _row()
    trunk.hidden(tokens, real).sum().backward()
    expected = trunk.hidden(tokens, real)
    _, cache = trunk.extend(tokens[:, :6], real[:, :6], None)
    found, _ = trunk.extend(tokens[:, 6:], real, cache)
    torch.testing.assert_close(found, expected[:, 6:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pad", [0, 5, None])
def test_padding_draws_no_warning_of_a_missing_mask(build, pad, caplog):
    trunk = Trunk(build("gpt2", pad_token_id=pad), SIZE)
    tokens, real = _row(rows=2)
    real[0, 5:] = False
    trunk.hidden(tokens, real)
    assert not caplog.records
