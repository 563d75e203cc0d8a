"""Where a run came from: versions, command, hardware, the commit; and where each of its settings came from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import yaml

_PACKAGES = ("palate", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "pydantic", "click")
_ABSENT = object()


def provenance(seed: int, command: Sequence[str], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What provenance.json holds; `earlier` is what it held before, whose sessions are kept by start and
    command.
    """
    sessions = [*earlier.get("sessions", []), {"started": now(), "command": list(command)}]
    return {
        "palate": _version("palate"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES[1:]}},
        "seed": seed,
        "command": list(command),
        "started": now(),
        "git": _commit(),
        "hardware": _hardware(),
        "sessions": sessions,
    }


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any] | None:
    """The commit of the folder the run was started in, and whether files differ from it; None outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _hardware() -> dict[str, Any]:
    import torch  # here, so that a faulty settings file is refused before torch is loaded

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }


def processor() -> str:
    """The name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write so that a reader, even one after a power cut, finds the old text or the new one, never half of it."""
    written = path.with_name(f".{path.name}.new")
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty when the file is absent or not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


class Origins:
    """Says of each resolved value whether a file, the command line or a default gave it."""

    def __init__(self, given: Mapping[str, Any], assigned: Iterable[str], source: str = "file") -> None:
        self.given = given
        self.source = source
        self.assigned = [_numbered(given, text.partition("=")[0].split(".")) for text in assigned]

    def of(self, path: Sequence[str], resolved: Any) -> str:
        """`command line`, the name of the source, or `default`, for the value found at a path."""
        source = "command line" if any(list(path[: len(a)]) == a for a in self.assigned) else self.source
        value: Any = self.given
        for part in path:
            if not isinstance(value, dict | list):  # a short form, like a path instead of a mapping, filled in
                return source if value == resolved else "default"
            value = _at(value, part)
            if value is _ABSENT:
                return "default"
        return source


def _at(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return cast(dict[str, Any], value).get(part, _ABSENT)
    items = cast(list[Any], value)
    return items[int(part)] if part.isdigit() and int(part) < len(items) else _ABSENT


def _numbered(given: Mapping[str, Any], path: list[str]) -> list[str]:
    """An override's path with the names of list items turned into their numbers."""
    value: Any = given
    plain: list[str] = []
    for part in path:
        if isinstance(value, list):
            items = cast(list[Any], value)
            names = [cast(dict[str, Any], i).get("name") if isinstance(i, dict) else None for i in items]
            part = str(names.index(part) if part in names else int(part) % len(items))
        plain.append(part)
        value = _at(value, part) if isinstance(value, dict | list) else _ABSENT
    return plain


def annotated(resolved: Mapping[str, Any], origins: Origins, path: tuple[str, ...] = ()) -> str:
    """`resolved` as YAML that can be run again, the origin of each value behind it as a comment."""
    return "\n".join(_lines(resolved, origins, path, "")) + "\n"


def _lines(value: Any, origins: Origins, path: tuple[str, ...], indent: str) -> list[str]:
    lines: list[str] = []
    for key, below in _items(value):
        head = f"{indent}- " if isinstance(value, list) else f"{indent}{_scalar(key)}: "
        here = (*path, key)
        if isinstance(below, dict) and below:
            nested = _lines(below, origins, here, indent + "  ")
            if isinstance(value, list):
                lines += [head + nested[0].lstrip(), *nested[1:]]
            else:
                lines += [head.rstrip(), *nested]
        elif isinstance(below, list) and any(isinstance(item, dict | list) for item in cast(list[Any], below)):
            lines += [head.rstrip(), *_lines(below, origins, here, indent + "  ")]
        else:
            lines.append(f"{head}{_scalar(below)}  # {origins.of(here, below)}")
    return lines


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(str(k), v) for k, v in cast(dict[Any, Any], value).items()]
    return [(str(i), v) for i, v in enumerate(cast(list[Any], value))]


def _scalar(value: Any) -> str:
    """One value, or a list of plain ones, on one line of YAML; what cannot be printed is escaped."""
    width = 10**9  # never folded
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=width, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    if text.isprintable():
        return text
    return yaml.safe_dump(value, default_flow_style=True, default_style='"', width=width, sort_keys=False).strip()
