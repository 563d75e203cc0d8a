"""Tiny random models of every family that palate offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 64

_GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": _GATED,
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 8},
    "mistral": _GATED,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {},
    "gpt_neox": {"intermediate_size": 48},
    "roberta": {"intermediate_size": 48, "is_decoder": True},
    "gemma2": {**_GATED, "head_dim": 8},
    "granite": {**_GATED, "logits_scaling": 3.0},
    "cohere": {**_GATED, "logit_scale": 0.25},
}

Builder = Callable[..., PreTrainedModel]


def _build(family: str, speaks: bool = True, **more: Any) -> PreTrainedModel:
    """A random model whose every parameter matters: biases and norms are off their defaults, dropout is on."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **{**sizes, **ends, **FAMILIES.get(family, {}), **more})
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.3)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = (AutoModelForCausalLM if speaks else AutoModel).from_config(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = noise * 0.3 if parameter.dim() > 1 else parameter.data + 0.1 * noise
    return model


@pytest.fixture
def build() -> Builder:
    """Builds a tiny random model of a family."""
    return _build


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family offered as a policy."""
    return request.param
