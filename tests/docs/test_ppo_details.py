"""docs/ppo_details.md keeps its promises: 61 details, and every setting, default, symbol and test it names is real."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from palate.settings import Settings, find

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ppo_details.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", re.M)
ROWS = {int(number): cells for number, *cells in ROW.findall(PAGE)}


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods (as Class.method) that a file defines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def settings_of(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, default) of every setting, groups of settings opened."""
    for name, field in cls.model_fields.items():
        yield f"{prefix}{name}", field.default
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Settings):
                yield from settings_of(kind, f"{prefix}{name}.")


def defaults() -> dict[str, Any]:
    """Every setting of the stages and of their algorithms."""
    found: dict[str, Any] = {}
    for kind in ("reward", "sft", "ppo"):
        found |= settings_of(find("algorithms", kind), "algorithm.")
    for kind in ("evaluate", "train", "online"):
        found |= settings_of(find("stages", kind))
    return found


def test_all_61_details_are_there_in_order() -> None:
    assert list(ROWS) == list(range(1, 62))


@pytest.mark.parametrize("number", ROWS)
def test_the_code_and_the_tests_it_names_exist(number: int) -> None:
    _, _, code, tests = ROWS[number]
    symbols, promised = names(code), names(tests)
    assert symbols
    assert promised
    for symbol in symbols:
        path, _, name = symbol.partition(":")
        assert name in definitions(ROOT / "src" / "palate" / path), symbol
    for test in promised:
        path, _, name = test.partition("::")
        assert name in definitions(ROOT / "tests" / path), test


def test_the_settings_it_names_exist() -> None:
    """Every dotted name that begins like a group of settings."""
    known = defaults()
    groups = {name.split(".")[0] for name in known if "." in name}
    said = {text.split(":")[0] for row in ROWS.values() for text in names(row[1])}
    dotted = {name for name in said if "." in name and name.split(".")[0] in groups}
    assert len(dotted) > 40
    assert dotted <= set(known), sorted(dotted - set(known))


def test_the_defaults_it_states_are_the_defaults() -> None:
    """`setting` (value), wherever the value is a number, true, false or none."""
    known = defaults()
    stated = re.findall(r"`([\w.]+)` \((true|false|none|[\d.,e-]+)[;:)]", PAGE)
    found = [(name, said) for name, said in stated if name in known]
    assert len(found) > 20
    for name, said in found:
        expected = {"true": True, "false": False, "none": None}.get(said, said)
        default = known[name]
        assert default is expected or float(said.replace(",", "")) == default, (name, said, default)


def test_the_thirteen_decisions_and_the_quirks_are_on_the_page() -> None:
    for section in ("Decisions a new system must make", "Quirks that are not reproduced"):
        assert f"## {section}" in PAGE
    decisions = re.findall(r"^(\d+)\. \*\*", PAGE, re.M)
    assert [int(number) for number in decisions] == list(range(1, 14))
