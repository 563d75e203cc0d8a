"""Turn the pretrained 260K story model (llama2.c's fp32 file) into a folder that palate and transformers load.

    python recipes/stories/convert.py FOLDER_WITH_stories260K.bin_AND_tok512.bin OUT_FOLDER

The file holds seven integers (width, feed-forward width, layers, heads, key-value heads, vocabulary, context) and
then the weights as float32 in a fixed order. llama2.c rotates neighbouring pairs of a head's numbers, transformers
rotates a number with the one half a head away, so the rows of the query and key projections are reordered.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPACE = "▁"


class Weights:
    """The floats of the file, handed out in its order."""

    def __init__(self, blob: bytes, offset: int) -> None:
        self.floats = torch.from_numpy(np.frombuffer(blob, dtype="<f4", offset=offset).copy())
        self.at = 0

    def take(self, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        self.at += count
        return self.floats[self.at - count : self.at].reshape(shape).clone()


def half_split(rows_LOD: Tensor, heads: int) -> Tensor:
    """Rows of each head from (pair, member) order to (member, pair) order."""
    layers, out, width = rows_LOD.shape
    return rows_LOD.reshape(layers, heads, out // heads // 2, 2, width).transpose(2, 3).reshape(layers, out, width)


def model_from(path: Path) -> LlamaForCausalLM:
    """The model with every weight read from the file; any left-over float would be a misreading, and raises."""
    blob = path.read_bytes()
    width, inner, layers, heads, kv_heads, vocabulary, context = struct.unpack("<7i", blob[:28])
    kv_width = width // heads * kv_heads
    w = Weights(blob, 28)
    embed = w.take(abs(vocabulary), width)
    named = {
        "input_layernorm": w.take(layers, width),
        "self_attn.q_proj": half_split(w.take(layers, width, width), heads),
        "self_attn.k_proj": half_split(w.take(layers, kv_width, width), kv_heads),
        "self_attn.v_proj": w.take(layers, kv_width, width),
        "self_attn.o_proj": w.take(layers, width, width),
        "post_attention_layernorm": w.take(layers, width),
        "mlp.gate_proj": w.take(layers, inner, width),
        "mlp.down_proj": w.take(layers, width, inner),
        "mlp.up_proj": w.take(layers, inner, width),
    }
    norm = w.take(width)
    w.take(2, context, width // heads // 2)  # tables of cosines and sines, which transformers computes itself
    if w.at != len(w.floats):
        raise SystemExit(f"{path}: {len(w.floats) - w.at} floats are left over; this is not the layout expected")
    config = LlamaConfig(
        vocab_size=abs(vocabulary),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": embed, "lm_head.weight": embed, "model.norm.weight": norm}
    for name, stacked in named.items():
        state |= {f"model.layers.{i}.{name}.weight": stacked[i] for i in range(layers)}
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


def tokenizer_from(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """The byte-fallback BPE of the file. Its scores are merge ranks: the better pair is joined first."""
    blob = path.read_bytes()
    at, pieces = 4, []
    for _ in range(vocabulary):
        score, length = struct.unpack_from("<fi", blob, at)
        pieces.append((blob[at + 8 : at + 8 + length].decode("utf-8"), score))
        at += 8 + length
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    spelled = special + [piece.replace(" ", SPACE) for piece, _ in pieces[len(special) :]]
    vocab = {piece: i for i, piece in enumerate(spelled)}
    merges = []
    for i in range(len(special), vocabulary):
        piece = spelled[i]
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += [(-pieces[i][1], vocab[a], vocab[b], a, b) for a, b in known]
    inner = Tokenizer(
        models.BPE(vocab, [(a, b) for *_, a, b in sorted(merges)], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    # The space before a text's first word is kept, so that a prompt's text and its answer's can simply be joined.
    inner.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def main(source: Path, out: Path) -> None:
    model = model_from(source / "stories260K.bin")
    tokenizer = tokenizer_from(source / "tok512.bin", model.config.vocab_size)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    ids = torch.tensor([[1, *tokenizer.encode("Once upon a time", add_special_tokens=False)]])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {out}. Greedy:")
    print(tokenizer.decode(said[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
