"""Answers token by token, as a stage wrote them to tokens.jsonl: what each number is called, and what they sum to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from palate.diagnosis.run_folder import Row, StageFolder, as_mapping, at, mapping, number


@dataclass(frozen=True)
class Column:
    """One number of a token. `summed` is whether its sum over an answer means something."""

    name: str
    title: str
    meaning: str
    summed: bool = False


COLUMNS = (
    Column("sampled_logp", "sampled", "log-probability when the token was drawn", True),
    Column("old_logp", "logp", "log-probability just before the update, from which the policy ratio is measured", True),
    Column("reference_logp", "ref", "log-probability under the reference", True),
    Column("kl", "KL", "logp − ref; its sum is the answer's KL to the reference", True),
    Column("value", "value", "value of the state before the token"),
    Column("return", "return", "what the value is trained towards"),
    Column("advantage", "adv", "advantage as the loss reads it"),
    Column("kl_penalty", "penalty", "what the KL cost: −β · KL", True),
    Column("token_reward", "given", "reward given to this very token", True),
    Column("score", "score", "the answer's score, on the token where it lands", True),
    Column("reward", "reward", "the reward that credit was computed from: penalty + given + score", True),
)
"""Every number a token may have, in the order in which it is shown."""

_NO_NUMBERS = ("t", "id", "text", "action_mask", "value_mask", "scored")


@dataclass(frozen=True)
class Answer:
    """One answer of one step. `tokens` are the prompt's and its own, in order, each a mapping of what is known."""

    step: int
    row: int
    prompt: str
    score: float | None
    parts: Row
    finished: bool
    memory: Row
    tokens: tuple[Row, ...]

    @cached_property
    def asked(self) -> tuple[Row, ...]:
        """The prompt's tokens."""
        return self.tokens[: self._begin]

    @cached_property
    def said(self) -> tuple[Row, ...]:
        """The answer's tokens, and the place behind them where something is learnt there."""
        return self.tokens[self._begin :]

    @cached_property
    def length(self) -> int:
        """How many tokens the policy said."""
        return sum(bool(token.get("action_mask")) for token in self.tokens)

    @property
    def _begin(self) -> int:
        masked = (t for t, token in enumerate(self.tokens) if token.get("action_mask") or token.get("value_mask"))
        return next(masked, len(self.tokens))

    def values(self, name: str) -> list[float]:
        """One number of each token that has it, those that are not finite left out."""
        return [x for token in self.tokens if (x := at(token, name)) is not None]

    def sums(self) -> dict[str, float]:
        """The sum over the answer of each number that can be summed."""
        return {c.name: sum(self.values(c.name)) for c in columns([self]) if c.summed}

    def means(self) -> dict[str, float]:
        """The mean of each number over the tokens that have it."""
        found = {c.name: self.values(c.name) for c in columns([self])}
        return {name: sum(values) / len(values) for name, values in found.items() if values}


def columns(answers: Iterable[Answer]) -> list[Column]:
    """The numbers that some token of these answers has; rewards given per token only where there were any."""
    tokens = [token for answer in answers for token in answer.tokens]
    names = dict.fromkeys(name for token in tokens for name in token if name not in _NO_NUMBERS)
    if not any(number(token.get("token_reward")) for token in tokens):
        names.pop("token_reward", None)
    known = [column for column in COLUMNS if column.name in names]
    return known + [Column(name, name, name) for name in names if name not in {c.name for c in COLUMNS}]


def steps(stage: StageFolder) -> dict[int, list[Answer]]:
    """The answers of each step at which some were written, in order."""
    found: dict[int, list[Answer]] = {}
    for row in stage.tokens:
        step, place = at(row, "step"), at(row, "row")
        if step is not None and place is not None and isinstance(row.get("tokens"), list):
            found.setdefault(int(step), []).append(_answer(row, int(step), int(place)))
    return dict(sorted(found.items()))


def _answer(row: Row, step: int, place: int) -> Answer:
    tokens = (as_mapping(token) for token in cast(Sequence[Any], row["tokens"]))
    return Answer(
        step=step,
        row=place,
        prompt=str(row.get("prompt", "")),
        score=at(row, "score"),
        parts=mapping(row, "parts"),
        finished=bool(row.get("finished")),
        memory=mapping(row, "memory"),
        tokens=tuple(token for token in tokens if token),
    )


SUMMARY = (("KL", "objective/kl"), ("score", "objective/scores"), ("length", "response/length_mean"))
"""What is logged of a whole rollout and can be counted from answers too."""


def logged(stage: StageFolder, step: int) -> dict[str, float]:
    """The summary of the whole rollout of a step, from metrics.jsonl; empty where it was not logged."""
    row = next((row for row in stage.metrics if number(row.get("step")) == step), {})
    return {title: value for title, name in SUMMARY if (value := at(row, name)) is not None}


def counted(answers: Sequence[Answer]) -> dict[str, float]:
    """The same summary of the answers at hand; equal to what was logged when they are the whole rollout."""
    scores = [answer.score for answer in answers if answer.score is not None]
    found: dict[str, Sequence[float]] = {
        "KL": [answer.sums()["kl"] for answer in answers if answer.values("kl")],
        "score": scores,
        "length": [float(answer.length) for answer in answers],
    }
    return {name: sum(values) / len(values) for name, values in found.items() if values}


BEHIND = "(state after)"


def visible(text: str) -> str:
    """Text as it can be shown anywhere: line ends and tabs have a sign, other unprintable characters are escaped."""
    signs = {"\n": "⏎", "\t": "⇥"}
    return "".join(signs.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def text_of(token: Row) -> str:
    """A token's text; the place behind an answer is named in brackets, for it has no token."""
    return visible(str(token.get("text", ""))) if "id" in token else BEHIND


def spelled(token: Row) -> str:
    """A token's text for a table: spaces at its edges have a sign, since they are part of it."""
    text = text_of(token)
    bare = text.strip(" ")
    front = len(text) - len(text.lstrip(" "))
    return "␣" * front + bare + "␣" * (len(text) - front - len(bare))


def how_long(answer: Answer) -> str:
    """The answer's length in words."""
    ended = "ended by itself" if answer.finished else "cut by length"
    return f"{answer.length} token{'' if answer.length == 1 else 's'}, {ended}"


def as_json(answer: Answer) -> Mapping[str, Any]:
    """One answer for machines, with its sums and means."""
    about = {name: getattr(answer, name) for name in ("row", "prompt", "score", "parts", "finished", "memory")}
    return {**about, "sums": answer.sums(), "means": answer.means(), "tokens": list(answer.tokens)}
