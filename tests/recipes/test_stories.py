"""The stories recipe on the real model and data: the conversion against NumPy, the judge by hand, the whole shrunk."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

from palate.data.encode import Encoding, encode_demonstrations, encode_prompts
from palate.data.source import Data, load
from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.live import Display
from palate.models.load import Loaded
from palate.models.load import load as load_model
from palate.run import execute, plan_file

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STORIES = "$PALATE_DATA/text/tinystories_2k.jsonl.gz"
HELD = 0.15

Array = NDArray[np.float64]

SHRUNK = (
    "stages.sft.data.rows=24",  # of all stages: they share &stories
    "stages.sft.batch_size=4",
    "stages.sft.microbatch_size=4",
    "stages.sft.encoding.max_length=64",
    "stages.reward.data.rows=64",
    "stages.reward.model.hidden_size=16",
    "stages.reward.model.heads=2",
    "stages.reward.model.vocabulary=400",
    "stages.reward.batch_size=8",
    "stages.reward.microbatch_size=8",
    "stages.reward.normalise.rows=8",
    "stages.rlhf.total_episodes=16",
    "stages.rlhf.rollout_batch_size=8",
    "stages.rlhf.microbatch_size=8",
    "stages.rlhf.sampling.max_new_tokens=16",  # of both stages that sample
    "stages.reward_accuracy.comparisons.rows=40",
)


def helper(name: str) -> ModuleType:
    """A file of recipes/stories/, which is no package."""
    specification = importlib.util.spec_from_file_location(name, RECIPES / "stories" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ready(palate_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What prepare.py leaves."""
    folder = tmp_path_factory.mktemp("stories")
    helper("prepare").main(palate_data, folder)
    return folder


@pytest.fixture(scope="module")
def teller(ready: Path) -> Loaded:
    return load_model(str(ready / "stories260K"), "policy")


@pytest.fixture
def data_variable(palate_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALATE_DATA", str(palate_data))
    monkeypatch.chdir(RECIPES.parent)


class Oracle:
    """The forward pass as llama2.c writes it, token by token, straight from the file and in NumPy alone."""

    def __init__(self, path: Path) -> None:
        head = np.fromfile(path, dtype="<i4", count=7)
        self.width, self.inner, self.layers, self.heads, self.kv_heads, self.words, self.context = map(int, head)
        self.floats = np.fromfile(path, dtype="<f4", offset=28).astype(np.float64)
        self.at = 0
        each, d, kv = self.layers, self.width, self.width // self.heads * self.kv_heads
        self.embedding = self.take(self.words, d)
        self.norm_in, self.query, self.key = self.take(each, d), self.take(each, d, d), self.take(each, kv, d)
        self.value, self.out, self.norm_mid = self.take(each, kv, d), self.take(each, d, d), self.take(each, d)
        self.gate, self.down = self.take(each, self.inner, d), self.take(each, d, self.inner)
        self.up, self.norm_out = self.take(each, self.inner, d), self.take(d)

    def take(self, *shape: int) -> Array:
        count = math.prod(shape)
        self.at += count
        return self.floats[self.at - count : self.at].reshape(shape)

    def logits(self, tokens: Sequence[int]) -> Array:
        x_TD = self.embedding[list(tokens)]
        for layer in range(self.layers):
            x_TD = x_TD + self.attend(layer, rms(x_TD) * self.norm_in[layer])
            h_TD = rms(x_TD) * self.norm_mid[layer]
            gate_TF = h_TD @ self.gate[layer].T
            x_TD = x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * (h_TD @ self.up[layer].T)) @ self.down[layer].T
        return rms(x_TD) * self.norm_out @ self.embedding.T

    def attend(self, layer: int, h_TD: Array) -> Array:
        length, size = len(h_TD), self.width // self.heads
        query = turned((h_TD @ self.query[layer].T).reshape(length, self.heads, size))
        key = turned((h_TD @ self.key[layer].T).reshape(length, self.kv_heads, size))
        value = (h_TD @ self.value[layer].T).reshape(length, self.kv_heads, size)
        said = np.zeros((length, self.heads, size))
        for t in range(length):
            for head in range(self.heads):
                shared = head // (self.heads // self.kv_heads)
                score = np.exp(key[: t + 1, shared] @ query[t, head] / math.sqrt(size))
                said[t, head] = score / score.sum() @ value[: t + 1, shared]
        return said.reshape(length, -1) @ self.out[layer].T


def rms(x_TD: Array) -> Array:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-5)


def turned(x_THS: Array) -> Array:
    """Neighbouring numbers as one complex number, turned by its place in the text."""
    length, _, size = x_THS.shape
    angle_TP = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    pairs = (x_THS[..., ::2] + 1j * x_THS[..., 1::2]) * np.exp(1j * angle_TP)[:, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x_THS.shape)


@pytest.mark.data
def test_the_converted_model_computes_what_the_file_says(teller: Loaded, palate_data: Path) -> None:
    tokens = [1, *teller.tokenizer.encode("Lily saw a big cat. It was not happy, so")]
    oracle = Oracle(palate_data / "models" / "stories260K" / "stories260K.bin")
    row = torch.tensor([tokens])
    with torch.no_grad():
        hidden_BTD = teller.trunk.hidden(row, torch.ones_like(row, dtype=torch.bool))
        ours_TV = teller.trunk.logits(hidden_BTD[0]).numpy()
    theirs_TV = oracle.logits(tokens)
    assert np.abs(theirs_TV).max() > 5  # an agreement between numbers, not between zeros
    np.testing.assert_allclose(ours_TV, theirs_TV, atol=2e-4)


@pytest.mark.data
def test_greedy_text_is_a_childrens_story(teller: Loaded, data_variable: None) -> None:
    engine = LocalEngine(teller.trunk, teller.tokenizer, Sampling(max_new_tokens=100))
    start = [1, *teller.tokenizer.encode("Once upon a time")]
    rollouts = engine.generate([start], [0], greedy=True)
    said = teller.tokenizer.decode(rollouts.tokens_BT[0].tolist())
    assert said.startswith(" Once upon a time, there was a little")
    known = {word for record in load(Data(path=STORIES), 1) for word in _words(str(record.completion))}
    told = _words(said)[:-1]  # the last one may be cut
    assert len(told) > 25
    assert set(told) <= known
    assert len(set(told)) > 15  # and it does not go round in a circle


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


@pytest.mark.data
def test_it_expects_the_stories_that_people_kept_for_it(teller: Loaded, data_variable: None) -> None:
    records = load(Data(path=STORIES, rows=16), 1)
    rows = encode_demonstrations(records, teller.tokenizer, Encoding(bos=True, max_length=256)).rows
    nats = [_nats(teller, row.tokens) for row in rows]
    assert 1.0 < sum(nats) / len(nats) < 1.6  # a model of nothing has ln 512 = 6.2


@torch.no_grad()
def _nats(teller: Loaded, tokens: list[int]) -> float:
    row = torch.tensor([tokens])
    logits_TV = teller.trunk.logits(teller.trunk.hidden(row, torch.ones_like(row, dtype=torch.bool))[0])
    return float(torch.nn.functional.cross_entropy(logits_TV[:-1], row[0, 1:]))


@pytest.mark.data
def test_texts_of_prompt_and_answer_join(teller: Loaded) -> None:
    text = "The dog was happy. It ran home"
    tokens = teller.tokenizer.encode(text)
    decoded = [teller.tokenizer.decode(part) for part in (tokens[:7], tokens[7:])]
    assert "".join(decoded) == f" {text}"


@pytest.mark.data
def test_no_held_story_begins_like_one_that_is_trained_on(teller: Loaded, data_variable: None) -> None:
    stories = Data(path=STORIES, held_out=HELD)
    beginnings = Encoding(query_length=48, bos=True)
    train, held = (
        encode_prompts(load(stories, 1, side), teller.tokenizer, beginnings).rows for side in ("train", "held_out")
    )
    assert len(held) >= 256
    assert len({tuple(row.tokens) for row in train + held}) == len(train) + len(held)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("", 0.0),
        ("The table has four legs.", 0.0),
        ("She was happy.", 2.7),
        ("Happy, HAPPY friend!", 2.7 + 2.7 + 2.2),
        ("not a happy day", -0.74 * 2.7),
        ("not one two three happy", 2.7),
        ("He wasn't sad", 0.74 * 2.1),
        ("no", 0.0),
        ("sad but happy :)", -2.1 + 2.7 + 2.0),
    ],
)
def test_vader_by_hand(text: str, total: float) -> None:
    ratings = {"happy": 2.7, "friend": 2.2, "sad": -2.1, ":)": 2.0, "no": -1.2}
    expected = total / math.sqrt(total**2 + 15)
    assert helper("vader").compound(text, ratings) == pytest.approx(expected, abs=1e-12)


@pytest.mark.data
def test_vader_reads_the_published_lexicon(data_variable: None) -> None:
    score = helper("vader").score
    happy = 2.7 / math.sqrt(2.7**2 + 15)
    assert score(["sad sad sad"] * 2, ["They were happy.", "The sky is up."]) == pytest.approx([happy, 0.0])


@pytest.mark.data
def test_the_recipe_runs_shrunk(ready: Path, data_variable: None, tmp_path: Path) -> None:
    places = (
        f"stages.sft.model={ready / 'stories260K'}",
        f"stages.reward.data.path={ready / 'tomatoes_train.jsonl'}",
        f"stages.reward_accuracy.comparisons.path={ready / 'tomatoes_val.jsonl'}",
        f"output_dir={tmp_path}",
    )
    planned = plan_file(RECIPES / "stories.yaml", [*SHRUNK, *places])
    execute(planned, Display(Console(quiet=True)))
    folders = {stage.name: planned.stage_folder(i) for i, stage in enumerate(planned.stages)}
    duel = _read(folders["evaluate"])["models"]["rlhf"]
    assert set(duel["gain"]) == {"vader", "reward"}
    assert 0 < duel["gain"]["vader"]["mean"]["p_value"] <= 1
    assert math.isfinite(duel["kl"]["mean"])
    assert _read(folders["reward_accuracy"])["reward_models"]["reward"]["pairs"] > 5


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
