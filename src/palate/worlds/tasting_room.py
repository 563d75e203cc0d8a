"""The tasting room: a self-made world whose true taste is known.

A prompt names a dish and one to three facts the guest cares about; the answer is a tasting note of a few
short sentences. Demonstrations are of mixed quality on purpose; simulated raters prefer by Bradley–Terry on
the gold utility. Because the truth is known, a run can show what nobody else can: reward-model accuracy
beside the ceiling that the raters' noise implies, and gold utility beside proxy reward.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from palate.randomness import generator, key
from palate.records import Correction, Demonstration, Prompt, Ranking, Record, Unpaired, text_of
from palate.settings import PalateError, Settings, nearest, parse
from palate.worlds.tasting.taste import Utility, asked, describe, score, utility
from palate.worlds.tasting.words import (
    ADVERBS,
    COURTESIES,
    FACTS_OF,
    FAMILY_OF,
    FOLLOWINGS,
    OPENINGS,
    RAMBLES,
    RUDENESSES,
)

__all__ = [
    "SHAPES",
    "Ceiling",
    "Room",
    "Utility",
    "asked",
    "ceiling",
    "describe",
    "readable",
    "records",
    "score",
    "utility",
]

_DRAWS = 24
"""Uniform draws behind one note, one place each: a flaw removed leaves every other choice as it was."""
_DISHES = tuple(FAMILY_OF)
_Draw = NDArray[np.float64]


class Room(Settings):
    """How the room's writers err and how its raters choose. Rates are per note unless said otherwise."""

    split: Literal["train", "test"] = "train"
    """Which side of the prompt space is drawn from: a tenth of all (dish, facts) is test for any seed."""
    forget: float = Field(default=0.2, ge=0, le=1)
    """Chance that a fact is left out, per fact."""
    invent: float = Field(default=0.3, ge=0, le=1)
    """Chance that a fact nobody asked for is stated."""
    polite: float = Field(default=0.4, ge=0, le=1)
    """Chance of a courteous last sentence, where the note is not rude."""
    rude: float = Field(default=0.2, ge=0, le=1)
    """Chance of a rude last sentence."""
    ramble: float = Field(default=0.12, ge=0, le=1)
    """Chance of a sentence about something else."""
    repeat: float = Field(default=0.1, ge=0, le=1)
    """Chance that a sentence is said twice."""
    slip: float = Field(default=0.05, ge=0, le=1)
    """Chance of a slip of the pen: a word dropped, doubled or swapped with its neighbour."""
    cut: float = Field(default=0.05, ge=0, le=1)
    """Chance that the note breaks off before its end."""
    temperature: float = Field(default=0.5, gt=0)
    """Noise of the raters: they prefer A to B with probability sigmoid((u(A) − u(B)) / temperature)."""
    position_bias: float = 0.0
    """Added to the log-odds of the answer shown first (pairs only)."""
    answers: int = Field(default=4, ge=2, le=16)
    """Answers per prompt in rankings (K)."""
    threshold: float = 1.0
    """Utility at which a thumb goes up half of the time."""


@dataclass(frozen=True)
class _Flaws:
    """What one note states and what goes wrong in it."""

    facts: tuple[str, ...]
    """The facts it states, in order: some of those asked, perhaps one invented."""
    closing: Literal["polite", "rude", "none"]
    ramble: bool
    repeat: bool
    slip: bool
    cut: bool


def records(shape: str, rows: int, seed: int, **options: object) -> list[Record]:
    """`rows` records of one shape, a pure function of the arguments; `options` are the fields of `Room`.

    The first n rows of a longer call equal a call for n. No record occurs twice, so the prompts of shape
    "prompts" are distinct. Raises PalateError for an unknown shape or option, and for more rows than exist.
    """
    room = parse(Room, options, "world tasting_room")
    if shape not in SHAPES:
        hint = f"{nearest(shape, SHAPES)} Known: {', '.join(SHAPES)}."
        raise PalateError(f"world tasting_room: there is no shape {shape!r}.{hint}")
    found = list(islice(_distinct(_stream(shape, room, seed), rows), max(rows, 0)))
    if len(found) < rows:
        few = f"only {len(found)} distinct {shape} were found on the {room.split} split"
        raise PalateError(f"world tasting_room: {few}. Ask for fewer rows.")
    return found


def _stream(shape: str, room: Room, seed: int) -> Iterator[Record]:
    """Endless records; each sees its own generator, so that no record depends on another."""
    for row in count():
        rng = generator("tasting room", shape, seed, room.split, row)
        yield SHAPES[shape](room, _prompt(room.split, rng), rng)


def _distinct(stream: Iterator[Record], rows: int) -> Iterator[Record]:
    """The stream without records seen before, given up once repeats far outnumber the rows asked for."""
    seen = set[object]()
    for record in islice(stream, 1000 + 20 * max(rows, 0)):
        name = tuple(value for field, value in vars(record).items() if field != "columns")
        if name not in seen:
            seen.add(name)
            yield record


def _prompt(split: str, rng: np.random.Generator) -> Prompt:
    """A dish and one to three facts in a random order, from one side of the prompt space."""
    while True:
        number, which = rng.random(2)
        dish = _pick(_DISHES, which)
        verbs = list(FACTS_OF[FAMILY_OF[dish]].values())
        order = np.argsort(rng.random(len(verbs)))[: 1 + (number > 0.15) + (number > 0.5)]
        facts = [_pick(verbs[i], rng.random()) for i in order]
        if split == ("train" if key("tasting room split", dish, *sorted(facts)) % 10 else "test"):
            return Prompt(f"Dish: {dish}. Facts: {', '.join(facts)}.\nNote:", {"dish": dish, "facts": facts})


def _flaws(room: Room, prompt: Prompt, draw_N: _Draw) -> _Flaws:
    """Decide what one note states and what goes wrong in it."""
    asked_for, dish = prompt.columns["facts"], prompt.columns["dish"]
    facts = [f for f, u in zip(asked_for, draw_N, strict=False) if u >= room.forget]
    if draw_N[3] < room.invent:
        others = [f for known in FACTS_OF[FAMILY_OF[dish]].values() for f in known if f not in asked_for]
        facts.insert(int(draw_N[4] * (len(facts) + 1)), _pick(others, draw_N[5]))
    closing = "rude" if draw_N[6] < room.rude else "polite" if draw_N[7] < room.polite else "none"
    wrong = draw_N[8:12] < (room.ramble, room.repeat, room.slip, room.cut)
    return _Flaws(tuple(facts), closing, *(bool(w) for w in wrong))


def _mended(prompt: Prompt) -> _Flaws:
    return _Flaws(tuple(prompt.columns["facts"]), "polite", False, False, False, False)


def _pick(words: Sequence[str], draw: float) -> str:
    return words[int(draw * len(words))]


def _write(dish: str, flaws: _Flaws, draw_N: _Draw) -> str:
    """The note, with a leading space; the same draws give the same wording where the facts allow it."""
    stated = _statements(dish, flaws.facts, draw_N[12:18])
    if flaws.repeat:
        stated.append(_pick(stated, draw_N[18]))
    if flaws.ramble:
        stated.insert(1 + int(draw_N[19] * len(stated)), _pick(RAMBLES, draw_N[20]))
    if flaws.closing != "none":
        stated.append(_pick(RUDENESSES if flaws.closing == "rude" else COURTESIES, draw_N[21]))
    words = " ".join(stated).split(" ")
    if flaws.slip:
        words = _slip(words, draw_N[22])
    if flaws.cut:
        words = words[: 2 + int(draw_N[23] * max(len(words) - 3, 1))]
        words[-1] = words[-1].rstrip(".,")
    return " " + " ".join(words)


def _statements(dish: str, facts: tuple[str, ...], draw_N: _Draw) -> list[str]:
    """One or two sentences that state the facts in their order, split as the first draw says."""
    first = min(len(facts), 3)
    if len(facts) > 3 or (facts and draw_N[0] < 0.45):
        least = max(len(facts) - 2, 0)
        first = least + int(draw_N[1] * (len(facts) - least))
    rest = facts[first:]
    sentences = [_fill(_pick(OPENINGS[first], draw_N[2]), dish, facts[:first], draw_N[3])]
    if rest:
        sentences.append(_fill(_pick(FOLLOWINGS[len(rest)], draw_N[4]), dish, rest, draw_N[5]))
    return sentences


def _fill(template: str, dish: str, facts: tuple[str, ...], draw: float) -> str:
    return template.format(d=dish, v=_pick(ADVERBS, draw), **dict(zip("abc", facts, strict=False)))


def _slip(words: list[str], draw: float) -> list[str]:
    """Drop, double or swap one word away from the borders."""
    kind, at = divmod(draw * 3, 1)
    i = 1 + int(at * (len(words) - 2))
    left, right = words[i : i + 1], words[i + 1 : i + 2]
    middle = (right, left + left + right, right + left)[int(kind)]
    return words[:i] + middle + words[i + 2 :]


def _note(room: Room, prompt: Prompt, rng: np.random.Generator) -> str:
    draw_N = rng.random(_DRAWS)
    return _write(prompt.columns["dish"], _flaws(room, prompt, draw_N), draw_N)


def _notes(room: Room, prompt: Prompt, rng: np.random.Generator, number: int) -> tuple[str, ...]:
    """`number` different notes for one prompt."""
    notes = dict[str, None]()
    for _ in range(1000):
        notes[_note(room, prompt, rng)] = None
        if len(notes) == number:
            return tuple(notes)
    raise PalateError(f"world tasting_room: these rates leave fewer than {number} different notes. Raise some.")


def _values(prompt: Prompt, notes: Sequence[str]) -> _Draw:
    return np.array([utility(text_of(prompt.prompt), note).total for note in notes])


def _asking(room: Room, prompt: Prompt, rng: np.random.Generator) -> Prompt:
    return prompt


def _demonstration(room: Room, prompt: Prompt, rng: np.random.Generator) -> Demonstration:
    return Demonstration(prompt.prompt, prompt.columns, completion=_note(room, prompt, rng))


def _pair(room: Room, prompt: Prompt, rng: np.random.Generator) -> Ranking:
    """Two notes in the order shown; Bradley and Terry 1952 with a bias for the first."""
    notes = _notes(room, prompt, rng, 2)
    first_wins = rng.random() < _first_wins(_values(prompt, notes), room.temperature, room.position_bias)
    return Ranking(prompt.prompt, prompt.columns, completions=notes, ranks=(0, 1) if first_wins else (1, 0))


def _ranking(room: Room, prompt: Prompt, rng: np.random.Generator) -> Ranking:
    """K notes ranked by Plackett and Luce: sorting utility/temperature + Gumbel noise draws from it."""
    notes = _notes(room, prompt, rng, room.answers)
    noisy_K = _values(prompt, notes) / room.temperature + rng.gumbel(size=len(notes))
    ranks = np.argsort(np.argsort(-noisy_K))
    return Ranking(prompt.prompt, prompt.columns, completions=notes, ranks=tuple(int(r) for r in ranks))


def _thumb(room: Room, prompt: Prompt, rng: np.random.Generator) -> Unpaired:
    note = _note(room, prompt, rng)
    liked = _sigmoid((float(_values(prompt, [note])[0]) - room.threshold) / room.temperature)
    return Unpaired(prompt.prompt, prompt.columns, completion=note, label=bool(rng.random() < liked))


def _correction(room: Room, prompt: Prompt, rng: np.random.Generator) -> Correction:
    """A flawed note and the same note mended; spans are what was put in (none if no writer errs)."""
    original, corrected, spans = "", "", ()
    for _ in range(100):
        draw_N = rng.random(_DRAWS)
        original = _write(prompt.columns["dish"], _flaws(room, prompt, draw_N), draw_N)
        corrected = _write(prompt.columns["dish"], _mended(prompt), draw_N)
        if spans := _changed(original, corrected):
            break
    return Correction(prompt.prompt, prompt.columns, original=original, corrected=corrected, spans=spans)


def _changed(original: str, corrected: str) -> tuple[tuple[int, int], ...]:
    """(start, end) characters of the runs of words of `corrected` that `original` lacks."""
    before = original.split()
    after = list(re.finditer(r"\S+", corrected))
    matcher = difflib.SequenceMatcher(None, before, [m[0] for m in after], autojunk=False)
    runs = [(j1, j2) for tag, _, _, j1, j2 in matcher.get_opcodes() if tag != "equal" and j1 < j2]
    return tuple((after[j1].start(), after[j2 - 1].end()) for j1, j2 in runs)


def _sigmoid(x: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * x))


def _first_wins(value_2: _Draw, temperature: float, bias: float) -> float:
    return _sigmoid(float(value_2[0] - value_2[1]) / temperature + bias)


SHAPES: dict[str, Callable[[Room, Prompt, np.random.Generator], Record]] = {
    "prompts": _asking,
    "demonstrations": _demonstration,
    "pairs": _pair,
    "rankings": _ranking,
    "thumbs": _thumb,
    "corrections": _correction,
}
"""Every shape of data the room gives, each from one prompt and one generator."""


@dataclass(frozen=True)
class Ceiling:
    """What the raters' noise allows on given comparisons."""

    bayes: float
    """Expected accuracy of a judge who knows the raters' true probabilities: mean of max(p, 1 − p)."""
    gold: float
    """Accuracy of the gold order on the labels as they are; equal utilities count one half."""
    pairs: int
    """Comparisons counted."""


def ceiling(comparisons: Sequence[Record], temperature: float = 0.5, position_bias: float = 0.0) -> Ceiling:
    """The Bayes ceiling of pairs or rankings (whose pairs are Bradley–Terry too); PalateError without any."""
    best, right = list[float](), list[float]()
    for record in comparisons:
        if not isinstance(record, Ranking):
            continue
        value_K = _values(record, [text_of(c) for c in record.completions])
        bias = position_bias if len(value_K) == 2 else 0.0
        for better, worse in record.pairs:
            first, second = sorted((better, worse))
            p = _first_wins(value_K[[first, second]], temperature, bias)
            best.append(max(p, 1 - p))
            right.append(0.5 + 0.5 * float(np.sign(value_K[better] - value_K[worse])))
    if not best:
        raise PalateError("world tasting_room: a ceiling needs pairs or rankings. Give records of such a shape.")
    return Ceiling(float(np.mean(best)), float(np.mean(right)), len(best))


def readable(record: Record) -> str:
    """A record for people: the prompt, then its answers, best first, with their gold utility."""
    prompt = text_of(record.prompt)
    match record:
        case Demonstration() | Unpaired():
            answers = [record.completion]
        case Ranking():
            answers = [record.completions[i] for i in np.argsort(record.ranks)]
        case Correction():
            answers = [record.corrected, record.original]
        case _:
            answers = []
    return "\n".join([prompt, *(f"{utility(prompt, text_of(a)).total:+.2f}{text_of(a)}" for a in answers)])
