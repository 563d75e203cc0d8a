"""One row of a file with its place, and typed ways to look into it; every fault says place, field and next move."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

from palate.records import Message, Text
from palate.settings import PalateError, nearest

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Names that files use for the four roles."""

IMAGES_ELSEWHERE = "Pictures are not read by this version (they have their own issue); leave them out to train on text"


_LONGEST_FAULT = 600
"""Characters of a fault that are told: a damaged row may hold megabytes."""


def one_line(text: str) -> str:
    """`text` as it may stand in an error: one line, nothing that a terminal would obey, not endless."""
    short = text if len(text) <= _LONGEST_FAULT else f"{text[: _LONGEST_FAULT - 60]} … {text[-50:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in short)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, in the place where the row would be: reading goes on after it."""

    place: str
    fault: str
    """What is wrong and the next move."""
    raw: Any
    """What stood there: the line as text, or the columns."""

    @property
    def message(self) -> str:
        """`place: fault`, one line."""
        return one_line(f"{self.place}: {self.fault}")


@dataclass(frozen=True)
class Row:
    """The columns of one row and where it stands, `file:line`."""

    columns: Mapping[str, Any]
    place: str

    def fault(self, field: str, problem: str, move: str) -> PalateError:
        """The error for this row: `place: field: problem. Next move.`"""
        return PalateError(one_line(f"{self.place}: {field}: {problem}. {move.strip()}."))

    def has(self, *fields: str) -> bool:
        """Whether every one of the fields is there and is not null."""
        return all(self.columns.get(f) is not None for f in fields)

    def first(self, *fields: str) -> str:
        """The first of several names of one column that this row has (the first name when it has none)."""
        return next((f for f in fields if self.has(f)), fields[0])

    def get(self, field: str) -> Any:
        """A value that must be there."""
        if not self.has(field):
            known = listed(self.columns)
            what = "is null" if field in self.columns else "is missing"
            raise self.fault(field, f"{what}; this row has the columns {known}", "Fill it in or remove the row")
        return self.columns[field]

    def text(self, field: str) -> str:
        """A string."""
        return self.string(self.get(field), field)

    def maybe(self, field: str) -> str:
        """A string, empty where the column is missing or null."""
        return self.text(field) if self.has(field) else ""

    def string(self, value: Any, field: str) -> str:
        """`value` as a proper string; `field` names it in the fault."""
        if not isinstance(value, str):
            move = "Write it in quotes, or name the right column under `columns`"
            raise self.fault(field, f"expected text, got {shown(value)}", move)
        if not _whole_characters(value):
            raise self.fault(field, "holds half of a character (a lone surrogate)", "Write the file as UTF-8 again")
        return value

    def items(self, field: str) -> list[Any]:
        """A list with at least one item; text that spells a JSON list (as in CSV cells) is read as one."""
        value = _unfolded(self.get(field))
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
            raise self.fault(field, f"expected a list with at least one item, got {shown(value)}", "Mend the row")
        return list(cast(Sequence[Any], value))

    def mapping(self, field: str) -> dict[str, Any]:
        """An object; text that spells a JSON object is read as one."""
        value = _unfolded(self.get(field))
        if not isinstance(value, Mapping):
            raise self.fault(field, f"expected an object, got {shown(value)}", "Mend the row")
        return {str(k): v for k, v in cast(Mapping[Any, Any], value).items()}

    def flag(self, field: str) -> bool:
        """True or false; 0 and 1 and their spellings in CSV files count."""
        value = self.get(field)
        known = _FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
        if known is None:
            raise self.fault(field, f"expected true or false, got {shown(value)}", "Write true, false, 1 or 0")
        return known

    def number(self, field: str) -> float:
        """A finite number; its spelling in a CSV file counts."""
        return self.figure(self.get(field), field)

    def figure(self, value: Any, field: str) -> float:
        """`value` as a finite number; `field` names it in the fault."""
        try:
            result = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        if not math.isfinite(result):
            raise self.fault(field, f"expected a number, got {shown(value)}", "Mend the row or remove it")
        return result

    def index(self, field: str, count: int) -> int:
        """A whole number from 0 to count - 1."""
        value = self.number(field)
        if value != int(value) or not 0 <= value < count:
            move = "Count from 0"
            raise self.fault(field, f"expected a whole number from 0 to {count - 1}, got {shown(value)}", move)
        return int(value)

    def turns(self, field: str) -> tuple[Message, ...]:
        """A conversation: `[{role, content}]` or `[{from, value}]`."""
        return tuple(self.turn(item, f"{field}[{i}]") for i, item in enumerate(self.items(field)))

    def turn(self, item: Any, field: str) -> Message:
        """One turn of a conversation in either spelling; roles are brought to system, user, assistant, tool."""
        if not isinstance(item, Mapping):
            raise self.fault(field, f"expected {{role, content}}, got {shown(item)}", "Mend the turn")
        given = cast(Mapping[str, Any], item)
        name, said = ("from", "value") if "from" in given else ("role", "content")
        role = self.string(given.get(name), f"{field}.{name}")
        if role.lower() not in ROLES:
            known = ", ".join(ROLES)
            hint = nearest(role[:40], ROLES)
            raise self.fault(f"{field}.{name}", f"no role is called {role[:60]!r}", f"{hint} Known: {known}")
        if given.get(said) is None and given.get("tool_calls"):
            move = "Write the call as text in `content`"
            raise self.fault(f"{field}.tool_calls", "a turn with tool calls and no text", move)
        return Message(ROLES[role.lower()], self._content(given.get(said), f"{field}.{said}"))

    def _content(self, value: Any, field: str) -> str:
        if not isinstance(value, list):
            return self.string(value, field)
        parts: list[str] = []
        for i, part in enumerate(cast(list[Any], value)):
            here = f"{field}[{i}]"
            if not isinstance(part, Mapping):
                raise self.fault(here, f"expected {{type, text}}, got {shown(part)}", "Mend the part")
            piece = cast(Mapping[str, Any], part)
            if piece.get("type", "text") != "text":
                raise self.fault(here, f"a part of type {shown(piece.get('type'))}", IMAGES_ELSEWHERE)
            parts.append(self.string(piece.get("text"), f"{here}.text"))
        return "".join(parts)

    def said(self, field: str) -> Text:
        """Text or a conversation, whichever is there; one `{role, content}` object is a conversation of one turn."""
        return self.utterance(self.get(field), field)

    def utterance(self, value: Any, field: str) -> Text:
        """`value` as text or a conversation; `field` names it in the fault."""
        found = _unfolded_turns(value)
        if isinstance(found, str):
            return self.string(found, field)
        if isinstance(found, Mapping):
            return (self.turn(found, field),)
        if isinstance(found, Sequence) and found:
            items = cast(Sequence[Any], found)
            return tuple(self.turn(item, f"{field}[{i}]") for i, item in enumerate(items))
        raise self.fault(field, f"expected text or a list of turns, got {shown(value)}", "Mend the row")

    def rest(self, *used: str) -> dict[str, Any]:
        """The columns that the format did not use: they travel to reward functions."""
        return {str(k): v for k, v in self.columns.items() if k not in used and v is not None}


def listed(names: Iterable[object]) -> str:
    """The names of columns for an error line, a few of them where they are many or long."""
    found = [str(name) for name in names]
    short = [name if len(name) <= 40 else f"{name[:37]}..." for name in found[:20]]
    more = [f"and {len(found) - 20} more"] if len(found) > 20 else []
    return ", ".join([*short, *more]) or "none"


def shown(value: Any) -> str:
    """A short spelling of a value for an error line."""
    if value is None:
        return "nothing"
    spelled = repr(value[:60] if isinstance(value, str | bytes | list) else value)
    return f"{type(value).__name__} {spelled if len(spelled) <= 60 else spelled[:57] + '...'}"


_DEEPEST = 64


def read_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is not JSON, nests absurdly or says a key twice."""
    if text.count("[") + text.count("{") > _DEEPEST and _depth(text) > _DEEPEST:
        raise ValueError(f"it nests deeper than {_DEEPEST} levels")
    return json.loads(text, object_pairs_hook=_each_key_once)


def _depth(text: str) -> int:
    """The most brackets open at once, those inside strings left out."""
    steps = (1 if c in "[{" else -1 for c in _STRING.sub("", text) if c in "[{]}")
    return max(accumulate(steps), default=0)


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} is there twice")
    return found


_FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def _whole_characters(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _unfolded(value: Any) -> Any:
    """A CSV cell or a nested string that spells JSON, read; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in {"[", "{"}:
        try:
            return read_json(value)
        except ValueError:
            return value
    return value


def _unfolded_turns(value: Any) -> Any:
    """As `_unfolded`, but only where the JSON is a list of turns: an answer may be a JSON text on purpose."""
    read = _unfolded(value)
    if not isinstance(value, str) or not isinstance(read, list) or not read:
        return value
    looks = [isinstance(t, Mapping) and ("role" in t or "from" in t) for t in cast(list[Any], read)]
    return read if all(looks) else value
