"""What a stage's result depends on, by content: settings, seed, earlier stages, data files, the user's own
code.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, cast

from palate.records import fingerprint

_CALLABLE = re.compile(r"([A-Za-z_][\w.]*|.+\.py):([A-Za-z_][\w.]*)")
_NOT_CODE = ("stage", "world")


@dataclass(frozen=True)
class Evidence:
    """Everything a stage's result depends on. Equal hashes: the result would be the same."""

    parts: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """One short name for all of it."""
        return fingerprint(self.parts)

    def difference(self, before: Mapping[str, Any]) -> str:
        """In words, what is not as it was: the first few changed parts, by dotted name."""
        changed = list(_changes(before, self.parts))
        if not changed:
            return "its own outputs"
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return ", ".join(changed[:3]) + more


def gather(
    settings: Mapping[str, Any],
    seed: int,
    references: Sequence[str],
    hashes: Mapping[str, str],
    files: Iterable[str],
    given: Mapping[str, str],
) -> Evidence:
    """The evidence of one stage. `hashes` are those of the stages before it; `files` its data files or folders.

    The user's own code is found by the values written `module:name` or `file.py:name`; functions given as objects
    come as `given` (see `functions`). What that code imports does not count.
    """
    return Evidence(
        {
            "settings": dict(settings),
            "seed": seed,
            "stages": {name: hashes[name] for name in references},
            "files": {name: digest(Path(name).expanduser()) for name in files},
            "code": {value: digest(path) for value, path in _code(settings)} | dict(given),
        }
    )


def functions(value: Any, place: str = "") -> dict[str, str]:
    """Place and digest of every function that was given as an object inside nested settings."""
    if isinstance(value, Mapping):
        found = [(str(k), v) for k, v in cast(Mapping[Any, Any], value).items()]
    elif isinstance(value, list | tuple):
        found = [(str(i), v) for i, v in enumerate(cast(Sequence[Any], value))]
    else:
        return {place: fingerprint(_text_of(value))} if callable(value) else {}
    return {k: v for name, below in found for k, v in functions(below, f"{place}.{name}".strip(".")).items()}


def _text_of(function: Any) -> list[str]:
    """The source of a function, or its bytecode where there is no source, and the values it closes over."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        text = repr((code.co_code, code.co_consts, code.co_names)) if code else repr(type(function))
    return [text, *(repr(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ())]


def digest(path: Path) -> str:
    """The sha256 of a file, or of a folder's names and contents; `absent` for what is not on this disk."""
    if path.is_file():
        return _sha256(path)
    if not path.is_dir():
        return "absent"
    inside = sorted(f for f in path.rglob("*") if f.is_file())
    return fingerprint([(str(f.relative_to(path)), _sha256(f)) for f in inside])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code(value: Any) -> Iterator[tuple[str, Path]]:
    """Each value of the settings that names something importable, with the file it lives in."""
    if isinstance(value, Mapping):
        for below in cast(Mapping[Any, Any], value).values():
            yield from _code(below)
    elif isinstance(value, list | tuple):
        for below in cast(Sequence[Any], value):
            yield from _code(below)
    elif isinstance(value, str) and (found := _CALLABLE.fullmatch(value)) and found[1] not in _NOT_CODE:
        path = _source(found[1])
        if path is not None:
            yield value, path


def _source(module: str) -> Path | None:
    """The file of a module, found without importing it or its packages."""
    if module.endswith(".py"):
        return Path(module)
    places: list[str] | None = None
    origin: str | None = None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
        origin = spec.origin
    return Path(origin) if origin else None


def _changes(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        old, new = cast(Mapping[str, Any], before), cast(Mapping[str, Any], after)
        for key in dict.fromkeys([*old, *new]):
            yield from _changes(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif before != after:
        yield path
