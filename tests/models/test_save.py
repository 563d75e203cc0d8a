"""Saving: transformers reads what we wrote, with the same numbers; a folder is whole or not there."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from palate.models.heads import fresh_head
from palate.models.load import load
from palate.models.lora import adapter_parameters, add_adapter, wear
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.models.trunk import Trunk

TEXTS = ["the soup is hot and the wine is red"] * 5
ARCHITECTURES = ["gpt2", "llama", "qwen2", "qwen3", "opt", "bloom", "gpt_neox"]
TOKENS = torch.randint(3, 260, (2, 9), generator=torch.Generator().manual_seed(5))
REAL = torch.ones_like(TOKENS, dtype=torch.bool)
CARD = Card("Soup", "nothing", data={"tasting room": "abc123"}, settings={"kl": 0.1}, metrics={"reward": 1.5})


@pytest.fixture(params=ARCHITECTURES)
def loaded(request):
    made = make(Make(architecture=request.param, hidden_size=32, layers=2, heads=4, vocabulary=280), TEXTS, 1)
    for p in made.trunk.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return made


def _logits(trunk: Trunk) -> torch.Tensor:
    return trunk.logits(trunk.hidden(TOKENS, REAL))


def _trained_head():
    head = fresh_head(32, "reference", 1)
    head.gain.data.fill_(2.0)
    head.bias.data.fill_(-0.5)
    head.trained = True
    return head


def test_a_policy_comes_back_the_same_here_and_in_transformers(loaded, tmp_path):
    folder = tmp_path / "model"
    save(folder, loaded.trunk, loaded.tokenizer, CARD)
    expected = _logits(loaded.trunk)
    torch.testing.assert_close(_logits(load(folder).trunk), expected, atol=0, rtol=0)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits, expected)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("the soup<eos>", "Red WINE 1987\n\n  it's"):
        assert theirs(text)["input_ids"] == loaded.tokenizer.encode(text)
    assert theirs.chat_template == loaded.tokenizer.inner.chat_template


def test_the_folder_says_where_to_stop_and_what_it_is(loaded, tmp_path):
    folder = tmp_path / "model"
    save(folder, loaded.trunk, loaded.tokenizer, CARD)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == loaded.tokenizer.eos
    assert generation.pad_token_id == loaded.tokenizer.pad
    readme = (folder / "README.md").read_text()
    assert readme.startswith('---\nbase_model: "nothing"\n')
    for told in ("# Soup", "tasting room", "abc123", "reward", "1.5", '"kl": 0.1'):
        assert told in readme
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}


def test_every_end_of_the_base_is_kept(tmp_path):
    made = make(Make(hidden_size=32, layers=1, heads=4, vocabulary=280), TEXTS, 1)
    made.trunk.model.generation_config = GenerationConfig(eos_token_id=[7, made.tokenizer.eos])
    save(tmp_path / "model", made.trunk, made.tokenizer, CARD)
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [made.tokenizer.eos, 7]


def test_a_reward_model_comes_back_the_same(loaded, tmp_path):
    folder, head = tmp_path / "model", _trained_head()
    save(folder, loaded.trunk, loaded.tokenizer, CARD, head=head)
    expected = head(loaded.trunk.hidden(TOKENS, REAL))
    again = load(folder, "reward")
    assert again.head.trained
    torch.testing.assert_close(again.head(again.trunk.hidden(TOKENS, REAL)), expected, atol=0, rtol=0)
    assert AutoConfig.from_pretrained(folder).num_labels == 1
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)(TOKENS).logits[:, 0]
    torch.testing.assert_close(theirs - 0.5, expected[:, -1].detach(), atol=1e-5, rtol=1e-5)


def test_a_classifier_of_other_software_is_a_reward_model(loaded, tmp_path):
    folder = tmp_path / "model"
    config = loaded.trunk.model.config
    config.num_labels, config.pad_token_id = 1, loaded.tokenizer.pad
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.save_pretrained(folder)
    loaded.tokenizer.save(folder)
    ours = load(folder, "reward")
    expected = theirs(TOKENS).logits[:, 0]
    torch.testing.assert_close(ours.head(ours.trunk.hidden(TOKENS, REAL)[:, -1]), expected, atol=1e-5, rtol=1e-5)


def test_an_mlp_head_and_an_encoder_come_back_too(build, tmp_path):
    made = make(Make(hidden_size=32, layers=1, heads=4, vocabulary=280), TEXTS, 1)
    encoder = Trunk(build("roberta", speaks=False, is_decoder=False, vocab_size=made.tokenizer.size), 280)
    encoder.model.pooler = None
    for name, trunk, kind in (("mlp", made.trunk, "mlp"), ("encoder", encoder, "linear")):
        head = fresh_head(32, "reference", 1, kind)
        head.trained = True
        save(tmp_path / name, trunk, made.tokenizer, CARD, head=head)
        again = load(tmp_path / name, "reward")
        expected = head(trunk.hidden(TOKENS, REAL))
        torch.testing.assert_close(again.head(again.trunk.hidden(TOKENS, REAL)), expected, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_an_adapter_is_merged_for_all_and_kept_for_peft(loaded, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "model"
    save(base, loaded.trunk, loaded.tokenizer, CARD)
    add_adapter(loaded.trunk.model, "policy", 4, 8.0, "all-linear", 1)
    for p in adapter_parameters(loaded.trunk.model, "policy").values():
        p.data.normal_(0, 0.1)
    with wear("policy"):
        expected = _logits(loaded.trunk)
    save(folder, loaded.trunk, loaded.tokenizer, Card("Soup", str(base)), adapter="policy")
    for ours in (load(folder), load(folder / "adapter")):
        torch.testing.assert_close(_logits(ours.trunk), expected, atol=1e-5, rtol=1e-5)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "adapter")
    torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_saving_again_replaces_the_whole_folder_and_leaves_nothing_beside_it(tmp_path):
    made = make(Make(hidden_size=32, layers=1, heads=4, vocabulary=280), TEXTS, 1)
    folder = tmp_path / "model"
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "left by a kill").touch()
    save(folder, made.trunk, made.tokenizer, CARD, head=_trained_head())
    save(folder, made.trunk, made.tokenizer, CARD)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (folder / "head.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
