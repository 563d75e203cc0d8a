"""Small models and small files in the shapes that the recipes name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from palate.data.queries import STORED_PAD, TLDR_FORMAT, fill
from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.models.tokenizer import Tokenizer
from palate.randomness import generator, key

DISHES = ("soup", "bread", "stew", "cake", "tea", "fish", "pie", "salad")
KIND = ("warm", "bright", "lovely", "sweet")
UNKIND = ("cold", "grey", "stale", "sour")
ROWS = 32

TURNS = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
"""A chat template of its own for the instruct model, unlike the default."""


def _sentence(row: int, words: tuple[str, ...]) -> str:
    return f"The {DISHES[row % 8]} was {words[row % 4]} and {words[(row // 4) % 4]}, we said."


def _passage(row: int) -> str:
    return " ".join(_sentence(row + i, KIND if i % 2 else UNKIND) for i in range(4))


def _post(row: int) -> dict[str, str]:
    lines = "\n".join(_sentence(row + i, UNKIND) for i in range(3))
    return {"subreddit": "food", "title": f"My {DISHES[row % 8]}", "post": lines}


def _transcript(row: int, words: tuple[str, ...]) -> str:
    return f"\n\nHuman: How was the {DISHES[row % 8]} on day {row}?\n\nAssistant: {_sentence(row, words)}"


def _chat(row: int, good: str, bad: str) -> dict[str, Any]:
    """A pair as the Tülu mixtures have them: both answers are whole conversations, the prompt stands beside them."""
    asked = f"How was the {DISHES[row % 8]} on day {row}?"
    chosen, rejected = (
        [{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for said in (good, bad)
    )
    return {"id": f"row-{row}", "source": "kitchen", "prompt": asked, "chosen": chosen, "rejected": rejected}


def _label(row: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A label as the 2019 files store it: GPT-2 ids padded to fixed lengths with an id beyond the vocabulary."""
    draw = generator(key("labels", row))
    samples = [tokenizer.encode(" " + _sentence(row + i, KIND if i == row % 4 else UNKIND)) for i in range(4)]
    query = tokenizer.encode(_sentence(row, UNKIND))[: int(draw.integers(8, 16))]
    padded = {f"sample{i}": (s + [STORED_PAD] * 40)[:40] for i, s in enumerate(samples)}
    return {"query": query + [STORED_PAD] * (24 - len(query)), **padded, "best": row % 4}


def _write(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _model(folder: Path, architecture: Any, template: str | None = None) -> Tokenizer:
    texts = [_passage(row) + fill(TLDR_FORMAT, _post(row)) + _transcript(row, KIND) for row in range(ROWS)]
    size = Make(architecture=architecture, hidden_size=16, layers=1, heads=2, context=1024, vocabulary=420)
    made = make(size, texts, key("recipes", architecture))
    if template:
        made.tokenizer.inner.chat_template = template
    save(folder, made.trunk, made.tokenizer, Card(title=folder.name, base="nothing"))
    return made.tokenizer


@pytest.fixture(scope="session")
def pantry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders that {gpt2}, {gpt_neox}, {qwen2} and {data} stand for in shrunk.py."""
    folder = tmp_path_factory.mktemp("pantry")
    data = folder / "data"
    data.mkdir()
    tokenizer = _model(folder / "gpt2", "gpt2")
    _model(folder / "gpt_neox", "gpt_neox")
    _model(folder / "qwen2", "qwen2", CHAT)
    rows = range(ROWS)
    posts = [_post(row) for row in rows]
    queries = [fill(TLDR_FORMAT, post) for post in posts]
    good, bad = ([_sentence(row, words) for row in rows] for words in (KIND, UNKIND))
    (data / "labels.json").write_text(json.dumps([_label(row, tokenizer) for row in rows]), encoding="utf-8")
    _write(data / "passages.jsonl", ({"text": _passage(row)} for row in rows))
    _write(
        data / "articles.jsonl", ({"article": _passage(row), "highlights": good[row], "id": str(row)} for row in rows)
    )
    _write(data / "posts.jsonl", ({"id": str(row), **posts[row], "summary": good[row]} for row in rows))
    _write(data / "summaries.jsonl", ({"prompt": queries[row], "completion": f" {good[row]}"} for row in rows))
    _write(
        data / "comparisons.jsonl",
        ({"prompt": queries[row], "chosen": f" {good[row]}", "rejected": f" {bad[row]}"} for row in rows),
    )
    _write(data / "reviews.jsonl", ({"text": _passage(row)[row:], "label": row % 2} for row in rows))
    _write(
        data / "transcripts.jsonl",
        ({"chosen": _transcript(row, KIND), "rejected": _transcript(row, UNKIND)} for row in rows),
    )
    _write(data / "chats.jsonl", (_chat(row, good[row], bad[row]) for row in rows))
    _write(data / "problems.jsonl", ({"problem": f"What is {row} + 1?", "answer": str(row + 1)} for row in rows))
    _write(
        data / "instructions.jsonl",
        ({"instruction": f"Describe the {DISHES[row % 8]}", "input": "", "output": good[row]} for row in rows),
    )
    return {**{name: str(folder / name) for name in ("gpt2", "gpt_neox", "qwen2")}, "data": str(data)}
