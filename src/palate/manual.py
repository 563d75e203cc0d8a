"""The settings of a stage, read from its source for `--help`: a manual must not need torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One setting: its dotted name, its default as written (empty: it must be given), and what it means."""

    name: str
    default: str
    meaning: str


def entries(folder: str, kind: str, name: str) -> Iterator[Entry]:
    """The settings of class `name` in `palate/FOLDER/KIND.py`, groups of settings opened after their own line."""
    yield from _of_class(_PACKAGE / folder / f"{kind}.py", name, "")


def _of_class(path: Path, name: str, prefix: str) -> Iterator[Entry]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = next((n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), [])
    for node, following in zip(body, body[1:], strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_text(following)):
            continue
        if node.target.id == "kind" or ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        meaning = " ".join(ast.literal_eval(ast.unparse(following)).split())
        group = _source_of(node.annotation, tree, path)
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


def _source_of(annotation: ast.expr, tree: ast.Module, path: Path) -> tuple[Path, str] | None:
    """File and class of a group of settings that is always a group, where it is one of ours."""
    spelled = ast.unparse(annotation)
    first, _, rest = spelled.partition(".")
    if any(isinstance(node, ast.ClassDef) and node.name == spelled for node in tree.body):
        return path, spelled
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palate"):
            for alias in node.names:
                if (alias.asname or alias.name) == first:
                    module = f"{node.module}.{alias.name}" if rest else str(node.module)
                    return _if_settings(_PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py"), rest or first)
    return None


def _if_settings(path: Path, name: str) -> tuple[Path, str] | None:
    if not path.is_file():
        return None
    found = (n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef))
    ours = any(n.name == name and [ast.unparse(b) for b in n.bases] == ["Settings"] for n in found)
    return (path, name) if ours else None
