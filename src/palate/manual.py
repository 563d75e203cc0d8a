"""The settings of a stage, read from its source for `--help`: a manual must not need torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One setting: its dotted name, its default as written (empty: it must be given), and what it means."""

    name: str
    default: str
    meaning: str


def entries(module: str, name: str) -> Iterator[Entry]:
    """The settings of class `name` in `palate/MODULE.py`, groups of settings opened after their own line."""
    yield from _of_class(_PACKAGE / f"{module}.py", name, "")


def _of_class(path: Path, name: str, prefix: str) -> Iterator[Entry]:
    body = next((n.body for n in _parsed(path).body if isinstance(n, ast.ClassDef) and n.name == name), [])
    for node, following in pairwise(body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_text(following)):
            continue
        if prefix + node.target.id == "kind" or ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        meaning = " ".join(ast.literal_eval(ast.unparse(following)).split())
        group = _group(node.annotation, path)
        yield Entry(prefix + node.target.id, "" if group else _default(node.value), meaning)
        if group:
            yield from _of_class(*group, f"{prefix}{node.target.id}.")


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _default(value: ast.expr | None) -> str:
    """The default as it is written in YAML more or less: the first argument of Field, or the value itself."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        named = {k.arg: k.value for k in value.keywords}
        value = value.args[0] if value.args else named.get("default")
    text = "" if value is None else ast.unparse(value)
    return {"None": "none", "True": "true", "False": "false"}.get(text, text)


def _group(annotation: ast.expr, path: Path) -> tuple[Path, str] | None:
    """File and class of a group of settings: an annotation that is just one of our Settings classes."""
    first, _, rest = ast.unparse(annotation).partition(".")
    if rest:
        module = _imported(first, path)
        return _defined(rest, module) if module else None
    return _defined(first, path)


def _defined(name: str, path: Path) -> tuple[Path, str] | None:
    """Where a Settings class is defined that a file defines or imports by name."""
    for node in _parsed(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return (path, name) if [ast.unparse(base) for base in node.bases] == ["Settings"] else None
    source = _imported(name, path)
    return _defined(name, source) if source else None


def _imported(name: str, path: Path) -> Path | None:
    """The file of our package that a file imports a name from, or imports under that name."""
    for node in _parsed(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palate"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    module = _PACKAGE.parent.joinpath(*str(node.module).split("."))
                    files = (module / f"{alias.name}.py", module.with_suffix(".py"))
                    return next((file for file in files if file.is_file()), None)
    return None


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))
