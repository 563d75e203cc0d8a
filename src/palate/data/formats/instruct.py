"""Instruction formats: Alpaca and its relatives, self-instruct seeds, abstracts with summaries."""

from __future__ import annotations

from collections.abc import Iterator

from palate.data.formats.row import Row
from palate.data.formats.shape import alike, assistant, distinct, user
from palate.data.formats.trl import pair
from palate.records import Demonstration, Message, Prompt, Ranking, Record, preference

_ALPACA = ("instruction", "input", "output", "history", "system")


def alpaca(row: Row) -> Iterator[Record]:
    """{instruction[, input, history, system], output}: a demonstration in conversational form."""
    prompt, answer = _question(row), assistant(row.text("output"))
    yield Demonstration(prompt, row.rest(*_ALPACA), completion=answer)


def instruction(row: Row) -> Iterator[Record]:
    """{instruction[, input, history, system]}: something to answer."""
    yield Prompt(_question(row), row.rest("instruction", "input", "history", "system"))


def alpaca_preference(row: Row) -> Iterator[Record]:
    """{instruction[, input], chosen, rejected}: a pair; a column `output` beside them travels along."""
    prompt, (chosen, rejected) = alike(row, _question(row), [row.said("chosen"), row.said("rejected")])
    yield pair(row, prompt, chosen, rejected, "instruction", "input", "history", "system", "chosen", "rejected")


def alpaca_ranking(row: Row) -> Iterator[Record]:
    """{instruction[, input, history], output: [best, …, worst]}: K answers, best first."""
    answers = [assistant(row.string(a, f"output[{i}]")) for i, a in enumerate(row.items("output"))]
    distinct(row, "output", answers)
    ranks = tuple(range(len(answers)))
    yield Ranking(_question(row), row.rest(*_ALPACA), completions=tuple(answers), ranks=ranks)


def alpaca_eval(row: Row) -> Iterator[Record]:
    """{instruction, output_1, output_2, preference in [1, 2]}: above 1.5 the second answer won; 1.5 is a tie."""
    if not row.has("output_1"):
        move = "Name the file of baseline answers: options: {baseline: FILE}"
        raise row.fault("output_1", "this row leaves out the baseline's answer", move)
    first, second = (assistant(row.text(f)) for f in ("output_1", "output_2"))
    verdict = row.number("preference")
    if not 1 <= verdict <= 2:
        raise row.fault("preference", f"expected a number from 1 to 2, got {verdict}", "Mend the row or remove it")
    prompt, more = _question(row), row.rest("instruction", "output_1", "output_2")
    if verdict == 1.5:
        yield Ranking(prompt, more, completions=(first, second), ranks=(0, 0))
    else:
        chosen, rejected = (second, first) if verdict > 1.5 else (first, second)
        yield preference(prompt, chosen, rejected, columns=more)


def question_answer(row: Row) -> Iterator[Record]:
    """{question, answer}: a demonstration; the answer also travels along for rewards that check it."""
    yield Demonstration(row.text("question"), row.rest("question"), completion=row.text("answer"))


def seed_tasks(row: Row) -> Iterator[Record]:
    """{instruction, instances: [{input, output}]}: self-instruct's seeds, one demonstration per instance."""
    question = row.text("instruction")
    more = row.rest("instruction", "instances")
    for i, item in enumerate(row.items("instances")):
        one = Row(Row({f"instances[{i}]": item}, row.place).mapping(f"instances[{i}]"), row.place)
        prompt = user(_joined(question, one.maybe("input")))
        yield Demonstration(prompt, more, question, completion=assistant(one.text("output")))


def summary_sentences(row: Row) -> Iterator[Record]:
    """{source: [sentence, …], target: [summary, …]}: one demonstration per summary, all of one group."""
    source = " ".join(row.string(s, f"source[{i}]") for i, s in enumerate(row.items("source")))
    for i, target in enumerate(row.items("target")):
        yield Demonstration(source, row.rest("source", "target"), completion=row.string(target, f"target[{i}]"))


def _question(row: Row) -> tuple[Message, ...]:
    """System text, earlier turns `[[question, answer], …]`, then the instruction with its input below it."""
    turns: list[Message] = []
    if system := row.maybe("system"):
        turns.append(Message("system", system))
    for i, exchange in enumerate(row.items("history") if row.columns.get("history") else []):
        said = Row({f"history[{i}]": exchange}, row.place).items(f"history[{i}]")
        if len(said) != 2:
            raise row.fault(f"history[{i}]", f"expected [question, answer], got {len(said)} items", "Mend the row")
        question, answer = (row.string(s, f"history[{i}][{j}]") for j, s in enumerate(said))
        turns += [Message("user", question), Message("assistant", answer)]
    return (*turns, *user(_joined(row.text("instruction"), row.maybe("input"))))


def _joined(instruction: str, given: str) -> str:
    return f"{instruction}\n{given}" if given else instruction
