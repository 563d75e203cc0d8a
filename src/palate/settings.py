"""Settings: what was asked. Frozen, strict, self-describing; a typo gets the nearest right word."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

S = TypeVar("S", bound=BaseModel)


class PalateError(Exception):
    """A fault the user can mend: the message names the place, the fault and the next move. Exit code 2."""

    exit_code = 2


class NotFinite(PalateError):
    """A loss, gradient, reward or log-probability is nan or infinite. A run survives a few; exit code 3 when not."""

    exit_code = 3


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and did so at a place it goes on from. Exit code 75.

    Not an Exception, so that no handler for faults takes it for one.
    """

    exit_code = 75


class Resumable(PalateError):
    """The run ended early through nobody's fault and goes on when the same command is given again. Exit code 75."""

    exit_code = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'clip'?", or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


_GONE = dict.fromkeys(
    ("rollout_forward_batch_size", "forward_batch_size", "reference_batch_size"),
    "passes without gradient follow the stage's tokens_per_microbatch now, which memory chooses when it is left out. "
    "Delete the line.",
)
"""Settings of earlier versions, and what to do instead."""


def unknown(key: str, known: Iterable[str]) -> str:
    """What to say of a setting that is none: it is gone, or there never was one of that name."""
    names = sorted(known)
    return (
        f"{key!r} is gone: {_GONE[key]}"
        if key in _GONE
        else f"there is no setting {key!r}.{nearest(key, names)} Known: {', '.join(names)}."
    )


class Settings(BaseModel):
    """A frozen value that refuses keys it does not know. The docstring under a field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for key in cast(dict[str, Any], given):
                if key not in cls.model_fields:
                    raise ValueError(unknown(str(key), cls.model_fields))
        return given


class Choice(Settings):
    """Settings that live in a folder of alternatives: `kind: NAME` is palate/<folder>/NAME.py."""

    kind: str
    """Which alternative: the name of a file in the folder, or module:Name of your own."""


def kinds(folder: str) -> list[str]:
    """The names that `kind:` may take: the files of one folder of the package, read without importing them."""
    here = Path(__file__).parent / folder
    files = (p for p in here.glob("*.py") if not p.stem.startswith("_"))
    wanted = _CLASSES.get(folder)
    return sorted(p.stem for p in files if wanted is None or f"\nclass {wanted}(" in p.read_text("utf-8"))


_CLASSES = {"algorithms": "Algorithm", "rewards": "Reward", "stages": "Stage"}
"""In these folders a file is a kind when it defines this class; other files there are its helpers."""


def find(folder: str, kind: str) -> type[Choice]:
    """The class behind a `kind`: `mine` is palate/<folder>/mine.py; `lab.tricks:Mine` is the user's own.

    The class is called like the folder in the singular: `Algorithm`, `Reward`, `Stage`.
    """
    module, _, own = kind.partition(":")
    singular = _CLASSES[folder]
    if not own:
        known = kinds(folder)
        if kind not in known:
            raise ValueError(
                f"no {singular.lower()} is called {kind!r}.{nearest(kind, known)} Known: {', '.join(known)}."
            )
        return getattr(import_module(f"palate.{folder}.{kind}"), singular)
    try:
        return getattr(import_module(module), own)
    except (ImportError, AttributeError) as fault:
        raise ValueError(f"cannot load {kind!r}: {fault}. Write module:Name of something importable.") from None


def build(folder: str, given: Mapping[str, Any], where: str = "") -> Choice:
    """One alternative from its YAML mapping, with errors that name the place."""
    kind = given.get("kind")
    if not isinstance(kind, str):
        raise PalateError(f"{where}: 'kind' is missing. Known: {', '.join(kinds(folder))}.")
    try:
        return parse(find(folder, kind), given, where)
    except ValueError as fault:
        raise PalateError(f"{where}.kind: {fault}") from None


def parse(cls: type[S], given: Mapping[str, Any], where: str = "") -> S:
    """`cls` from a mapping; the first fault becomes one line `place: fault`."""
    try:
        return cls.model_validate(dict(given))
    except ValidationError as fault:
        raise PalateError(explain(fault, where)) from None


def explain(fault: ValidationError, where: str = "") -> str:
    """One line for the first fault of a validation: place, fault, what was given."""
    first = fault.errors()[0]
    place = ".".join([where, *(str(part) for part in first["loc"])]).strip(".")
    text = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, dict | list) or first["type"] == "value_error" else f", not {given!r}"
    return f"{place}: {text}{shown}" if place else f"{text}{shown}"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file; every fault names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PalateError(f"{path}: no such file. `palate list recipes` shows the recipes that ship.") from None
    except (OSError, UnicodeDecodeError) as fault:
        raise PalateError(f"{path}: cannot be read as UTF-8 text: {fault}") from None
    loaded = load_yaml(text, lambda line: f"{path}:{line}")
    if not isinstance(loaded, dict):
        raise PalateError(f"{path}: expected a mapping of settings, found {type(loaded).__name__}.")
    return cast(dict[str, Any], loaded)


def load_yaml(text: str, place: Callable[[int], str]) -> Any:
    """The value of a YAML text, plain values only. `place` spells a line's number for the error.

    Raises PalateError for what is not YAML, for a key that is there twice, and for a text that would grow absurdly:
    anchors may be used again and again, but not inside themselves and not until they fill the memory.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as fault:
        line = text.count("\n", 0, fault.position) + 1
        raise PalateError(f"{place(line)}: not valid YAML: {fault.reason}. Mend or quote it.") from None
    except _Refused as fault:
        raise PalateError(f"{place(fault.line)}: {fault.problem}. Mend it.") from None
    except yaml.MarkedYAMLError as fault:
        line = fault.problem_mark.line + 1 if fault.problem_mark else 1
        raise PalateError(f"{place(line)}: not valid YAML: {fault.problem}. Mend or quote it.") from None
    except RecursionError:
        raise PalateError(f"{place(1)}: not valid YAML: it nests too deeply. Mend it.") from None
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as fault:  # a date of 99 months, say
        raise PalateError(f"{place(1)}: not valid YAML: a value cannot be held: {fault}. Quote it.") from None


_MOST_VALUES, _DEEPEST = 100_000, 64
_MERGE = "tag:yaml.org,2002:merge"


def _measure(top: yaml.Node) -> None:
    """Refuse a tree of nodes that repeats a key, contains itself, or is absurdly deep or large once its aliases are
    written out.
    """
    known: dict[int, tuple[int, int]] = {}
    open_now: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """(values, levels) of a node; an anchor's are those of its first visit."""
        if id(node) in known:
            return known[id(node)]
        if id(node) in open_now:
            raise _Refused(node, "an alias stands inside its own anchor")
        open_now.add(id(node))
        below = [measure(part) for part in _parts(node)] if len(open_now) <= _DEEPEST else [(0, _DEEPEST)]
        open_now.discard(id(node))
        size, depth = 1 + sum(s for s, _ in below), 1 + max((d for _, d in below), default=0)
        if depth > _DEEPEST:
            raise _Refused(node, f"it nests deeper than {_DEEPEST} levels")
        if size > _MOST_VALUES:
            raise _Refused(node, f"its aliases grow to more than {_MOST_VALUES:,} values")
        known[id(node)] = size, depth
        return known[id(node)]

    measure(top)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The nodes directly below one."""
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if not isinstance(node, yaml.MappingNode):
        return []
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE else None
        if name in seen:
            raise _Refused(key, f"the key {key.value!r} is there twice")
        seen |= {name} if name else set()
    return [part for pair in node.value for part in pair]


class _Refused(Exception):
    """YAML that could be read, and must not be."""

    def __init__(self, node: yaml.Node, problem: str) -> None:
        super().__init__(problem)
        self.line, self.problem = node.start_mark.line + 1, problem


def override(given: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of `given` with dotted assignments applied: `stages.2.algorithm.kl_coef=0.1`.

    A stage may be named by its number (from 0) or by its `name`. Values are read as YAML.
    """
    result = copy.deepcopy(given)
    for assignment in assignments:
        path, equals, _ = assignment.partition("=")
        if not equals or not path:
            raise PalateError(f"{assignment!r}: write an override as key=value, for example seed=2.")
        _assign(result, path.split("."), value_of(assignment)[1])
    return result


def value_of(assignment: str) -> tuple[str, Any]:
    """(key, value) of one assignment `key=value`, the value read as YAML."""
    name, _, text = assignment.partition("=")
    return name, load_yaml(text, lambda _: repr(assignment))


def _assign(target: Any, path: list[str], value: Any) -> None:
    whole = ".".join(path)
    for depth, part in enumerate(path[:-1]):
        target = _step_into(target, part, path[depth + 1], whole)
    last = path[-1]
    if isinstance(target, list):
        items = cast(list[Any], target)
        items[_index(items, last, whole)] = value
    elif isinstance(target, dict):
        cast(dict[str, Any], target)[last] = value
    else:
        raise PalateError(f"{whole}: {path[-2]!r} is a value, not a group of settings, so {last!r} has no place in it.")


def _step_into(target: Any, part: str, following: str, whole: str) -> Any:
    if isinstance(target, list):
        items = cast(list[Any], target)
        return items[_index(items, part, whole)]
    if not isinstance(target, dict):
        raise PalateError(f"{whole}: {part!r} has no place inside a plain value.")
    mapping = cast(dict[str, Any], target)
    below = mapping.get(part)
    if not isinstance(below, dict | list):
        mapping[part] = {"path": below} if isinstance(below, str) and following != "path" else {}
    return mapping[part]


def _index(items: list[Any], part: str, whole: str) -> int:
    names = [str(cast(dict[str, Any], i).get("name", "")) if isinstance(i, dict) else "" for i in items]
    if part in names:
        return names.index(part)
    if part.lstrip("-").isdigit() and -len(items) <= int(part) < len(items):
        return int(part)
    known = ", ".join(n for n in names if n) or f"0 to {len(items) - 1}"
    raise PalateError(f"{whole}: there is no item {part!r}.{nearest(part, names)} Known: {known}.")
