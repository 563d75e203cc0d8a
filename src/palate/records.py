"""Records: what was said, before any tokenizer. Plain frozen values; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


Text = str | tuple[Message, ...]
"""Either plain text or the turns of a conversation. Within one record all fields are of the same form."""


def text_of(text: Text) -> str:
    """A readable string of either form, for rewards, people and hashing; never for the training batch."""
    if isinstance(text, str):
        return text
    return "\n".join(f"{m.role}: {m.content}" for m in text)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text in front of the first of the stop texts in it; all of it where there is none."""
    return text[: min((found for one in stop if (found := text.find(one)) >= 0), default=len(text))]


def fingerprint(*parts: Any) -> str:
    """A short stable name for content: the same parts give the same 16 hex digits everywhere."""
    blob = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=_plain).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(blob, digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    return {"role": value.role, "content": value.content} if isinstance(value, Message) else str(value)


_EMPTY: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Prompt:
    """Something to answer. `columns` travel untouched to reward functions."""

    prompt: Text
    columns: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    group: str = ""
    """Rows of one group stay on one side of a split; empty means the prompt itself is the group."""

    @property
    def key(self) -> str:
        """What a split and the sampler's random counter go by: the group, or the prompt's own content."""
        return self.group or fingerprint(self.prompt)


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt with an answer worth imitating; a plain text to model has an empty prompt."""

    completion: Text = ""


@dataclass(frozen=True)
class Ranking(Prompt):
    """K answers to one prompt with ranks, 0 the best; equal ranks are ties. Stored whole, expanded per prompt.

    Two answers are a preference pair. `margin` is the stated strength of a pair's preference, `probability` how likely
    the better one of the pair is the better one, where a judge said so (a soft label).
    """

    completions: tuple[Text, ...] = ()
    ranks: tuple[int, ...] = ()
    margin: float | None = None
    probability: float | None = None

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(better, worse) indices of every comparable pair; ties are left out."""
        r = self.ranks
        return [(i, j) for i in range(len(r)) for j in range(len(r)) if r[i] < r[j]]


def preference(prompt: Text, chosen: Text, rejected: Text, margin: float | None = None, **more: Any) -> Ranking:
    """A ranking of two: chosen first."""
    return Ranking(prompt=prompt, completions=(chosen, rejected), ranks=(0, 1), margin=margin, **more)


@dataclass(frozen=True)
class Unpaired(Prompt):
    """An answer with a thumb up (True) or down (False)."""

    completion: Text = ""
    label: bool = True


@dataclass(frozen=True)
class Rated(Prompt):
    """An answer with a number."""

    completion: Text = ""
    rating: float = 0.0


@dataclass(frozen=True)
class Correction(Prompt):
    """An answer and its corrected form; spans are (start, end) characters of `corrected` that were changed."""

    original: Text = ""
    corrected: Text = ""
    spans: tuple[tuple[int, int], ...] = ()


Record = Prompt | Demonstration | Ranking | Unpaired | Rated | Correction


def as_messages(turns: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages from `[{role, content}]` mappings."""
    return tuple(Message(str(t["role"]), str(t["content"])) for t in turns)
