"""What the workloads need on disk: tokenizers trained on local text, models with random weights, rows of token ids.

Everything is drawn from fixed seeds and kept, so every system in every round reads the same files.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bench.speed.workloads import EOS, MODELS, ONLINE, PAD, PAIRED, POOL, Row, Shape, Work
from palate.models.tokenizer import Tokenizer, train_bpe

POLICY_SEED, VALUE_SEED, REWARD_SEED, DATA_SEED = 0, 1, 2, 3
_CORPUS_BYTES, _READ_BYTES, _PIECE = 24 << 20, 6 << 20, 200_000


def corpus(limit: int) -> Iterator[str]:
    """Local English and code: the sources of Python's standard library in alphabetical order."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), 0
    for path in sorted(root.rglob("*.py")):
        if found < limit and "site-packages" not in path.parts:
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += len(text)
            yield text


def tokenizer(folder: Path, vocabulary: int) -> Tokenizer:
    """A byte-level BPE of exactly this size, trained once."""
    place = folder / f"tokenizer-{vocabulary}"
    if not (place / "tokenizer.json").exists():
        train_bpe(corpus(_CORPUS_BYTES), vocabulary).save(place)
    found = Tokenizer(PreTrainedTokenizerFast.from_pretrained(place))
    if (found.size, found.pad, found.eos) != (vocabulary, PAD, EOS):
        raise SystemExit(f"{place}: {found.size} ids where {vocabulary} were asked for. Bring more text to train on.")
    return found


def config(shape: Shape, **more: Any) -> GPT2Config | LlamaConfig:
    """The architecture in transformers' words, without dropout."""
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD, **more}
    if shape.family == "gpt2":
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads}
        return GPT2Config(vocab_size=shape.vocabulary, n_positions=shape.positions, **sizes, **none, **ids)
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inside,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        **ids,
    )


def model(folder: Path, name: str, role: str, ends: float = 0.0) -> Path:
    """The folder of a model with its tokenizer: a policy, or a classifier with one output as value or reward.

    With `ends` the policy draws its end token with that chance, wherever it is.
    """
    place = folder / (f"{role}-{name}" + (f"-ends-{ends:.4f}" if ends else ""))
    if (place / "config.json").exists():
        return place
    shape, words = MODELS[name], tokenizer(folder, MODELS[name].vocabulary)
    torch.manual_seed({"policy": POLICY_SEED, "value": VALUE_SEED, "reward": REWARD_SEED}[role])
    if role == "policy":
        made = AutoModelForCausalLM.from_config(config(shape), dtype=torch.float32)
        if ends:
            lean_on_the_end(made, ends, token_ids(folder, name)[: 64 * 64])
    else:
        made = AutoModelForSequenceClassification.from_config(config(shape, num_labels=1), dtype=torch.float32)
    words.save(place)
    made.save_pretrained(place)
    return place


@torch.no_grad()
def lean_on_the_end(gpt2: PreTrainedModel, chance: float, text: Sequence[int]) -> None:
    """Shift the final norm's bias along the end token's embedding until that token has this chance on average.

    Answers then have nearly geometric lengths in every system that samples from these weights, whatever it is.
    """
    hidden_ND = gpt2.base_model(torch.tensor(text).view(-1, 64)).last_hidden_state.flatten(0, 1)
    table_VD = gpt2.get_input_embeddings().weight
    along_D = table_VD[EOS] / table_VD[EOS].norm()
    low, high = 0.0, 200.0
    for _ in range(40):
        far = (low + high) / 2
        mean = float(((hidden_ND + far * along_D) @ table_VD.T).softmax(-1)[:, EOS].mean())
        low, high = (low, far) if mean > chance else (far, high)
    gpt2.base_model.ln_f.bias += (low + high) / 2 * along_D


def token_ids(folder: Path, name: str) -> list[int]:
    """The local text as one stream of ids."""
    vocabulary = MODELS[name].vocabulary
    place = folder / f"ids-{vocabulary}.json"
    if not place.exists():
        words, text = tokenizer(folder, vocabulary), "\n".join(corpus(_READ_BYTES))
        pieces = [words.encode(text[i : i + _PIECE]) for i in range(0, len(text), _PIECE)]
        place.write_text(json.dumps([one for piece in pieces for one in piece]), encoding="utf-8")
    return json.loads(place.read_text(encoding="utf-8"))


def spans(words: Tokenizer, ids: Sequence[int], seed: int, count: int, lengths: tuple[int, int]) -> list[list[int]]:
    """Pieces of the stream with uniform lengths, each of which its text encodes to again, token for token."""
    dice, found = random.Random(seed), list[list[int]]()
    while len(found) < count:
        length = dice.randint(*lengths)
        start = dice.randrange(len(ids) - length)
        piece = list(ids[start : start + length])
        if words.encode(words.decode(piece)) == piece:
            found.append(piece)
    return found


def data(row: Row, words: Tokenizer, ids: Sequence[int], pool: int = POOL) -> dict[str, Any]:
    """The row's data; see `Work`."""

    def draw(number: int, lengths: tuple[int, int]) -> list[list[int]]:
        return spans(words, ids, DATA_SEED + number, pool, lengths)

    if row.kind == "sft":
        return {"sequences": draw(0, row.answer)}
    prompts = draw(1, row.prompt)
    if row.kind in ONLINE or row.kind == "generate":
        return {"prompts": prompts, "texts": [words.decode(one) for one in prompts]}
    if row.kind in PAIRED:
        return {"prompts": prompts, "chosen": draw(2, row.answer), "rejected": draw(3, row.answer)}
    return {"prompts": prompts, "completions": draw(2, row.answer), "labels": [i % 2 == 0 for i in range(pool)]}


def work(folder: Path, row: Row) -> Path:
    """Everything a row needs, made where it is missing; the file that tells workers of it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(folder, row.shape.vocabulary)
    judged = row.kind in ("ppo", "reward")
    found = Work(
        row=row,
        policy=str(model(folder, row.model, "policy", row.ends)),
        value=str(model(folder, row.model, "value")) if row.kind == "ppo" else "",
        reward=str(model(folder, row.model, "reward")) if judged else "",
        data=data(row, words, token_ids(folder, row.model)),
    )
    path = folder / "rows" / f"{row.name}.json"
    found.write(path)
    return path
