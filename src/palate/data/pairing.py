"""Pairs out of thumbs: for the same prompt an answer with a thumb up is preferred to one with a thumb down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from palate.randomness import permutation
from palate.records import Ranking, Record, Text, Unpaired, fingerprint, preference
from palate.settings import PalateError


def pair_labels(records: Sequence[Record], seed: int) -> Iterator[Ranking]:
    """Each thumb up beside a thumb down for the same prompt, every answer used at most once, in a seeded order.

    Plain texts with labels share the empty prompt, so any good text is set against any bad one. PalateError when a
    record is no thumb or when no prompt has both.
    """
    by_prompt: dict[str, tuple[list[Text], list[Text]]] = {}
    prompts: dict[str, Text] = {}
    for record in records:
        if not isinstance(record, Unpaired):
            kind = type(record).__name__.lower()
            raise PalateError(f"pair_labels: expected answers with labels, got a {kind}. Set format: labelled_text.")
        name = fingerprint(record.prompt)
        prompts[name] = record.prompt
        up, down = by_prompt.setdefault(name, ([], []))
        (up if record.label else down).append(record.completion)
    if not any(up and down for up, down in by_prompt.values()):
        raise PalateError("pair_labels: no prompt has both a thumb up and a thumb down. Check the labels.")
    for name, (up, down) in by_prompt.items():
        ups = permutation(len(up), seed, "up", name)
        downs = permutation(len(down), seed, "down", name)
        for i, j in zip(ups, downs, strict=False):
            yield preference(prompts[name], up[i], down[j])
