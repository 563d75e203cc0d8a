"""Queries as the reference systems build them: TL;DR and news posts cut to length, book sentences, stored pads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from palate.settings import PalateError

TLDR_FORMAT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
"""A Reddit post to be summarised (Stiennon et al. 2020); no space at the end."""

NEWS_FORMAT = "Article:\n{article}\n\nTL;DR:\n"
"""A news article to be summarised, by the same work."""

STORED_PAD = 50259
"""The pad id in the label files of lm-human-preferences: two beyond GPT-2's vocabulary of 50,257."""

_FIELD = re.compile(r"\{(\w+)\}")
_POST = re.compile(r"SUBREDDIT: r/(?P<subreddit>.*?)\n\nTITLE: (?P<title>.*?)\n\nPOST: (?P<post>.*)\n\nTL;DR:", re.S)
_NEWS = re.compile(r"Article:\n(?P<article>.*)\n\nTL;DR:\n", re.S)


def fill(template: str, fields: Mapping[str, object]) -> str:
    """`template` with each `{field}` replaced once; braces inside the values mean nothing."""
    missing = [name for name in _FIELD.findall(template) if name not in fields]
    if missing:
        raise PalateError(f"{template!r}: there is no field {missing[0]!r}. Known: {', '.join(map(str, fields))}.")
    return _FIELD.sub(lambda found: str(fields[found[1]]), template)


def tldr_query(
    post: Mapping[str, str],
    encode: Callable[[str], list[int]],
    length: int,
    fmt: str = TLDR_FORMAT,
    field: str = "post",
) -> tuple[str, list[int]]:
    """(query, its tokens), at most `length` of them; the text after the field, "TL;DR:", always stays.

    While it is too long the field is cut at its last line break, or by one character where it has none, and the
    whole is tokenised again (summarize-from-feedback, detail 43). Raises PalateError when an empty field is still
    too long.
    """
    fields = dict(post)
    while True:
        query = fill(fmt, fields)
        tokens = encode(query)
        if len(tokens) <= length:
            return query, tokens
        rest = fields[field]
        if not rest:
            raise PalateError(
                f"query: {len(tokens)} tokens with an empty {field!r}, more than {length}. Raise max_prompt_length."
            )
        fields[field] = rest[: rest.rindex("\n")] if "\n" in rest else rest[:-1]


def query_fields(query: str) -> tuple[dict[str, str], str, str] | None:
    """(fields, format, field to cut) of a finished query, or None when it is in neither of the two formats."""
    if found := _POST.fullmatch(query):
        return found.groupdict(), TLDR_FORMAT, "post"
    if found := _NEWS.fullmatch(query):
        return found.groupdict(), NEWS_FORMAT, "article"
    return None


def cut_sentence(
    tokens: Sequence[int], length: int, start_token: int | None, end_token: int | None
) -> list[int] | None:
    """At most `length` tokens after the first `start_token` up to the last `end_token`; None where one is absent.

    Where the first start token is the final token nothing is dropped before it (lm-human-preferences, detail 29).
    Without start and end tokens the first `length` tokens are taken.
    """
    kept = list(tokens)
    if start_token is not None:
        if start_token not in kept:
            return None
        first = kept.index(start_token) + 1
        kept = kept[first:] if first < len(kept) else kept
    kept = kept[:length]
    if end_token is not None:
        if end_token not in kept:
            return None
        kept = kept[: len(kept) - kept[::-1].index(end_token)]
    return kept


def books_query(
    tokens: Sequence[int], query_length: int, start_token: int | None, end_token: int | None, pad: int
) -> list[int] | None:
    """`cut_sentence` padded on the right to `query_length` (details 3 and 29); None where the text is skipped."""
    kept = cut_sentence(tokens, query_length, start_token, end_token)
    return None if kept is None else kept + [pad] * (query_length - len(kept))


def left_pad(tokens: Sequence[int], length: int, pad: int) -> list[int]:
    """`tokens` with pads on the left up to `length`, as TL;DR queries are stored."""
    return [pad] * (length - len(tokens)) + list(tokens)


def own_pad(tokens: Sequence[int], pad: int, stored: int = STORED_PAD) -> list[int]:
    """Stored label tokens with their pad replaced by the tokenizer's own (detail 26)."""
    return [pad if token == stored else token for token in tokens]
