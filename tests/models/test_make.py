"""Models from nothing: every architecture, deterministic, of the size asked for."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from palate.models.load import Loaded, Loading
from palate.models.make import Architecture, Make, make
from palate.settings import PalateError, parse

TEXTS = ["the soup is hot and the wine is red"] * 5
SMALL = {"hidden_size": 32, "layers": 2, "heads": 4, "vocabulary": 280, "context": 32}


def _make(architecture: str, key: int = 1, **more: object) -> Loaded:
    return make(parse(Make, {"architecture": architecture, **SMALL, **more}), TEXTS, key)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_architecture_speaks_causally_and_stops_at_its_context(architecture):
    loaded = _make(architecture)
    trunk = loaded.trunk
    assert trunk.causal
    assert trunk.speaks
    assert trunk.caches
    assert (trunk.width, trunk.context, trunk.vocabulary) == (32, 32, loaded.tokenizer.size)
    assert trunk.model.config.eos_token_id == loaded.tokenizer.eos
    assert not torch.isinf(trunk.logits(torch.randn(2, 32))).any()


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_the_key_decides_the_weights_bit_for_bit(architecture):
    torch.manual_seed(1)
    first = _make(architecture).trunk.state_dict()
    torch.manual_seed(2)
    torch.testing.assert_close(_make(architecture).trunk.state_dict(), first, atol=0, rtol=0)
    other = _make(architecture, key=2).trunk.state_dict()
    assert any(not torch.equal(other[k], first[k]) for k in first)


def test_a_made_model_comes_into_memory_as_loading_says():
    settings = parse(Make, SMALL)
    asked = Loading(compute="bfloat16", attention="eager", checkpoint_activations=True, device="cpu")
    made, plain = make(settings, TEXTS, 1, asked).trunk, make(settings, TEXTS, 1).trunk
    assert (made.computes_in, made.packs, made.recomputes) == (torch.bfloat16, False, True)
    assert (plain.computes_in, plain.packs, plain.recomputes) == (torch.float32, True, False)
    assert made.model.config._attn_implementation == "eager"
    torch.testing.assert_close(made.state_dict(), plain.state_dict(), atol=0, rtol=0)
    assert make(settings, TEXTS, 1, Loading(dtype="bfloat16")).trunk.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "value"), [("end_token", "<end>"), ("make_causal", True)])
def test_what_only_a_folder_can_have_is_refused(name, value):
    with pytest.raises(PalateError, match=rf"loading\.{name} is for models from a folder"):
        make(parse(Make, SMALL), TEXTS, 1, Loading(**{name: value}))


def test_making_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    _make("gpt2")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_tie_means_one_table(architecture):
    sizes = {}
    for tie in (True, False):
        trunk = _make(architecture, tie=tie).trunk
        sizes[tie] = sum(p.numel() for p in trunk.parameters())
    assert sizes[False] - sizes[True] == trunk.vocabulary * 32


def test_the_settings_reach_the_configuration():
    config = _make("llama", kv_heads=2, rope_theta=5000.0, intermediate_size=80).trunk.model.config
    assert (config.num_key_value_heads, config.intermediate_size) == (2, 80)
    assert config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 30, "heads": 4}, "hidden_size 30 is not a multiple of heads 4"),
        ({"architecture": "gpt2", "kv_heads": 2}, "gpt2 has no kv_heads"),
        ({"heads": 4, "kv_heads": 3}, "heads 4 is not a multiple of kv_heads 3"),
        ({"hidden_size": 12, "heads": 4}, "hidden_size / heads must be even"),
        ({"vocabulary": 10}, "vocabulary: Input should be greater than or equal to 259"),
        ({"layer": 3}, "no setting 'layer'. Did you mean 'layers'"),
        ({"architecture": "gtp2"}, "architecture"),
    ],
)
def test_what_cannot_be_made_is_refused(given, message):
    with pytest.raises(PalateError, match=message):
        parse(Make, given)
