"""The Python door: rows and functions in, a model that speaks out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import palate
from palate.settings import PalateError

TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "vocabulary": 300, "context": 64}
ROWS = [{"prompt": f"say {i % 7}:", "completion": f" {i % 7}."} for i in range(32)]
PROMPTS = [f"say {i}:" for i in range(7)]


def brief(prompts: list[str], completions: list[str]) -> list[float]:
    """Shorter is better."""
    return [-float(len(c)) for c in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("door") / "runs"


@pytest.fixture(scope="module")
def taught(home: Path) -> palate.Trained:
    return palate.sft(TINY, ROWS, output_dir=str(home), batch_size=8, learning_rate=1e-2, num_train_epochs=3)


def test_sft_learns_and_says_so(taught: palate.Trained, home: Path) -> None:
    assert taught.run == home / "sft-1"
    assert taught.metrics[-1]["loss"] < 4.0
    assert json.loads((home / "sft-1" / "data.jsonl").read_text().splitlines()[0]) == ROWS[0]


def test_answers_depend_on_prompt_and_seed_alone(taught: palate.Trained) -> None:
    together = taught.generate(PROMPTS, max_new_tokens=6)
    alone = [taught.generate(prompt, max_new_tokens=6)[0] for prompt in PROMPTS]
    assert together == alone
    assert taught.generate(PROMPTS, seed=2, max_new_tokens=6) != together
    assert taught.generate("say 1:", greedy=True) == taught.generate("say 1:", seed=9, greedy=True)


def test_what_is_saved_is_what_transformers_loads(taught: palate.Trained, tmp_path: Path) -> None:
    saved = taught.save_pretrained(tmp_path / "mine")
    model = AutoModelForCausalLM.from_pretrained(saved)
    ids = torch.tensor([taught.loaded.tokenizer.encode("say 1:")])
    theirs = model(ids).logits[0, -1, : taught.loaded.trunk.vocabulary]
    ours = taught.loaded.trunk.logits(taught.loaded.trunk.hidden(ids, torch.ones_like(ids, dtype=torch.bool))[0, -1:])
    torch.testing.assert_close(ours[0, : theirs.shape[0]], theirs, atol=1e-5, rtol=1e-5)
    assert palate.load(saved).generate("say 1:", greedy=True) == taught.generate("say 1:", greedy=True)


def test_a_function_rewards_and_the_policy_follows_it(taught: palate.Trained, home: Path) -> None:
    settings = {
        "total_episodes": 256,
        "rollout_batch_size": 32,
        "max_new_tokens": 8,
        "learning_rate": 1e-2,
        "kl_coef": 0.0,
    }
    better = palate.train(taught, reward=brief, prompts=PROMPTS * 5, output_dir=str(home), **settings)
    scores = [row["objective/scores"] for row in better.metrics]
    assert len(scores) == 8
    assert scores[-1] > scores[0] + 1.0
    assert len(better.generate(PROMPTS)) == len(PROMPTS)
    assert palate.load(home / "ppo-1").folder == better.folder


def test_preferences_make_a_reward_model_that_rewards(taught: palate.Trained, home: Path) -> None:
    pairs = [{"prompt": p, "chosen": " yes.", "rejected": " no no no."} for p in PROMPTS] * 4
    judge = palate.reward(taught, pairs, output_dir=str(home), batch_size=7, learning_rate=1e-2, logging_steps=1)
    assert judge.metrics[-1]["accuracy"] == 1.0
    settings = {"total_episodes": 16, "rollout_batch_size": 16, "max_new_tokens": 4}
    again = palate.train(taught, reward=judge, prompts=PROMPTS, output_dir=str(home), name="judged", **settings)
    assert again.metrics[-1]["step"] == 1


def test_a_named_run_goes_on_where_it_was_and_sees_a_changed_function(taught: palate.Trained, home: Path) -> None:
    def run(factor: float) -> str:
        settings = {"total_episodes": 8, "rollout_batch_size": 8, "max_new_tokens": 4, "output_dir": str(home)}
        reward = lambda prompts, completions: [factor for _ in completions]  # noqa: E731
        model = palate.train(taught, reward=reward, prompts=PROMPTS, name="named", **settings)
        return (Path(model.folder).parent / "DONE").read_text()

    first = run(1.0)
    assert run(1.0) == first
    assert run(2.0) != first


def test_faults_are_told_before_anything_runs(home: Path, tmp_path: Path) -> None:
    with pytest.raises(PalateError, match="Did you mean 'batch_size'"):
        palate.sft(TINY, ROWS, output_dir=str(home), batch_szie=8)
    with pytest.raises(PalateError, match="the list is empty"):
        palate.sft(TINY, [], output_dir=str(home))
    with pytest.raises(PalateError, match="not a folder on this disk"):
        palate.load("no/such-model").save_pretrained(tmp_path)
