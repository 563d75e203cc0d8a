"""TRL's dataset shapes, text and conversational: the shapes that every other format is brought to."""

from __future__ import annotations

from collections.abc import Iterator

from palate.data.formats.row import IMAGES_ELSEWHERE, Row, shown
from palate.data.formats.shape import alike, assistant, distinct, implicit_prompt, last_answer
from palate.records import (
    Correction,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Rated,
    Record,
    Text,
    Unpaired,
    fingerprint,
    preference,
)

CONVERSATION = ("messages", "conversations")
MARGINS = ("margin", "rank_gap")
SOFT = "probability"
"""The column of a soft label: how likely `chosen` is the better answer, as a judge who is not sure states it."""


def text(row: Row) -> Iterator[Record]:
    """{text}: a plain text to model; each text is its own group."""
    _no_images(row)
    said = row.text("text")
    yield Demonstration("", row.rest("text"), _group(row) or fingerprint(said), completion=said)


def labelled_text(row: Row) -> Iterator[Record]:
    """{text, label}: a text with a thumb up or down. Never guessed; ask for it by name."""
    said = row.text("text")
    group = _group(row) or fingerprint(said)
    yield Unpaired("", row.rest("text", "label"), group, completion=said, label=row.flag("label"))


def messages(row: Row) -> Iterator[Record]:
    """{messages} or {conversations}: a conversation; the last assistant turn is the completion."""
    _no_images(row)
    field = row.first(*CONVERSATION)
    prompt, answer = last_answer(row, _with_system(row, row.turns(field)))
    yield Demonstration(prompt, row.rest(field, "system"), _group(row), completion=answer)


def prompt_only(row: Row) -> Iterator[Record]:
    """{prompt}: something to answer."""
    _no_images(row)
    yield Prompt(row.said("prompt"), row.rest("prompt"), _group(row))


def prompt_completion(row: Row) -> Iterator[Record]:
    """{prompt, completion}: a demonstration."""
    _no_images(row)
    prompt, (answer,) = alike(row, row.said("prompt"), [row.said("completion")])
    yield Demonstration(prompt, row.rest("prompt", "completion"), _group(row), completion=answer)


def explicit_preference(row: Row) -> Iterator[Record]:
    """{prompt, chosen, rejected}: a preference pair."""
    _no_images(row)
    prompt, (chosen, rejected) = alike(row, row.said("prompt"), [row.said("chosen"), row.said("rejected")])
    yield pair(row, prompt, chosen, rejected, "prompt", "chosen", "rejected")


def implicit_preference(row: Row) -> Iterator[Record]:
    """{chosen, rejected}: a pair whose prompt is what both begin with."""
    _no_images(row)
    prompt, chosen, rejected = implicit_prompt(row, row.said("chosen"), row.said("rejected"))
    yield pair(row, prompt, chosen, rejected, "chosen", "rejected")


def conversation_preference(row: Row) -> Iterator[Record]:
    """{messages or conversations, chosen, rejected}: LLaMA-Factory's ranking rows and pairs from reply trees."""
    _no_images(row)
    field = row.first(*CONVERSATION)
    turns = _with_system(row, row.turns(field))
    answers = [_spoken(row.said(name)) for name in ("chosen", "rejected")]
    prompt, (chosen, rejected) = alike(row, turns, answers)
    yield pair(row, prompt, chosen, rejected, field, "chosen", "rejected", "system")


def unpaired(row: Row) -> Iterator[Record]:
    """{prompt, completion, label}: an answer with a thumb up or down."""
    _no_images(row)
    field = row.first("label", "kto_tag")
    prompt, (answer,) = alike(row, row.said("prompt"), [row.said("completion")])
    more = row.rest("prompt", "completion", field)
    yield Unpaired(prompt, more, _group(row), completion=answer, label=row.flag(field))


def conversation_unpaired(row: Row) -> Iterator[Record]:
    """{messages or conversations, label or kto_tag}: a thumb for the last assistant turn."""
    _no_images(row)
    field, mark = row.first(*CONVERSATION), row.first("label", "kto_tag")
    prompt, answer = last_answer(row, _with_system(row, row.turns(field)))
    more = row.rest(field, mark, "system")
    yield Unpaired(prompt, more, _group(row), completion=answer, label=row.flag(mark))


def stepwise(row: Row) -> Iterator[Record]:
    """{prompt, completions, labels}: steps with a thumb each; a step is judged given the steps before it."""
    prompt = row.said("prompt")
    steps = [row.string(s, f"completions[{i}]") for i, s in enumerate(row.items("completions"))]
    labels = row.items("labels")
    if len(labels) != len(steps):
        raise row.fault("labels", f"expected {len(steps)}, one per step, got {len(labels)}", "Give each step one label")
    group = _group(row) or fingerprint(prompt)
    more = row.rest("prompt", "completions", "labels")
    for i, step in enumerate(steps):
        label = Row({"labels": labels[i]}, row.place).flag("labels")
        before = _steps_so_far(prompt, steps[:i])
        answer: Text = step if isinstance(prompt, str) else assistant(step)
        yield Unpaired(before, {**more, "step": i}, group, completion=answer, label=label)


def ranking(row: Row) -> Iterator[Record]:
    """{prompt or messages, completions, ranks | ranking | scores}: K answers, stored whole.

    `ranks[i]` is the rank of answer i, smaller is better, equal is a tie; `ranking` lists answers best first, a
    list inside it is a tie; `scores[i]` is larger for better answers.
    """
    field = row.first("prompt", *CONVERSATION)
    given = [row.utterance(_answer(a), f"completions[{i}]") for i, a in enumerate(row.items("completions"))]
    distinct(row, "completions", given)
    prompt, answers = alike(row, row.said(field), given)
    more = row.rest(field, "completions", "ranks", "ranking", "scores")
    yield Ranking(prompt, more, _group(row), completions=tuple(answers), ranks=_ranks(row, len(answers)))


def rated(row: Row) -> Iterator[Record]:
    """{prompt, completion, rating}: an answer with a number."""
    prompt, (answer,) = alike(row, row.said("prompt"), [row.said("completion")])
    more = row.rest("prompt", "completion", "rating")
    yield Rated(prompt, more, _group(row), completion=answer, rating=row.number("rating"))


def correction(row: Row) -> Iterator[Record]:
    """{prompt, original, corrected[, spans]}: an answer and its corrected form with the changed characters."""
    prompt, (original, corrected) = alike(row, row.said("prompt"), [row.said("original"), row.said("corrected")])
    spans = tuple(_span(row, i, s) for i, s in enumerate(row.items("spans"))) if row.has("spans") else ()
    more = row.rest("prompt", "original", "corrected", "spans")
    yield Correction(prompt, more, _group(row), original=original, corrected=corrected, spans=spans)


def pair(row: Row, prompt: Text, chosen: Text, rejected: Text, *used: str) -> Ranking:
    """A preference with the row's margin, group and the columns that were not used."""
    field = row.first(*MARGINS)
    margin = row.number(field) if row.has(field) else None
    more = row.rest(*used, *MARGINS, SOFT)
    sure = _probability(row) if row.has(SOFT) else None
    return preference(prompt, chosen, rejected, margin, columns=more, group=_group(row), probability=sure)


def _probability(row: Row) -> float:
    value = row.number(SOFT)
    if not 0 <= value <= 1:
        move = "Give the probability, 0 to 1, that `chosen` is the better answer"
        raise row.fault(SOFT, f"expected a number from 0 to 1, got {value:g}", move)
    return value


def _group(row: Row) -> str:
    """What keeps rows together in a split: the tree that replies were taken from, or a column called `group`."""
    return next((str(row.columns[f]) for f in ("group", "tree") if row.has(f)), "")


def _no_images(row: Row) -> None:
    if row.columns.get("images"):
        raise row.fault("images", "this row comes with pictures", IMAGES_ELSEWHERE)


def _with_system(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    system = row.maybe("system")
    return (Message("system", system), *turns) if system else turns


def _spoken(said: Text) -> Text:
    return assistant(said) if isinstance(said, str) else said


def _steps_so_far(prompt: Text, steps: list[str]) -> Text:
    if isinstance(prompt, str):
        return prompt + "".join(f"{step}\n" for step in steps)
    return (*prompt, *(turn for step in steps for turn in assistant(step)))


def _answer(value: object) -> object:
    """The text of an answer given as an object without a role, such as {text: …} or {response: …}."""
    if isinstance(value, dict) and not {"role", "from"} & set(value):
        return next((value[k] for k in ("text", "response", "completion", "content") if k in value), value)
    return value


def _ranks(row: Row, count: int) -> tuple[int, ...]:
    field = row.first("ranks", "ranking", "scores")
    given = row.items(field)
    if field == "ranking":
        return _ranks_from_order(row, given, count)
    if len(given) != count:
        raise row.fault(field, f"expected {count}, one per completion, got {len(given)}", "Give each answer one")
    figures = [row.figure(v, f"{field}[{i}]") for i, v in enumerate(given)]
    places = sorted(set(figures), reverse=field == "scores")
    return tuple(places.index(figure) for figure in figures)


def _ranks_from_order(row: Row, order: list[object], count: int) -> tuple[int, ...]:
    ranks: dict[int, int] = {}
    for rank, entry in enumerate(order):
        for member in entry if isinstance(entry, list) else [entry]:
            place = Row({"ranking": member}, row.place).index("ranking", count)
            if place in ranks:
                raise row.fault("ranking", f"places answer {place} twice", "List every answer once, best first")
            ranks[place] = rank
    if len(ranks) != count:
        left = sorted(set(range(count)) - set(ranks))
        raise row.fault("ranking", f"does not place the answers {left}", "List every answer once, best first")
    return tuple(ranks[i] for i in range(count))


def _span(row: Row, i: int, value: object) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise row.fault(f"spans[{i}]", f"expected [start, end], got {shown(value)}", "Mend the span")
    start, end = (int(row.figure(v, f"spans[{i}]")) for v in value)
    if not 0 <= start <= end:
        raise row.fault(f"spans[{i}]", f"runs from {start} to {end}", "Give character positions, start before end")
    return start, end
