"""Texts that end an answer: its tokens stay, it counts as ended, and what is read of it ends before the text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from palate.engines.engine import Sampling
from palate.engines.local import LocalEngine
from palate.models.load import load
from palate.rewards.reward import answers_of
from palate.settings import PalateError, parse
from tests.stages import tiny_runs as tiny

KEYS = list(range(48))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("stop") / "model", width=1.0)


def written(model: Path, **how: Any) -> tuple[list[list[int]], list[bool], Any]:
    loaded = load(str(model))
    engine = LocalEngine(loaded.trunk, loaded.tokenizer, parse(Sampling, {"max_new_tokens": 12, **how}))
    rollouts = engine.generate([loaded.tokenizer.encode("Number 3 is")], KEYS)
    ids = [tokens[mask].tolist() for tokens, mask in zip(rollouts.tokens_BT, rollouts.action_BT, strict=True)]
    return ids, rollouts.finished_B.tolist(), (loaded.tokenizer, rollouts)


def test_an_answer_ends_with_the_token_that_completes_a_stop_text(model: Path) -> None:
    plain, _, (tokenizer, _) = written(model)
    texts = [tokenizer.decode(ids) for ids in plain]
    letters = [a + b for text in texts for a, b in itertools.pairwise(text)]
    stop = tuple(sorted({pair for pair in letters if pair.isascii() and pair.isalnum()})[:4])
    assert stop, "the model says no two letters in a row"
    cut, ended, (_, rollouts) = written(model, stop=list(stop))
    stopped = 0
    for whole, ids, done in zip(plain, cut, ended, strict=True):
        upto = next((n for n in range(1, len(whole) + 1) if any(s in tokenizer.decode(whole[:n]) for s in stop)), None)
        assert ids == whole[:upto]  # the same dice, up to the token that completes the text
        if upto is not None:
            stopped += 1
            assert done
    assert stopped
    asked = [type("Asked", (), {"text": "Number 3 is", "columns": {}})()]
    read = answers_of(rollouts, asked, tokenizer, stop=stop).completions
    assert not any(s in text for text in read for s in stop)


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(PalateError, match="stop: an empty text would end every answer"):
        parse(Sampling, {"stop": [""]})


def test_a_reward_reads_what_stands_before_the_stop_text(model: Path, tmp_path: Path) -> None:
    prompts = str(tiny.write_prompts(tmp_path / "prompts.jsonl"))
    heard: list[str] = []

    def listens(prompts: list[str], completions: list[str]) -> list[float]:
        heard.extend(completions)
        return [float(len(text)) for text in completions]

    letters = list("abcdefghijklmnopqrstuvwxyz")
    stage = tiny.ppo(model, prompts, reward={"kind": "function", "function": listens}, total_episodes=16)
    tiny.run(tmp_path, {**stage, "sampling": {"max_new_tokens": 8, "stop": letters}}, name="stops")
    assert heard
    assert not any(letter in text for text in heard for letter in letters)
