"""How records become tokens: the settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from palate.settings import Settings


class Encoding(Settings):
    """How records become tokens."""

    turns: Literal["template", "plain"] = "template"
    """How a conversation is laid out: by the chat template, or its turns' texts one behind the other (as
    trlX does), where only the last answer gets the end token."""

    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens of a demonstration are trained: every assistant turn, the last one, or everything."""

    max_length: int | None = Field(default=None, ge=2)
    """Longest row, prompt and answer together; the model's context when left out."""

    max_prompt_length: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens."""

    long_prompts: Literal["refuse", "keep_end", "keep_start", "cut_post", "drop"] = "refuse"
    """What happens to a longer prompt; cut_post shortens the post or article inside a TL;DR query."""

    long_rows: Literal["cut", "drop", "refuse"] = "cut"
    """What happens to a longer row; a cut answer has no end token, so it does not teach the model to stop there."""

    untrained: Literal["drop", "refuse"] = "drop"
    """What happens to a row without a single trained token; dropped rows are counted."""

    leading_space: bool = False
    """Put one space before a plain-text answer that does not begin with white space (TL;DR references)."""

    bos: bool | None = None
    """Begin rows with the begin token; left out, as the tokenizer does by itself. Never twice."""

    eos: bool = True
    """End each answer with the end token where the chat template did not end it."""

    query_length: int | None = Field(default=None, ge=1)
    """Make prompts of this many tokens from the beginnings of plain texts."""

    query_start: str | None = None
    """Such a prompt begins after the first token spelled like this; texts without it are skipped."""

    query_end: str | None = None
    """Such a prompt ends with the last token spelled like this; texts without it are skipped."""

    query_format: str = Field(default="{query}", pattern=r"\{query\}")
    """What stands around such a prompt, and around one stored as token ids: `{query}\\n\\nTL;DR:`."""
