"""The state of a real step is what the arithmetic says, in every layout; models weigh what they do."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bench import memory, memory_page, rig, sizes
from bench.sizes import FLOAT32, GPT2, MIXED, SEVEN, SEVENTY, Held, Model, held, state
from palate.models.lora import adapter_parameters, add_adapter

SHAPE = rig.Shape(3, 32, 2, 300, 64)
PAPER = Model("tiny", 3, 32, 32, 128, 300, 2, gated=False, tied=True, positions=64, biases=True)


def _llama(model: Model) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        intermediate_size=model.inner,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_width * model.heads // model.width,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("model", [SEVEN, SEVENTY], ids=lambda m: m.name)
def test_parameters_are_those_of_transformers_own_model(model: Model) -> None:
    with torch.device("meta"):
        made = _llama(model)
    assert model.total == sum(p.numel() for p in made.parameters())
    linear = [p for name, p in made.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert model.multiplied == sum(p.numel() for p in linear)


def test_gpt2_weighs_what_it_is_known_to() -> None:
    with torch.device("meta"):
        made = GPT2LMHeadModel(GPT2Config())
    assert sum(p.numel() for p in made.parameters()) == GPT2.total == 124_439_808


def test_an_adapter_has_the_parameters_of_a_real_one() -> None:
    model = _llama(small := Model("small", 2, 32, 16, 48, 64, 4))
    add_adapter(model, "policy", 4, 8.0, "all-linear", 0)
    assert small.adapter(4) == sum(p.numel() for p in adapter_parameters(model, "policy").values())
    assert sizes.SEVEN.adapter(16) == 41_943_040  # 80 MB in half precision


def test_the_state_of_four_full_models_by_hand() -> None:
    assert held(PAPER, "separate") == Held(2 * PAPER.total, 2 * PAPER.total)
    assert state(Held(10, 5), FLOAT32) == {"weights": 60, "gradients": 40, "moments": 80}
    assert state(Held(10, 5), MIXED) == {"weights": 70, "gradients": 40, "moments": 80}
    assert held(PAPER, "separate", critic=False, fourth="none") == Held(PAPER.total, PAPER.total)


@pytest.mark.parametrize("name", list(memory.LAYOUTS))
def test_a_real_step_holds_what_the_arithmetic_says(name: str) -> None:
    layout = memory.LAYOUTS[name]
    seen = memory.measure(layout, SHAPE)
    kind = next(kind for kind in sizes.KINDS if kind == name)
    paper = state(held(PAPER, kind, top=2), FLOAT32)
    head = (SHAPE.width + 3) * FLOAT32.weights  # of value and of reward; the value's gain and bias do not train
    assert seen["weights"] == paper["weights"] + 2 * head
    assert seen["gradients"] == paper["gradients"] + head - 2 * FLOAT32.gradients
    assert seen["moments"] == paper["moments"] + 2 * head - 2 * FLOAT32.moments
    assert seen["peak"] >= seen["resident"]


def test_the_page_shows_every_layout_beside_the_arithmetic() -> None:
    seen = dict.fromkeys(("weights", "buffers", "gradients", "moments", "resident", "trimmed", "peak"), 10**9)
    text = memory.page(dict.fromkeys(memory.LAYOUTS, seen))
    assert "| separate | 2.000 | 1.000 | 1.000 | 4.000 | 4.978 |" in text
    assert "| hydra, 2 of 12 | 1.22 GB | 1.06 GB | likewise: 1.06 GB |" in text
    assert "| adapters | 30.5 GB | 16.1 GB | 290 GB | 149 GB |" in "\n".join(memory_page.rest())
