"""The Python door: rows and functions in, a model that speaks out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import palate
from palate.door import evaluation
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


def test_a_reward_function_is_asked_as_trlx_asks_it_and_the_callers_prompts_stay(
    taught: palate.Trained, home: Path
) -> None:
    asked: list[dict[str, object]] = []

    def reward_fn(samples: list[str], prompts: list[str], outputs: list[str], tag: list[str]) -> list[float]:
        asked.append({"samples": samples, "prompts": prompts, "outputs": outputs, "tag": list(tag)})
        return [float(len(o)) for o in outputs]

    prompts = [{"prompt": p, "tag": f"t{i}"} for i, p in enumerate(PROMPTS)]
    before = json.dumps(prompts)
    settings = {"total_episodes": 14, "rollout_batch_size": 7, "max_new_tokens": 4, "output_dir": str(home)}
    done = palate.train(taught, reward_fn=reward_fn, prompts=prompts, name="trlx", **settings)
    assert len(asked) == 2  # once per rollout
    assert json.dumps(prompts) == before
    for call in asked:
        texts = zip(call["samples"], call["prompts"], call["outputs"], strict=True)  # type: ignore[call-overload]
        assert all(sample == prompt + output for sample, prompt, output in texts)
        assert dict(zip(call["tag"], call["prompts"], strict=True)) == {  # type: ignore[call-overload]
            f"t{i}": p for i, p in enumerate(PROMPTS)
        }
    assert done.run == home / "trlx"


def test_samples_alone_are_imitated_and_dialogues_are_trained_on_every_output(home: Path) -> None:
    dialogues = [[f"ask {i % 4}", " yes", " more", " no"] for i in range(16)]
    done = palate.train(
        TINY, samples=dialogues, name="dialogues", output_dir=str(home), batch_size=8, max_steps=1, logging_steps=1
    )
    tokenizer = done.loaded.tokenizer
    trained = len(tokenizer.encode(" yes")) + len(tokenizer.encode(" no")) + 1  # the end token closes the last alone
    assert done.metrics[-1]["num_tokens"] == 8 * trained


def test_eval_prompts_are_answered_and_measured(taught: palate.Trained, home: Path) -> None:
    def metric_fn(samples: list[str], prompts: list[str], outputs: list[str], tag: list[int]) -> dict[str, list[float]]:
        assert [len(s) for s in samples] == [len(p) + len(o) for p, o in zip(prompts, outputs, strict=True)]
        return {"length": [float(len(o)) for o in outputs], "twice": [2.0 * t for t in tag]}

    asked = [{"prompt": p, "tag": i} for i, p in enumerate(PROMPTS)]
    done = palate.train(
        taught,
        samples=[[p, " 1."] for p in PROMPTS] * 2,
        eval_prompts=asked,
        metric_fn=metric_fn,
        name="measured",
        output_dir=str(home),
        batch_size=7,
    )
    assert [row["twice"] for row in done.evaluation] == [2.0 * i for i in range(len(PROMPTS))]
    assert all(row["length"] == len(row["output"]) for row in done.evaluation)
    with pytest.raises(PalateError, match="metric_fn: 'short' has 1 values for 7"):
        evaluation(done, asked, lambda **_: {"short": [1.0]})


def test_stop_sequences_end_an_answer_and_are_not_read(taught: palate.Trained) -> None:
    whole = taught.generate(PROMPTS, max_new_tokens=12)
    stop = next(letter for text in whole for letter in text[1:-1] if letter.isalnum() and letter.isascii())
    cut = taught.generate(PROMPTS, max_new_tokens=12, stop=[stop])
    assert cut == [text.partition(stop)[0] for text in whole]
    assert any(a != b for a, b in zip(cut, whole, strict=True))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give reward and prompts"),
        ({"rewards": [1.0]}, "rewards go with samples"),
        ({"reward": brief}, "a reward goes with prompts"),
        ({"reward": brief, "reward_fn": brief, "prompts": PROMPTS}, "two names of one thing"),
        ({"data": ROWS}, "or data and algorithm"),
    ],
)
def test_what_does_not_go_together_is_said(given: dict[str, object], said: str) -> None:
    with pytest.raises(PalateError, match=said):
        palate.train(TINY, **given)  # type: ignore[arg-type]
