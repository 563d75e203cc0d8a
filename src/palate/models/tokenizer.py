"""Tokenizers: text to ids and back, chat templates, and a byte-level BPE trained from nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, TemplateError
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Inner
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from palate.records import Message
from palate.settings import PalateError

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
"""The chat template of tokenizers that bring none: `User: …` newline `Assistant: …<eos>`."""

BYTES = 256
SPECIAL = ("<pad>", "<bos>", "<eos>")


class Tokenizer:
    """A transformers fast tokenizer seen as text ↔ ids. Ids at or above `size` are not the tokenizer's.

    `pad` may equal `eos`: nothing in palate derives a mask from token ids. A tokenizer without a pad token
    lends its end (or id 0), since padded cells are never read.
    """

    def __init__(self, inner: PreTrainedTokenizerBase) -> None:
        self.inner: Any = inner
        self.size: int = max(inner.get_vocab().values(), default=-1) + 1
        self.bos: int | None = _one(inner.bos_token_id)
        self.eos: int | None = _one(inner.eos_token_id)
        self.pad: int = next(i for i in (_one(inner.pad_token_id), self.eos, 0) if i is not None)
        if self.inner.chat_template is None:
            self.inner.chat_template = PLAIN_TEMPLATE

    @property
    def end(self) -> int:
        """The end-of-sequence id. Raises PalateError where there is none: it could never stop."""
        if self.eos is None:
            raise PalateError(
                f"tokenizer {self.inner.name_or_path or 'of this model'}: it has no end-of-sequence token. "
                "Name one that it knows with the setting end_token, for example end_token: '</s>'."
            )
        return self.eos

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Adds no special token; special tokens spelled in the text are recognised."""
        return cast(list[int], self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`, a view for rewards and people. Ids that are not the tokenizer's are left out."""
        known = [int(i) for i in ids if 0 <= i < self.size]
        return self.inner.decode(known, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The conversation as one string by the chat template, run in transformers' sandbox.

        Raises PalateError when the template refuses the conversation, reaches out of its sandbox or would not
        end. Template syntax inside a message is text like any other.
        """
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            _require_modest(self.inner.get_chat_template())
            return self.inner.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as fault:  # a template is a program of whoever made the model, and may raise anything
            roles = ", ".join(m.role for m in messages)
            why = str(fault).rstrip(".") or type(fault).__name__
            raise PalateError(
                f"chat template of {self.inner.name_or_path or 'this tokenizer'}: it refuses the roles "
                f"({roles}): {why}. Change their order, or give the tokenizer another chat template."
            ) from None

    def same_words(self, other: Tokenizer) -> bool:
        """Whether both give every id the same meaning, so that ids of one may be read by the other."""
        return self.inner.get_vocab() == other.inner.get_vocab()

    def save(self, folder: Path) -> None:
        """Write the tokenizer and its chat template in transformers' layout."""
        self.inner.save_pretrained(str(folder))


_LARGEST = 1_000_000


@lru_cache
def _require_modest(template: str) -> None:
    """Refuse powers, huge numbers, and ranges counted inside ranges.

    transformers' sandbox keeps a template from reaching out, and from ranges over 100,000; what these three would do
    to time and memory it leaves alone.
    """
    ranged: list[bool] = []  # of each loop that is open, whether it counts through a range
    tag: str | None = None
    for line, kind, said in Environment().lex(template):
        large = kind == "integer" and int(said.replace("_", ""), 0) > _LARGEST
        if large or (kind == "operator" and said == "**"):
            raise TemplateError(f"{said[:20]} in its line {line} may fill the memory")
        if kind in ("block_begin", "block_end"):
            tag = None
        elif kind == "name" and tag is None:
            tag = said
            if tag == "for":
                ranged.append(False)
            elif tag == "endfor" and ranged:
                ranged.pop()
        elif kind == "name" and said == "range" and tag == "for":
            if any(ranged):
                raise TemplateError(f"the range in its line {line}, inside another, may never end")
            ranged[-1] = True


def _one(token: Any) -> int | None:
    """transformers gives one id, a list of ids, or None."""
    if isinstance(token, list):
        return int(cast(list[int], token)[0]) if token else None
    return None if token is None else int(token)


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE of at most `size` ids, with <pad>, <bos> and <eos> as three distinct first ids.

    Any text round-trips, seen or not, since every byte has a token. The same texts give the same tokenizer.
    Raises PalateError when `size` leaves no room for the 256 bytes and the special tokens.
    """
    least = BYTES + len(SPECIAL)
    if size < least:
        raise PalateError(
            f"vocabulary: {size} is too small for {BYTES} bytes and {len(SPECIAL)} special tokens. "
            f"Set it to at least {least}."
        )
    inner = Inner(models.BPE())
    # Qwen2's split, since transformers forces it on that family; special tokens name an unknown that never occurs,
    # because the same class would otherwise add one.
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, unk_token=SPECIAL[0], **names
    )
    return Tokenizer(fast)
