"""A model from nothing: an architecture, a few sizes, and a byte-level BPE trained on the texts at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import AutoConfig, AutoModelForCausalLM

from palate import randomness
from palate.models.load import Loaded, Loading, trunk_of
from palate.models.tokenizer import Tokenizer, train_bpe
from palate.settings import PalateError, Settings

Architecture = Literal["gpt2", "llama", "qwen2", "qwen3", "mistral", "opt", "bloom", "gpt_neox"]

_GROUPED = ("llama", "qwen2", "qwen3", "mistral")
_ROTARY = (*_GROUPED, "gpt_neox")


class Make(Settings):
    """A model to make from nothing. Sizes left out take the family's usual proportions."""

    architecture: Architecture = "llama"
    """The family, as transformers calls it."""
    hidden_size: int = Field(default=128, ge=8)
    """Width of the hidden states."""
    layers: int = Field(default=4, ge=1)
    """How many blocks."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; divides hidden_size."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads of the grouped-query families; divides heads; as many as heads when left out."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width inside the feed-forward part; 4 × hidden_size, or 8/3 of it rounded up to 32 for gated families."""
    context: int = Field(default=256, ge=8)
    """The longest sequence in tokens."""
    vocabulary: int = Field(default=1024, ge=259)
    """Most ids the tokenizer may have: 256 bytes, three special tokens, and what training on the texts merges."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary position frequencies, for the families that use them."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of fresh weights; small models learn to copy sooner from 0.05 to 0.1."""
    tie: bool = True
    """Use the embedding table as the language-model head too."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        if self.kv_heads is not None and self.architecture not in _GROUPED:
            raise ValueError(f"{self.architecture} has no kv_heads. Leave it out, or take one of {', '.join(_GROUPED)}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.architecture in _ROTARY and self.hidden_size // self.heads % 2:
            raise ValueError(f"{self.architecture} turns pairs of numbers: hidden_size / heads must be even")
        return self


def make(settings: Make, texts: Iterable[str], key: int, how: Loading | None = None) -> Loaded:
    """A fresh model and tokenizer. The same settings, texts and key give the same weights, bit for bit.

    Raises PalateError for ways of loading that only a model from a folder can have.
    """
    how = how or Loading()
    for name in ("end_token", "make_causal"):
        if getattr(how, name):
            raise PalateError(
                f"loading.{name} is for models from a folder; one made from nothing is causal and has an "
                f"end token of its own. Leave {name} out."
            )
    tokenizer = train_bpe(texts, settings.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.key(key, "weights"))
        attention = {} if how.attention is None else {"attn_implementation": how.attention}
        model = AutoModelForCausalLM.from_config(
            _config(settings, tokenizer), dtype=getattr(torch, how.dtype), **attention
        )
    trunk = trunk_of(model, tokenizer.size, how)
    return Loaded(trunk, tokenizer, None, f"{settings.architecture} from nothing")


def _config(settings: Make, tokenizer: Tokenizer) -> Any:
    s = settings
    config: dict[str, Any] = {
        "vocab_size": tokenizer.size,
        "hidden_size": s.hidden_size,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "tie_word_embeddings": s.tie,
        ("init_std" if s.architecture == "opt" else "initializer_range"): s.initializer_range,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    return AutoConfig.for_model(s.architecture, **config, **_particular(s))


def _particular(s: Make) -> dict[str, Any]:
    """What only some families have, or call otherwise."""
    inside = s.intermediate_size
    if s.architecture == "bloom":  # no table of positions; the feed-forward part is always 4 × wide
        return {"seq_length": s.context}
    more: dict[str, Any] = {"max_position_embeddings": s.context}
    if s.architecture == "gpt2":
        return more | {"n_inner": inside}
    if s.architecture == "opt":
        return more | {"ffn_dim": inside or 4 * s.hidden_size, "word_embed_proj_dim": s.hidden_size}
    more["rope_parameters"] = {"rope_type": "default", "rope_theta": s.rope_theta}
    if s.architecture == "gpt_neox":
        more["rope_parameters"]["partial_rotary_factor"] = 0.25
        return more | {"intermediate_size": inside or 4 * s.hidden_size}
    gated = -(-8 * s.hidden_size // 3 // 32) * 32
    head = {"head_dim": s.hidden_size // s.heads} if s.architecture != "qwen2" else {}
    return more | head | {"intermediate_size": inside or gated, "num_key_value_heads": s.kv_heads or s.heads}
