"""What there is to choose from, read from the source without importing it: a list must not need torch.

Nor pydantic: the command line reads its verbs here before it knows whether anything will be run.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeGuard

_PACKAGE = Path(__file__).parent
_CLASSES = {"algorithms": "Algorithm", "rewards": "Reward", "stages": "Stage"}
TOPICS = ("algorithms", "rewards", "stages", "recipes", "worlds", "metrics", "formats")


def listing(topic: str) -> dict[str, str]:
    """Name and one line of meaning of everything under a topic."""
    if topic in _CLASSES:
        return _choices(topic, _CLASSES[topic])
    if topic == "recipes":
        return {name: _first_comment(path) for name, path in recipes().items()}
    if topic == "worlds":
        return {path.stem: _first_line(_parsed(path)) for path in _modules("worlds")}
    if topic == "metrics":
        from palate.metrics import METRICS

        return {name: f"[{m.unit}] {m.meaning} {m.over[0].upper()}{m.over[1:]}." for name, m in METRICS.items()}
    if topic == "formats":
        from palate.data.formats import FORMATS

        return {f.name: f.shape for f in FORMATS}
    from palate.settings import PalateError, nearest

    raise PalateError(f"nothing is called {topic!r}.{nearest(topic, TOPICS)} Known: {', '.join(TOPICS)}.")


@dataclass(frozen=True)
class Method:
    """An algorithm as its verb presents it, read from its source: the stage it runs in and the data it reads."""

    name: str
    meaning: str
    stage: Literal["train", "online"]
    reads: str


def methods() -> dict[str, Method]:
    """Every algorithm that ships. One with `learns` learns from the policy's own answers."""
    found: dict[str, Method] = {}
    for path in _modules("algorithms"):
        for node in _parsed(path).body:
            if isinstance(node, ast.ClassDef) and node.name == "Algorithm":
                named = {n.target.id: n.value for n in node.body if isinstance(n, ast.AnnAssign) and _is_name(n.target)}
                stage = "online" if "learns" in named else "train"
                found[path.stem] = Method(path.stem, _first_line(node), stage, _reads(node, named))
    return found


def _reads(node: ast.ClassDef, named: Mapping[str, ast.expr | None]) -> str:
    """The records an algorithm reads; each of them where a setting decides which."""
    decides = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "reads"]
    said = [named.get("reads"), *(n.value for d in decides for n in ast.walk(d) if isinstance(n, ast.Return))]
    texts = [_outcomes(value) for value in said if value is not None]
    return " or ".join(dict.fromkeys(text for found in texts for text in found))


def _outcomes(value: ast.expr) -> list[str]:
    """The texts that an expression may come to: not what it compares with, nor what it looks up by."""
    if isinstance(value, ast.Constant):
        return [str(value.value)]
    if isinstance(value, ast.IfExp):
        return [*_outcomes(value.body), *_outcomes(value.orelse)]
    if isinstance(value, ast.Dict):
        return [text for one in value.values for text in _outcomes(one)]
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return [*_outcomes(value.args[-1]), *_outcomes(value.func.value)]
    return []


def _is_name(node: ast.expr) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


def recipes() -> Mapping[str, Path]:
    """Every recipe that ships, by name (`presets/tldr`), in a checkout or an installed package."""
    inside = _PACKAGE / "recipes"
    folder = inside if inside.is_dir() else _PACKAGE.parents[1] / "recipes"
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.rglob("*.yaml"))}


def recipe(name: str) -> Path:
    """The file of a recipe that ships."""
    from palate.settings import PalateError, nearest

    known = recipes()
    if name not in known:
        raise PalateError(f"no recipe is called {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
    return known[name]


def find_own_code(*folders: Path) -> None:
    """Let `module:name` find the user's files: beside the recipe, then in the working directory, after all else."""
    for folder in (*folders, Path.cwd()):
        if str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))


def _modules(folder: str) -> list[Path]:
    return sorted(p for p in (_PACKAGE / folder).glob("*.py") if not p.stem.startswith("_"))


def _choices(folder: str, name: str) -> dict[str, str]:
    """The files of a folder that hold the class its kinds are called by, with what that class says of itself."""
    found: dict[str, str] = {}
    for path in _modules(folder):
        for node in _parsed(path).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                found[path.stem] = _first_line(node)
    return found


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _first_line(node: ast.Module | ast.ClassDef) -> str:
    """The first sentence of a docstring, which may run over two lines."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return re.split(r"(?<!et al)\. ", text)[0].rstrip(".") + "." if text else ""


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
