"""docs/methods.md keeps its promises: each method has a section; settings, values and defaults it names are real."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from palate.settings import build, find, kinds
from tests.docs.test_ppo_details import names, settings_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
HEAD, *_SECTIONS = re.split(r"^### `", PAGE, flags=re.M)
SECTIONS = {text.partition("`")[0]: text.partition("\n")[2].partition("\n## ")[0] for text in _SECTIONS}
TABLE = PAGE.partition("## Names you may know")[2]
NAME = re.compile(r"[a-z]\w*(?:\.\w+)*")
STATED = re.compile(r"`([\w.]+)` \(('\w*'|true|false|none|[\d.]+)\)")


def stages() -> dict[str, Any]:
    """Every setting of the stages with its default; groups that the page speaks of as a whole are there too."""
    found: dict[str, Any] = {}
    for kind in ("evaluate", "online", "train"):
        found |= settings_of(find("stages", kind))
    return found


def of_method(kind: str) -> dict[str, Any]:
    """The settings of an algorithm, and of the stages it runs in."""
    return {**stages(), **dict(settings_of(find("algorithms", kind)))}


def shipped() -> list[str]:
    """Every algorithm."""
    return [kind for kind in kinds("algorithms") if kind != "protocol"]


def test_every_method_has_a_section_and_every_section_a_method() -> None:
    assert sorted(SECTIONS) == sorted(shipped())


@pytest.mark.parametrize("kind", shipped())
def test_a_section_says_what_when_how_and_what_goes_wrong(kind: str) -> None:
    text = SECTIONS[kind]
    assert re.search(r"^    \S", text, re.M), "its formula"
    for part in ("Settings that matter: ", "Pitfalls. "):
        assert part in text


@pytest.mark.parametrize("kind", shipped())
def test_the_settings_it_names_exist_with_the_values_it_gives(kind: str) -> None:
    known, cls = of_method(kind), find("algorithms", kind)
    paragraphs = [part for part in SECTIONS[kind].split("\n\n") if "Settings that matter" in part]
    for name in (text for part in paragraphs for text in names(part) if NAME.fullmatch(text)):
        assert name in known or name in shipped(), name
    for text in names(SECTIONS[kind]):
        if re.match(r"\w+: ", text):
            given = yaml.safe_load(f"{{{text}}}")
            assert set(given) <= set(cls.model_fields), text
            assert build("algorithms", {"kind": kind, **given})
        elif re.match(r"\w+\.\w+: ", text):
            assert text.partition(":")[0] in known, text


@pytest.mark.parametrize("kind", shipped())
def test_the_defaults_it_states_are_the_defaults(kind: str) -> None:
    known, stated = of_method(kind), STATED.findall(SECTIONS[kind])
    assert stated
    for name, said in stated:
        expected = {"true": True, "false": False, "none": None}.get(said, said)
        default = known[name]
        assert default is expected or repr(default) == said or float(default) == float(said), (name, said, default)


def test_the_table_of_names_leads_to_settings_that_exist() -> None:
    rows = [line.split(" | ") for line in TABLE.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 25
    told = [name for row in rows for name in names(row[-1])]
    for name in told:
        kind, _, setting = name.partition(".")
        there = name in stages() or (kind in shipped() and setting in find("algorithms", kind).model_fields)
        understood = any(name in getattr(find("algorithms", one), "other_names", {}) for one in shipped())
        assert there or understood, name
    assert {name.partition(".")[0] for name in told} >= {"ppo", "rloo", "grpo", "dpo", "kto", "ilql", "simpo", "cpo"}


def test_the_head_speaks_of_methods_and_settings_that_exist() -> None:
    every = {name for kind in shipped() for name in of_method(kind)}
    for text in names(HEAD.partition("| you have")[2].partition("Written below")[0]):
        name = text.partition(":")[0]
        assert not NAME.fullmatch(name) or name in shipped() or name in every, text


def test_the_results_have_their_place() -> None:
    before, start, rest = PAGE.partition("<!-- results:start -->")
    assert start
    assert "<!-- results:end -->" in rest
    assert "`python -m bench.methods`" in before
