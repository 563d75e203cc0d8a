"""A tiny network of letters in GPT-2's form, written as a model folder that any software loads.

Worlds stand below the models, so the arithmetic is here once more in plain torch: it gives a world its exact
numbers in float64, and a test compares it with transformers' own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

END = "<eos>"
"""How the end token is spelled; it pads too."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """A GPT-2: pre-LN, learned positions, tanh-approximated gelu, a head of its own without bias."""

    vocabulary: int
    """Ids, the last of which is the end token."""
    positions: int
    width: int
    layers: int
    heads: int


def shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every weight as transformers calls and keeps it, in the order of `named_parameters()`.

    Matrices of the blocks are kept (in, out); the embeddings and the head (rows, width).
    """
    d = sizes.width
    yield "transformer.wte.weight", (sizes.vocabulary, d)
    yield "transformer.wpe.weight", (sizes.positions, d)
    for layer in range(sizes.layers):
        block = f"transformer.h.{layer}"
        for name, inside, outside in (
            ("ln_1", 0, d),
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("ln_2", 0, d),
            ("mlp.c_fc", d, 4 * d),
            ("mlp.c_proj", 4 * d, d),
        ):
            yield f"{block}.{name}.weight", (inside, outside) if inside else (outside,)
            yield f"{block}.{name}.bias", (outside,)
    yield "transformer.ln_f.weight", (d,)
    yield "transformer.ln_f.bias", (d,)
    yield "lm_head.weight", (sizes.vocabulary, d)


def draw(
    sizes: Sizes, random: torch.Generator, embedding: float, matrix: float | None, head: float, gain: float = 1.0
) -> dict[str, Tensor]:
    """Fresh weights in the order of `shapes`: normal with the given standard deviations, norms 1, biases 0.

    `matrix` None means gain / √(inputs). Matrices are drawn (out, in), as a linear layer keeps them.
    """
    weights: dict[str, Tensor] = {}
    for name, shape in shapes(sizes):
        if len(shape) == 1:
            weights[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        elif name == "lm_head.weight":
            weights[name] = torch.randn(shape, generator=random) * head
        elif name.split(".")[1] in ("wte", "wpe"):
            weights[name] = torch.randn(shape, generator=random) * embedding
        else:
            deviation = matrix if matrix is not None else gain / math.sqrt(shape[0])
            weights[name] = (torch.randn(shape[::-1], generator=random) * deviation).T.contiguous()
    return weights


def next_logp(weights: Weights, sizes: Sizes, tokens_RT: Tensor) -> Tensor:
    """Log-probabilities of the token after each place, R×T×V, in the weights' own number format."""
    w = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    d, (rows, long) = sizes.width, tokens_RT.shape

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (d,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def split(x: Tensor) -> Tensor:
        return x.view(rows, long, sizes.heads, d // sizes.heads).transpose(1, 2)

    x = w["wte.weight"][tokens_RT] + w["wpe.weight"][:long]
    for layer in range(sizes.layers):
        h = f"h.{layer}"
        query, key, value = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").split(d, -1)
        seen = F.scaled_dot_product_attention(split(query), split(key), split(value), is_causal=True)
        x = x + linear(seen.transpose(1, 2).reshape(rows, long, d), f"{h}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"{h}.mlp.c_proj")
    return (norm(x, "ln_f") @ w["lm_head.weight"].T).log_softmax(-1)


def write(folder: Path, weights: Weights, sizes: Sizes, letters: Sequence[str]) -> Path:
    """A model folder in transformers' layout: config, safetensors, and a tokenizer of one token per letter."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.float().contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    for name, content in (
        ("config.json", _config(sizes)),
        ("tokenizer.json", _tokenizer(letters)),
        ("tokenizer_config.json", _tokenizer_config(sizes)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return folder


def _config(sizes: Sizes) -> dict[str, object]:
    end = sizes.vocabulary - 1
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": sizes.vocabulary,
        "n_positions": sizes.positions,
        "n_embd": sizes.width,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
        **dropout,
    }


def _tokenizer(letters: Sequence[str]) -> dict[str, object]:
    """Every character is a token of its own; one that is not a letter of this world is an error, never a guess."""
    vocabulary = {letter: number for number, letter in enumerate((*letters, END))}
    special = {"id": len(letters), "content": END, "special": True}
    special |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }


def _tokenizer_config(sizes: Sizes) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sizes.positions,
    }
