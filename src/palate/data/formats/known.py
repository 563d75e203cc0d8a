"""The table of formats, and the detective: which of them a row's columns fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from palate.data.formats import instruct, published, trl
from palate.data.formats.row import BadRow, Row, listed, one_line
from palate.records import Record
from palate.settings import PalateError, nearest

Columns = Mapping[str, Any]


def _always(_: Columns) -> bool:
    return True


@dataclass(frozen=True)
class Format:
    """One shape of rows: the columns it needs, those it also understands, and how it becomes records.

    `needs` holds groups of alternative names, one of each group must be there; `fits` looks at a row's values.
    A format that is not `guessed` is only used when it is asked for by name.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Row], Iterator[Record]]
    also: tuple[str, ...] = ()
    fits: Callable[[Columns], bool] = _always
    guessed: bool = True
    note: str = ""
    """What the reader of a file in this format must be told."""

    def explains(self, columns: set[str]) -> set[str]:
        """The columns of a row that this format understands."""
        return columns & {name for group in (*self.needs, self.also) for name in group}

    def matches(self, row: Columns) -> bool:
        """Whether a row has what the format needs."""
        there = all(any(row.get(name) is not None for name in group) for group in self.needs)
        return self.guessed and there and self.fits(row)

    @property
    def shape(self) -> str:
        """The needed columns as people write them: {prompt, chosen, rejected}."""
        return "{" + ", ".join("|".join(group) for group in self.needs) + "}"

    @property
    def meaning(self) -> str:
        """The first line of the reader's documentation."""
        return (self.read.__doc__ or "").strip().split("\n")[0]


def _one(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


def _is_list(row: Columns) -> bool:
    return isinstance(row["output"], list)


def _thumb(row: Columns) -> bool:
    value = row.get("label", row.get("kto_tag"))
    return isinstance(value, bool) or value in (0, 1) or str(value).lower() in {"true", "false", "0", "1"}


def _reference_summary(row: Columns) -> bool:
    return isinstance(row["label"], str) and "completion" not in row and "completions" not in row


def _both_transcripts(row: Columns) -> bool:
    return published.is_transcript(row["chosen"]) and published.is_transcript(row["rejected"])


def _has_picture(row: Columns) -> bool:
    asks = row.get("question") is not None and row.get("rejected") is not None
    return asks or (isinstance(row.get("text"), str) and str(row["text"]).lstrip().startswith("{"))


_TALK = trl.CONVERSATION
_EXTRA = ("group", "tree", "images", "tools", "system")
_ASKED = ("input", "history", "system")
_PAIR = (*_EXTRA, *trl.MARGINS, trl.SOFT)

FORMATS: tuple[Format, ...] = (
    Format("text", _one("text"), trl.text, _EXTRA),
    Format("labelled_text", _one("text", "label"), trl.labelled_text, _EXTRA, guessed=False),
    Format("messages", _one("messages"), trl.messages, _EXTRA, lambda row: "chosen" not in row),
    Format("sharegpt", _one("conversations"), trl.messages, _EXTRA),
    Format("prompt", _one("prompt"), trl.prompt_only, _EXTRA),
    Format("prompt_completion", _one("prompt", "completion"), trl.prompt_completion, _EXTRA),
    Format("preference", _one("prompt", "chosen", "rejected"), trl.explicit_preference, _PAIR),
    Format(
        "implicit_preference",
        _one("chosen", "rejected"),
        trl.implicit_preference,
        _PAIR,
        lambda row: not _both_transcripts(row),
    ),
    Format("transcripts", _one("chosen", "rejected"), published.transcripts, _PAIR, _both_transcripts),
    Format("conversation_preference", (_TALK, ("chosen",), ("rejected",)), trl.conversation_preference, _PAIR),
    Format("unpaired", (("prompt",), ("completion",), ("label", "kto_tag")), trl.unpaired, _EXTRA, fits=_thumb),
    Format("conversation_unpaired", (_TALK, ("label", "kto_tag")), trl.conversation_unpaired, _EXTRA, _thumb),
    Format("stepwise", _one("prompt", "completions", "labels"), trl.stepwise, _EXTRA),
    Format("ranking", (("prompt", *_TALK), ("completions",), ("ranks", "ranking", "scores")), trl.ranking, _EXTRA),
    Format("rated", _one("prompt", "completion", "rating"), trl.rated, _EXTRA),
    Format("correction", _one("prompt", "original", "corrected"), trl.correction, (*_EXTRA, "spans")),
    Format(
        "alpaca",
        _one("instruction", "output"),
        instruct.alpaca,
        _ASKED,
        lambda row: not _is_list(row),
    ),
    Format("instruction", _one("instruction"), instruct.instruction, _ASKED),
    Format(
        "alpaca_preference",
        _one("instruction", "chosen", "rejected"),
        instruct.alpaca_preference,
        (*_ASKED, "output", *_PAIR),
    ),
    Format(
        "alpaca_ranking",
        _one("instruction", "output"),
        instruct.alpaca_ranking,
        _ASKED,
        _is_list,
    ),
    Format(
        "alpaca_eval",
        _one("instruction", "output_2", "preference"),
        instruct.alpaca_eval,
        ("output_1", *_ASKED),
    ),
    Format("question_answer", _one("question", "answer"), instruct.question_answer),
    Format("seed_tasks", _one("instruction", "instances"), instruct.seed_tasks),
    Format("summary_sentences", _one("source", "target"), instruct.summary_sentences),
    Format("summary_comparison", _one("info", "summaries", "choice"), published.summary_comparison),
    Format("tldr_post", _one("subreddit", "title", "post"), published.tldr_post, ("summary", "id")),
    Format("tldr_label", _one("prompt", "label"), published.tldr_label, fits=_reference_summary),
    Format("human_preferences", _one("query", "sample0", "best"), published.human_preferences),
    Format(
        "arena",
        _one("model_a", "model_b", "winner"),
        published.arena,
        ("prompt", "question", "instruction", "response_a", "response_b", "conversation_a", "conversation_b"),
    ),
    Format(
        "picture_preference",
        (("image", "image_path", "segments"),),
        published.picture_preference,
        ("text", "question", "chosen", "rejected", "images"),
        _has_picture,
        note="only the text of these rows is read: pictures have their own issue",
    ),
)

BY_NAME: Mapping[str, Format] = {f.name: f for f in FORMATS}


def named(name: str, where: str = "format") -> Format:
    """The format called `name`."""
    if name not in BY_NAME:
        known = ", ".join(BY_NAME)
        raise PalateError(f"{where}: no format is called {name!r}.{nearest(name, BY_NAME)} Known: auto, {known}.")
    return BY_NAME[name]


def detect(row: Row) -> Format:
    """The one format that understands most of a row's columns. PalateError when there is none, or more than one."""
    columns = {str(k) for k, v in row.columns.items() if v is not None}
    fitting = [f for f in FORMATS if f.matches(row.columns)]
    best = [f for f in fitting if not any(f.explains(columns) < g.explains(columns) for g in fitting)]
    if len(best) == 1:
        return best[0]
    shown = listed(row.columns)
    if best:
        names = " or ".join(f"{f.name} {f.shape}" for f in best)
        fault = f"{row.place}: the columns {shown} fit {names}. Say which: format: {best[0].name}."
        raise PalateError(one_line(fault))
    fault = f"{row.place}: no known format has the columns {shown}.{_nearest_shape(columns)}"
    move = "Rename them with columns: {prompt: OLD_NAME, ...}, or name one: `palate list formats` shows them."
    raise PalateError(f"{one_line(fault)} {move}")


def _nearest_shape(columns: set[str]) -> str:
    """The format that lacks the fewest columns, among those that have some."""

    def lacking(f: Format) -> list[str]:
        return ["|".join(group) for group in f.needs if not columns & set(group)]

    close = [f for f in FORMATS if len(lacking(f)) < len(f.needs) and lacking(f)]
    if not close:
        return ""
    best = min(close, key=lambda f: (len(lacking(f)), f.name))
    return f" Nearest: {best.name} {best.shape}, which also needs {', '.join(lacking(best))}."


def catalogue() -> list[tuple[str, str, str]]:
    """(name, columns, meaning) of every format, for `palate list formats` and the docs."""
    return [(f.name, f.shape, f.meaning.partition(": ")[2]) for f in FORMATS]


def read_rows(
    rows: Iterable[Row | BadRow], name: str = "auto", bad: list[BadRow] | None = None
) -> Iterator[tuple[Format, Record]]:
    """Records of all rows with their format, which the first good row decides when `name` is auto.

    A row that cannot be read raises PalateError; with a list given it is put there and reading goes on. Where the
    file itself cannot be read further, PalateError is raised in any case.
    """
    chosen = None if name == "auto" else named(name)
    for row in rows:
        try:
            chosen, found = _records(row, chosen)
        except PalateError as fault:
            if bad is None:
                raise
            bad.append(row if isinstance(row, BadRow) else _set_aside(row, str(fault)))
            continue
        for record in found:
            yield chosen, record


def _records(row: Row | BadRow, chosen: Format | None) -> tuple[Format, list[Record]]:
    """A row's records, read as `chosen` or as what its columns fit."""
    if isinstance(row, BadRow):
        raise PalateError(row.message)
    how = chosen or detect(row)
    return how, list(how.read(row))


def _set_aside(row: Row, fault: str) -> BadRow:
    return BadRow(row.place, fault.removeprefix(f"{row.place}: "), dict(row.columns))
