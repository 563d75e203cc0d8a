"""Adapters on disk: PEFT reads ours and we read PEFT's, with the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from palate.models.lora import adapter_parameters, add_adapter, wear
from palate.models.peft_format import CONFIG, WEIGHTS, load_adapter, save_adapter
from palate.models.trunk import Trunk
from palate.settings import PalateError

# peft asks transformers a question under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
REAL = torch.ones_like(TOKENS, dtype=torch.bool)
FAMILIES = ["llama", "gpt2", "opt", "bloom", "gpt_neox", "qwen3"]


def _spoken(trunk: Trunk, name: str) -> torch.Tensor:
    with wear(name):
        return trunk.logits(trunk.hidden(TOKENS, REAL))


@pytest.mark.parametrize("targets", ["all-linear", "some"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_ours(build, family, targets, tmp_path):
    trunk = Trunk(build(family), 64)
    if targets == "some":
        targets = {"llama": ("q_proj",), "gpt2": ("c_attn",), "opt": ("fc1",), "qwen3": ("layers.1.mlp.up_proj",)}.get(
            family, ("query_key_value",)
        )
    add_adapter(trunk.model, "policy", 4, 8.0, targets, 1)
    for p in adapter_parameters(trunk.model, "policy").values():
        p.data.normal_(0, 0.2)
    save_adapter(trunk.model, "policy", tmp_path, "some/base")
    theirs = PeftModel.from_pretrained(build(family), tmp_path).eval()
    torch.testing.assert_close(theirs(TOKENS).logits, _spoken(trunk, "policy"), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_we_read_pefts(build, family, rslora, tmp_path):
    how = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules="all-linear",
        init_lora_weights=False,
        use_rslora=rslora,
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(build(family), how).eval()
    theirs.save_pretrained(tmp_path)
    trunk = Trunk(build(family), 64)
    load_adapter(trunk.model, "policy", tmp_path)
    torch.testing.assert_close(_spoken(trunk, "policy"), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert {path for path, p in trunk.model.named_parameters() if p.requires_grad} == set(
        adapter_parameters(trunk.model, "policy")
    )


def test_what_cannot_be_read_is_refused_with_the_reason(build, tmp_path):
    model = build("llama")
    with pytest.raises(PalateError, match=r"adapter_config.json: cannot be read"):
        load_adapter(model, "policy", tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(PalateError, match="PREFIX_TUNING adapters are not read"):
        load_adapter(model, "policy", tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "use_dora": true, "r": 4, "lora_alpha": 8}')
    with pytest.raises(PalateError, match="uses use_dora"):
        load_adapter(model, "policy", tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(PalateError, match=r"adapter_model.safetensors: cannot be read"):
        load_adapter(model, "policy", tmp_path)


def test_an_adapter_of_another_model_is_refused(build, tmp_path):
    model = build("llama")
    add_adapter(model, "policy", 4, 8.0, "all-linear", 1)
    save_adapter(model, "policy", tmp_path, "base")
    with pytest.raises(PalateError, match=r"wants a layer 'model.layers.0"):
        load_adapter(build("gpt2"), "policy", tmp_path)
    with pytest.raises(PalateError, match="Load the base that the adapter was trained on"):
        load_adapter(build("llama", hidden_size=64), "policy", tmp_path)
    with pytest.raises(PalateError, match="adapter 'other': the model has"):
        save_adapter(model, "other", tmp_path, "base")
