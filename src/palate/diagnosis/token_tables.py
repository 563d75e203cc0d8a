"""Answers token by token for a terminal: one table an answer, two steps side by side where there is room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from palate.diagnosis.run_folder import Row, number
from palate.diagnosis.tokens import Answer, Column, columns, counted, how_long, spelled, visible

_TOKEN, _NUMBER, _BETWEEN = 14, 7, 1
_FIXED = 4 + _BETWEEN + _TOKEN + _BETWEEN + 4  # place, token, mask
_LEAST_SIDE = 60
"""The narrowest table that is still worth a place beside another."""

_GIVEN_UP = ("sampled_logp", "score", "kl_penalty", "token_reward", "return", "reference_logp", "value", "old_logp")
"""Numbers that are left out first where there is no room, in this order."""

_SIGNED = {
    "kl": ("yellow", "cyan"),
    "advantage": ("green", "red"),
    "kl_penalty": ("green", "red"),
    "token_reward": ("green", "red"),
    "score": ("green", "red"),
    "reward": ("green", "red"),
}
"""The colours of positive and negative numbers, where a sign means something."""


@dataclass(frozen=True)
class Step:
    """What is shown of one step: its answers, and what was logged of the whole rollout."""

    name: str
    answers: Sequence[Answer]
    logged: Mapping[str, float]


def render(steps: Sequence[Step], width: int, with_prompt: bool = False) -> Iterator[RenderableType]:
    """Everything to print, from top to bottom, at most `width` columns wide."""
    beside = len(steps) > 1 and width >= len(steps) * (_LEAST_SIDE + 2)
    room = (width - 3 * (len(steps) - 1)) // len(steps) if beside else width
    if beside:
        yield _beside([_head(step) for step in steps], room)
        for answers in zip_longest(*(step.answers for step in steps)):
            yield _beside([_answer(a, room, with_prompt) if a else Text() for a in answers], room)
    else:
        for step in steps:
            yield _head(step)
            yield from (_answer(answer, room, with_prompt) for answer in step.answers)
    yield _legend([answer for step in steps for answer in step.answers], room)


def _beside(parts: Sequence[RenderableType], room: int) -> Table:
    grid = Table.grid(padding=(0, 3, 0, 0))
    for _ in parts:
        grid.add_column(width=room)
    grid.add_row(*parts)
    return grid


def _head(step: Step) -> RenderableType:
    """The step, and the summary of what is shown beside that of the whole rollout."""
    here = _summary(counted(step.answers))
    answers = f"{len(step.answers)} answer{'' if len(step.answers) == 1 else 's'} here"
    whole = _summary(step.logged) if step.logged else "not logged at this step"
    width = max(len(answers), len("whole rollout"))
    lines = f"{answers:<{width}}  {here}\n{'whole rollout':<{width}}  {whole}"
    return Group(Text(step.name, style="bold"), Text(lines), Text())


def _summary(found: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {figure(value)}" for name, value in found.items())


def _answer(answer: Answer, room: int, with_prompt: bool) -> RenderableType:
    counts = f"prompt {len(answer.asked)} tokens, answer {how_long(answer)}"
    parts = [f"{name} {figure(number(value))}" for name, value in {**answer.parts, **answer.memory}.items()]
    title = f"row {answer.row}  score {figure(answer.score)}  " + "  ".join(parts)
    prompt = Text(f"prompt: {visible(answer.prompt)}", style="dim", overflow="ellipsis", no_wrap=True)
    head = Group(Text(title.rstrip(), style="bold"), Text(counts), prompt)
    return Group(head, _table(answer, fitting(columns([answer]), room), room, with_prompt), Text())


def fitting(every: Sequence[Column], room: int) -> list[Column]:
    """The columns there is room for, the least telling left out first."""
    kept = list(every)
    for name in _GIVEN_UP:
        if _width(kept) <= room:
            break
        kept = [column for column in kept if column.name != name]
    return kept


def _width(shown: Sequence[Column]) -> int:
    return _FIXED + (_NUMBER + _BETWEEN) * len(shown)


def _table(answer: Answer, shown: Sequence[Column], room: int, with_prompt: bool) -> Table:
    table = Table(box=None, padding=(0, _BETWEEN, 0, 0), pad_edge=False)
    longest = _TOKEN + min(max(room - _width(shown), 0), _TOKEN)  # a long token never pushes a number out
    table.add_column("t", justify="right", width=4, no_wrap=True)
    table.add_column("token", no_wrap=True, overflow="ellipsis", min_width=_TOKEN, max_width=longest)
    for column in shown:
        table.add_column(column.title, justify="right", width=_NUMBER, no_wrap=True, overflow="ellipsis")
    table.add_column("mask", width=4, no_wrap=True)
    largest = {c.name: max((abs(x) for x in answer.values(c.name)), default=0.0) for c in shown}
    for token in answer.asked if with_prompt else ():
        table.add_row(*_place(token, "dim"))
    for token in answer.said:
        cells = (_cell(token, column.name, largest[column.name]) for column in shown)
        table.add_row(*_place(token, ""), *cells, marks(token))
    for name, figures in (("sum", answer.sums()), ("mean", answer.means())):
        table.add_row("", name, *(figure(figures[c.name]) if c.name in figures else "" for c in shown), style="bold")
    return table


def _place(token: Row, style: str) -> tuple[str, Text]:
    return str(token.get("t", "")), Text(spelled(token), style=style)


def _cell(token: Row, name: str, largest: float) -> Text:
    """One number, coloured by its sign and bold where it is among the large ones of its column."""
    if name not in token:
        return Text()
    x = number(token[name])
    if x is None:
        return Text("nan", style="bold red")
    if name == "score" and x == 0 and not token.get("scored"):
        return Text("·", style="dim")
    up, down = _SIGNED.get(name, ("", ""))
    weight = "bold" if x and up and abs(x) >= 0.5 * largest else ""
    return Text(figure(x), style=f"{weight} {up if x > 0 else down if x < 0 else 'dim'}".strip())


def marks(token: Row) -> str:
    """The masks of a token as letters, and the place where the score lands."""
    letters = (("a", "action_mask"), ("v", "value_mask"), ("S", "scored"))
    return "".join(letter if token.get(name) else " " for letter, name in letters).rstrip()


def figure(x: float | None) -> str:
    """A number in at most seven characters; one that is not 0 is never shown as 0."""
    if x is None:
        return "nan"
    size = abs(x)
    if 0 < size < 5e-4 or size >= 1e6:
        return f"{x:.0e}"
    shapes: tuple[tuple[float, Callable[[float], str]], ...] = (
        (10, "{:.3f}".format),
        (100, "{:.2f}".format),
        (1000, "{:.1f}".format),
    )
    shape = next((shape for limit, shape in shapes if size < limit), "{:.0f}".format)
    return shape(x) if size else "0"


def _legend(answers: Sequence[Answer], room: int) -> RenderableType:
    every = columns(answers)
    kept = fitting(every, room)
    lines = ["mask: a the policy said it and is trained on it, v its value is trained, S the score lands here"]
    gone = [column.title for column in every if column not in kept]
    if gone:
        lines.append(f"no room for: {', '.join(gone)}; a wider terminal or --json shows them")
    return Text("\n".join(lines), style="dim")
