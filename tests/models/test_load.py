"""Loading: what a user can get wrong is said in one message."""

from __future__ import annotations

import contextlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, RobertaForCausalLM

from palate.models.heads import fresh_head
from palate.models.load import Loading, load
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.settings import PalateError, parse

TEXTS = ["the soup is hot and the wine is red"] * 5
CARD = Card("Soup", "nothing")


@pytest.fixture(scope="module")
def made():
    return make(Make(hidden_size=32, layers=1, heads=4, vocabulary=280), TEXTS, 1)


@pytest.fixture
def policy(made, tmp_path):
    save(tmp_path / "policy", made.trunk, made.tokenizer, CARD)
    return tmp_path / "policy"


def _reward(made, folder, trained: bool):
    head = fresh_head(32, "reference", 1)
    head.trained = trained
    save(folder, made.trunk, made.tokenizer, CARD, head=head)
    return folder


def test_a_missing_folder(tmp_path):
    with pytest.raises(PalateError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_a_hub_id_without_a_network():
    with pytest.raises(PalateError, match=r"somebody/nothing: neither a folder nor a model.*HF_HUB_OFFLINE"):
        load("somebody/nothing")


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(PalateError, match=r"no config.json here"):
        load(tmp_path)


def test_a_folder_without_weights(policy):
    (policy / "model.safetensors").unlink()
    with pytest.raises(PalateError, match=r"no weights \(\*.safetensors\) here"):
        load(policy)


def test_pickle_weights_are_refused_unless_trusted(policy, made):
    torch.save(load_file(policy / "model.safetensors"), policy / "pytorch_model.bin")
    (policy / "model.safetensors").unlink()
    with pytest.raises(PalateError, match=r"pickle files.*allow_pickle"):
        load(policy)
    trusted = load(policy, how=Loading(allow_pickle=True))
    torch.testing.assert_close(trusted.trunk.state_dict(), made.trunk.state_dict())


class _Poison:
    """Pickled, this is a command: whoever unpickles it runs it."""

    def __init__(self, ran):
        self.ran = ran

    def __reduce__(self):
        return (os.system, (f"touch {self.ran}",))


@pytest.mark.parametrize("plain", [False, True], ids=["torch", "pickle"])
def test_a_malicious_pickle_is_not_run_even_when_pickle_is_allowed(policy, tmp_path, plain):
    (policy / "model.safetensors").unlink()
    weights, ran = policy / "pytorch_model.bin", tmp_path / "ran"
    poison = {"model.embed_tokens.weight": _Poison(ran)}
    weights.write_bytes(pickle.dumps(poison)) if plain else torch.save(poison, weights)
    with pytest.raises(PalateError, match=r"pickle files .*any code.*set allow_pickle: true"):
        load(policy)
    with pytest.raises(PalateError, match="the model cannot be loaded"):
        load(policy, how=Loading(allow_pickle=True))
    assert not ran.exists()
    pickle.loads(weights.read_bytes()) if plain else torch.load(weights, weights_only=False)
    assert ran.exists(), "the poison works"


def test_pickles_beside_safetensors_are_not_looked_at(policy, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (policy / name).write_bytes(pickle.dumps(_Poison(tmp_path / "ran")))
    load(policy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "cuda:99", "gpu", "meta", "", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_with_the_settings(device):
    if device in ("cuda", "cuda:3") and torch.cuda.device_count() > 3:
        pytest.skip("this machine has it")
    with pytest.raises(PalateError, match=r"^stages\.0\.loading\.device: ") as caught:
        parse(Loading, {"device": device}, "stages.0.loading")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "auto"])
def test_a_device_that_is_there_is_taken(device):
    assert parse(Loading, {"device": device}, "stages.0.loading").place.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", '{"model_type": "llama", "hidden_size": -3}'),
        ("config.json", "[" * 100_000),
        ("config.json", '{"model_type": 7}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\x00\x01"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_a_damaged_file_of_a_model_folder_is_one_line(policy, name, body):
    (policy / name).write_text(body)
    with pytest.raises(PalateError, match=str(policy)) as caught:
        load(policy)
    assert "\n" not in str(caught.value)


def test_broken_weights(policy):
    (policy / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PalateError, match="the model cannot be loaded"):
        load(policy)


def test_a_weight_that_is_missing_is_an_error_and_not_a_random_draw(policy):
    weights = load_file(policy / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, policy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PalateError, match=r"1 weights are not in its files, for example model.layers.0.mlp.up_proj"):
        load(policy)


def test_remote_code_is_never_run(policy):
    config = json.loads((policy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (policy / "config.json").write_text(json.dumps(config))
    (policy / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(PalateError, match="the model cannot be loaded"):
        load(policy)


def test_a_tokenizers_remote_code_is_never_run(policy):
    settings = json.loads((policy / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (policy / "tokenizer_config.json").write_text(json.dumps(settings))
    (policy / "evil.py").write_text("raise SystemExit('ran')")
    with contextlib.suppress(PalateError):  # refused, or read by transformers' own class; never run
        load(policy)


def test_a_policy_without_an_end_token(policy):
    settings = json.loads((policy / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (policy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(PalateError, match="no end-of-sequence token"):
        load(policy)
    assert load(policy, how=Loading(end_token="<eos>")).tokenizer.eos == 2
    assert load(policy, "trunk").tokenizer.eos is None
    with pytest.raises(PalateError, match="no token '</s>'"):
        load(policy, how=Loading(end_token="</s>"))


def test_a_tokenizer_of_another_model(policy):
    bigger = make(
        Make(hidden_size=32, layers=1, heads=4, vocabulary=400), [*TEXTS, "quite other words, more of them"], 1
    )
    bigger.tokenizer.save(policy)
    with pytest.raises(PalateError, match="Give the model its own tokenizer"):
        load(policy)


def test_a_policy_is_no_reward_model(policy):
    with pytest.raises(PalateError, match="no trained reward head"):
        load(policy, "reward")


def test_an_untrained_reward_head_is_an_error(made, tmp_path):
    folder = _reward(made, tmp_path / "reward", trained=False)
    with pytest.raises(PalateError, match="no trained reward head"):
        load(folder, "reward")
    assert load(folder, "trunk").head is not None


def test_a_reward_model_is_no_policy(made, tmp_path):
    folder = _reward(made, tmp_path / "reward", trained=True)
    if made.trunk.model.config.tie_word_embeddings:  # the folder must not pass for a policy through its tied table
        with pytest.raises(PalateError, match="reward model cannot be a policy"):
            load(folder)


def test_a_classifier_with_many_labels_is_no_reward_model(made, tmp_path):
    config = made.trunk.model.config
    config = type(config).from_dict({**config.to_dict(), "num_labels": 3})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    made.tokenizer.save(tmp_path)
    with pytest.raises(PalateError, match="3 outputs; a reward model has one"):
        load(tmp_path, "reward")


def test_an_encoder_classifier_of_other_software_is_refused(build, made, tmp_path):
    encoder = build("roberta", is_decoder=False, vocab_size=made.tokenizer.size, num_labels=1)
    AutoModelForSequenceClassification.from_config(encoder.config).save_pretrained(tmp_path)
    made.tokenizer.save(tmp_path)
    with pytest.raises(PalateError, match="judges from its first token"):
        load(tmp_path, "reward")


def test_an_encoder_is_no_policy_unless_it_is_made_causal(build, made, tmp_path):
    config = build("roberta", is_decoder=False, vocab_size=made.tokenizer.size).config
    RobertaForCausalLM(config).save_pretrained(tmp_path)
    made.tokenizer.save(tmp_path)
    with pytest.raises(PalateError, match=r"bidirectional.*make_causal"):
        load(tmp_path)
    assert load(tmp_path, how=Loading(make_causal=True)).trunk.causal
    assert not load(tmp_path, "trunk").trunk.causal


def test_a_family_that_cannot_speak_is_refused_as_policy(build, made, tmp_path):
    build("deberta-v2", speaks=False, intermediate_size=48, vocab_size=made.tokenizer.size).save_pretrained(tmp_path)
    made.tokenizer.save(tmp_path)
    with pytest.raises(PalateError, match="deberta-v2 is an encoder"):
        load(tmp_path)
    assert not load(tmp_path, "trunk").trunk.causal


def test_settings_reach_the_weights(policy):
    loaded = load(policy, how=Loading(dtype="bfloat16", attention="eager", checkpoint_activations=True, device="cpu"))
    assert loaded.trunk.dtype == torch.bfloat16
    assert loaded.trunk.model.config._attn_implementation == "eager"
    assert loaded.trunk.recomputes


def test_loading_leaves_transformers_verbosity_alone(policy):
    from transformers.utils import logging

    before = logging.get_verbosity()
    load(policy)
    assert logging.get_verbosity() == before
    assert AutoConfig.from_pretrained(policy).model_type == "llama"
