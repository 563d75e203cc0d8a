"""Answers token by token in the report: running text that is coloured by what each token earned, and its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from palate.diagnosis.run_folder import Row, RunFolder, StageFolder, at, number
from palate.diagnosis.svg import short
from palate.diagnosis.tokens import BEHIND, Answer, Column, columns, how_long, spelled, steps, text_of

_LEVELS = 4
"""How many strengths of colour there are."""

_PAINTS = {
    "advantage": "Blue tokens did better than expected and become likelier; red, dotted ones did worse.",
    "kl": "Blue tokens are likelier than under the reference; red, dotted ones less likely.",
}
"""What the background may show, the first that there is, and how it is read."""


@dataclass(frozen=True)
class Piece:
    """A token in running text: its colour, and its numbers in words. `landed` is the score that lands on it."""

    text: str
    style: str
    hint: str
    landed: str


@dataclass(frozen=True)
class Told:
    """One answer: what heads it, its text in pieces, and the table of its numbers."""

    title: str
    scores: Sequence[tuple[str, str]]
    prompt: Sequence[str]
    pieces: Sequence[Piece]
    columns: Sequence[Column]
    rows: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Pages:
    """The answers of a stage's first and last step, and what their background means."""

    stage: str
    reading: str
    steps: Sequence[tuple[int, Sequence[Told]]]


def of(run: RunFolder) -> list[Pages]:
    """One for each stage that wrote answers token by token."""
    found = ((stage, ends(stage)) for stage in run.stages)
    return [_pages(stage, answers) for stage, answers in found if answers]


def ends(stage: StageFolder) -> dict[int, list[Answer]]:
    """The answers of the first and of the last step at which some were written."""
    every = steps(stage)
    return {step: every[step] for step in dict.fromkeys([*list(every)[:1], *list(every)[-1:]])}


def _pages(stage: StageFolder, answers: dict[int, list[Answer]]) -> Pages:
    there = {column.name for column in columns(a for found in answers.values() for a in found)}
    paint = next((name for name in _PAINTS if name in there), "")
    shown = [(step, [_told(answer, paint, found) for answer in found]) for step, found in answers.items()]
    return Pages(stage.name, _PAINTS.get(paint, ""), shown)


def _told(answer: Answer, paint: str, siblings: Sequence[Answer]) -> Told:
    every = columns([answer])
    largest = max((abs(x) for sibling in siblings for x in sibling.values(paint)), default=0.0)
    scores = {"score": answer.score, "KL": answer.sums().get("kl"), **answer.parts, **answer.memory}
    return Told(
        title=f"Row {answer.row}: {how_long(answer)}",
        scores=[(name, short(x)) for name, given in scores.items() if (x := number(given)) is not None],
        prompt=[text_of(token) for token in answer.asked],
        pieces=[_piece(token, paint, largest, every) for token in answer.said],
        columns=every,
        rows=[*(_row(token, every) for token in answer.said), *_totals(answer, every)],
    )


def _piece(token: Row, paint: str, largest: float, every: Sequence[Column]) -> Piece:
    hint = ", ".join(f"{column.title} {_cell(token, column.name)}" for column in every if column.name in token)
    landed = _cell(token, "score") if token.get("scored") else ""
    text = text_of(token).replace("⏎", "⏎\n")
    style = "behind" if text == BEHIND else _style(at(token, paint), largest)
    return Piece(text, style, hint, landed)


def _style(x: float | None, largest: float) -> str:
    """The class of a background: the sign, and one of a few strengths; none for what is next to nothing."""
    strength = round(_LEVELS * abs(x) / largest) if x and largest else 0
    return f"{'up' if x and x > 0 else 'down'}{strength}" if strength else ""


def _row(token: Row, every: Sequence[Column]) -> tuple[str, Sequence[str]]:
    return spelled(token), [_cell(token, column.name) for column in every]


def _cell(token: Row, name: str) -> str:
    """A number; `nan` where it was none, and nothing where the token has none."""
    x = number(token.get(name))
    return short(x) if x is not None else "nan" if name in token else ""


def _totals(answer: Answer, every: Sequence[Column]) -> Iterator[tuple[str, Sequence[str]]]:
    for name, figures in (("(sum)", answer.sums()), ("(mean)", answer.means())):
        yield name, [short(figures[c.name]) if c.name in figures else "" for c in every]


_STANDING_OUT = 3


def in_brief(run: RunFolder) -> Iterator[str]:
    """The first answer of the first and of the last step in a few plain lines: its tokens that stand out."""
    for stage in run.stages:
        for step, answers in ends(stage).items():
            answer = answers[0]
            sums = ", ".join(f"{c.title} {short(answer.sums()[c.name])}" for c in columns([answer]) if c.summed)
            yield f"{stage.name}, step {step}, row {answer.row}: {how_long(answer)}; sums: {sums}"
            for name, title in (("advantage", "adv"), ("kl", "KL")):
                yield from _standing_out(answer, name, title)
            yield ""


def _standing_out(answer: Answer, name: str, title: str) -> Iterator[str]:
    having = [token for token in answer.said if at(token, name)]
    ordered = sorted(having, key=lambda token: -(at(token, name) or 0.0))
    for what, chosen in (("greatest", ordered[:_STANDING_OUT]), ("least", ordered[::-1][:_STANDING_OUT])):
        if chosen:
            said = ", ".join(f"{token.get('t')} “{text_of(token)}” {_cell(token, name)}" for token in chosen)
            yield f"  {what} {title}: {said}"
