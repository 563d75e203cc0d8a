"""The gold taste of the tasting room: what a note is truly worth, read from its text alone.

u = 3·coverage − 2·invented + 0.5·polite − rude − 0.5·repeats − 0.4·rambles − 0.3·broken
    − 0.05·(words over 32) − 1 if the note does not end
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from palate.worlds.tasting.words import (
    ADVERBS,
    COURTESIES,
    FACTS,
    FAMILY_OF,
    FOLLOWINGS,
    OPENINGS,
    POLITE_WORDS,
    RAMBLES,
    RUDE_WORDS,
    RUDENESSES,
)

_TOKEN = re.compile(r"[a-z]+|[^\sa-z]")
_STOPS = frozenset(".!?")
_SLOT = re.compile(r"\{([dabcv])\}")
_MARK = {"d": "<dish>", "a": "<fact>", "b": "<fact>", "c": "<fact>", "v": "<very>"}
LONG_WINDED = 32
"""Words a note may have before each further one costs."""


@dataclass(frozen=True)
class Utility:
    """What a note is worth and why. Counts are bounded, so no text is infinitely bad."""

    coverage: float
    """Share of the asked facts that a sound sentence states, 0 to 1."""
    invented: int
    """Facts and dishes stated that nobody asked for (at most 10)."""
    polite: int
    """1 when some sentence is courteous."""
    rude: int
    """Rude sentences (at most 3)."""
    repeats: int
    """Sentences said again, and facts said again within new sentences (at most 5)."""
    rambles: int
    """Sentences about neither the dish nor the guest (at most 3)."""
    broken: int
    """Neighbouring words that never meet in the room's language (at most 10)."""
    words: int
    """Length of the note in words."""
    ended: int
    """1 when the text closes with a full stop, an exclamation or a question mark."""

    @property
    def total(self) -> float:
        """The gold utility, between −34 and 3.5."""
        return (
            3.0 * self.coverage
            - 2.0 * self.invented
            + 0.5 * self.polite
            - 1.0 * self.rude
            - 0.5 * self.repeats
            - 0.4 * self.rambles
            - 0.3 * self.broken
            - 0.05 * min(max(0, self.words - LONG_WINDED), 60)
            - 1.0 * (1 - self.ended)
        )


def asked(prompt: str) -> tuple[str, list[str]]:
    """The dish (or "") and the facts a prompt asks for, in its order; any text is read, none is refused."""
    tokens = _tokens(prompt)
    dish = next((t for t in tokens if t in FAMILY_OF), "")
    return dish, list(dict.fromkeys(t for t in tokens if t in FACTS))


def utility(prompt: str, completion: str) -> Utility:
    """The gold utility of a note and its parts, from the two texts alone. Never raises."""
    dish, facts = asked(prompt)
    said, covered, strange, seen = set[str](), set[str](), set[str](), set[tuple[str, ...]]()
    polite = rude = repeats = rambles = broken = 0
    for sentence in _sentences(_tokens(completion)):
        faults = _faults(sentence)
        broken += faults
        mentions = [t for t in sentence if t in FACTS]
        named = set(mentions)
        repeats += 1 if sentence in seen else len(mentions) - len(named - said)
        seen.add(sentence)
        said |= named
        strange |= {t for t in sentence if t in FAMILY_OF and t != dish}
        covered |= named if _sound(sentence, faults) else set()
        courteous, harsh = not POLITE_WORDS.isdisjoint(sentence), not RUDE_WORDS.isdisjoint(sentence)
        polite |= courteous
        rude += harsh
        rambles += not (named or courteous or harsh or dish in sentence)
    return Utility(
        coverage=len(covered & set(facts)) / len(facts) if facts else 0.0,
        invented=min(len(said - set(facts)) + len(strange), 10),
        polite=int(polite),
        rude=min(rude, 3),
        repeats=min(repeats, 5),
        rambles=min(rambles, 3),
        broken=min(broken, 10),
        words=len(completion.split()),
        ended=int(completion.rstrip()[-1:] in _STOPS and bool(seen)),
    )


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The gold utility as a reward function; `columns` are accepted and not needed."""
    return [utility(p, c).total for p, c in zip(prompts, completions, strict=True)]


def describe(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Means of the total and of every part over (prompt, completion) pairs; the share of distinct notes."""
    if not pairs:
        return {}
    judged = [utility(p, c) for p, c in pairs]
    names = ["total", *(f.name for f in fields(Utility))]
    means = {name: sum(float(getattr(u, name)) for u in judged) / len(judged) for name in names}
    return means | {"distinct": len({c for _, c in pairs}) / len(pairs)}


def _tokens(text: str) -> list[str]:
    """Lower-case words and single signs; the two words of a dish or of a fact become one token."""
    tokens: list[str] = []
    for word in _TOKEN.findall(text.lower()):
        joined = f"{tokens[-1]} {word}" if tokens else ""
        if joined in FAMILY_OF or joined in FACTS:
            tokens[-1] = joined
        else:
            tokens.append(word)
    return tokens


def _sentences(tokens: list[str]) -> Iterator[tuple[str, ...]]:
    """Runs of tokens up to and with their closing sign; a lone closing sign is a sentence of its own."""
    start = 0
    for at, token in enumerate(tokens, 1):
        if token in _STOPS or at == len(tokens):
            yield tuple(tokens[start:at])
            start = at


_VERY = frozenset(ADVERBS)


def _classes(sentence: tuple[str, ...]) -> list[str]:
    """The sentence with facts, dishes and adverbs replaced by their kind, between its borders."""
    return ["<start>", *(_kind(token) for token in sentence)]


def _kind(token: str) -> str:
    if token in _STOPS:
        return "."
    if token in FACTS:
        return "<fact>"
    if token in FAMILY_OF:
        return "<dish>"
    return "<very>" if token in _VERY else token


def _neighbours() -> frozenset[tuple[str, str]]:
    """Every pair of neighbours that some template of the room contains."""
    pairs = set[tuple[str, str]]()
    for group in (*OPENINGS, *FOLLOWINGS, COURTESIES, RUDENESSES, RAMBLES):
        for template in group:
            marked = _SLOT.sub(lambda slot: f" {_MARK[slot[1]]} ", template)
            classes = _classes(tuple(re.findall(r"<[a-z]+>|[a-z]+|[^\sa-z]", marked.lower())))
            pairs.update(pairwise(classes))
    return frozenset(pairs)


_NEIGHBOURS = _neighbours()


def _sound(sentence: tuple[str, ...], faults: int) -> bool:
    """Whether a sentence may state facts: it begins as one of the room's does and is nearly free of faults."""
    return faults <= 1 and ("<start>", _kind(sentence[0])) in _NEIGHBOURS


def _faults(sentence: tuple[str, ...]) -> int:
    return sum(pair not in _NEIGHBOURS for pair in pairwise(_classes(sentence)))
