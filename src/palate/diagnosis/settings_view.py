"""Settings and provenance for people: what was asked, who asked for it, and on what it ran."""

from __future__ import annotations

from collections.abc import Iterator

from palate.diagnosis.run_folder import Row, at, mapping

_ORIGINS = ("file", "command line", "default", "python")


def lines(resolved: str) -> list[tuple[str, str]]:
    """(line, origin) of every line of resolved.yaml; the origin is the comment that ends it, if it is one."""
    return [_split(line) for line in resolved.splitlines() if line.strip()]


def _split(line: str) -> tuple[str, str]:
    setting, mark, origin = line.rpartition("  # ")
    return (setting, origin) if mark and len(origin.split()) <= 3 else (line, "")


def chosen(resolved: str) -> list[tuple[str, str]]:
    """(dotted path and value, origin) of the settings that are not defaults."""
    return [(setting, origin) for setting, origin in _dotted(lines(resolved)) if origin not in ("", "default")]


def _dotted(found: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Every leaf with the keys above it; list items count from 0, as overrides do."""
    above: list[tuple[int, str]] = []
    counts: dict[tuple[str, ...], int] = {}
    for line, origin in found:
        text = line.lstrip()
        depth = len(line) - len(text)
        while text.startswith("- "):
            above = [a for a in above if a[0] < depth]
            place = tuple(name for _, name in above)
            counts[place] = counts.get(place, -1) + 1
            above.append((depth, str(counts[place])))
            text, depth = text[2:], depth + 2
        above = [a for a in above if a[0] < depth]
        key, colon, value = text.partition(":")
        if origin and colon:
            yield ".".join([*(name for _, name in above), key]) + f": {value.strip()}", origin
        elif origin:
            yield ".".join(name for _, name in above) + f": {text}", origin
        else:
            above.append((depth, key))


def facts(provenance: Row) -> list[tuple[str, str]]:
    """(term, fact) from provenance.json; terms that are absent are left out."""
    found = [
        ("Command", " ".join(str(word) for word in provenance.get("command") or ())),
        ("Started", str(provenance.get("started") or "")),
        ("Sessions", _sessions(provenance)),
        ("Seed", str(provenance["seed"]) if "seed" in provenance else ""),
        ("Commit", _commit(mapping(provenance, "git"))),
        ("Versions", _pairs(mapping(provenance, "versions"))),
        ("Hardware", _hardware(mapping(provenance, "hardware"))),
    ]
    return [(term, fact) for term, fact in found if fact]


def _sessions(provenance: Row) -> str:
    count = len(provenance.get("sessions") or ())
    return f"{count}: the run was stopped and resumed" if count > 1 else ""


def _commit(git: Row) -> str:
    if not git.get("commit"):
        return ""
    return str(git["commit"])[:12] + (", with changes not committed" if git.get("changed") else "")


def _pairs(values: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value)


def _hardware(hardware: Row) -> str:
    memory = at(hardware, "memory_bytes")
    gpus = [str(gpu) for gpu in hardware.get("gpus") or ()]
    parts = [
        str(hardware.get("processor") or hardware.get("machine") or ""),
        f"{hardware['cores']} cores" if hardware.get("cores") else "",
        f"{hardware['threads']} threads" if hardware.get("threads") else "",
        f"{memory / 2**30:.0f} GiB memory" if memory else "",
        ", ".join(gpus),
    ]
    return ", ".join(part for part in parts if part)
