"""Answers to judge, written by the scripted engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from palate.engines.scripted import ScriptedEngine
from palate.models.tokenizer import Tokenizer, train_bpe
from palate.records import Text
from palate.rewards.reward import Answers, answers_of

Answered = Callable[..., Answers]


@dataclass(frozen=True)
class Asked:
    """A prompt with its columns."""

    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The policy's tokenizer."""
    return train_bpe(["What is the taste of it? It is warm, round and a little sweet."], 290)


@pytest.fixture(scope="session")
def answered(tokenizer: Tokenizer) -> Answered:
    """Build answers from texts (or ids): one per prompt, or K per prompt."""

    def build(
        completions: Sequence[str | Sequence[int]],
        prompts: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        end: bool = True,
        said: Sequence[Text] | None = None,
    ) -> Answers:
        asked = list(prompts or [f"Q{i}" for i in range(len(completions))])
        given = columns or {}
        rows = [Asked(text, {name: c[i] for name, c in given.items()}) for i, text in enumerate(asked)]
        ids = [tokenizer.encode(text) for text in asked]
        rollouts = ScriptedEngine(tokenizer, completions, end=end).generate(ids, list(range(len(completions))))
        return answers_of(rollouts, rows, tokenizer, said)

    return build
