"""The page: it fits its window, marks what is trained with colour or without, and ends with a verdict."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console
from rich.text import Text

from palate.check.found import RecipeFound, Setting
from palate.check.page import Page


def printed(seen: RecipeFound, width: int, terminal: bool = False, everything: bool = False, **more: object) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, markup=False, emoji=False, **more
    )
    with console.capture() as said:
        Page(console, everything).recipe(seen)
    return said.get()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
@pytest.mark.parametrize("terminal", [False, True])
def test_it_fits_its_window(seen: RecipeFound, width: int, terminal: bool) -> None:
    page = printed(seen, width, terminal)
    lines = [Text.from_ansi(line).plain for line in page.splitlines()]
    body = [line for line in lines if not line.startswith(("warning: ", "fault: "))]  # one line each, for grep
    assert max(map(len, body)) <= width
    for name in ("sft", "reward", "ppo", "evaluate"):
        assert any(f"{name} ·" in line for line in lines)


def test_without_colour_trained_text_stands_in_brackets(seen: RecipeFound) -> None:
    page = printed(seen, 160)
    assert "\x1b" not in page
    one = seen.stages[0].seen.examples[0]
    trained = "".join(piece.text for piece in one.pieces if piece.trained)
    assert f"[[{trained}]]" in page
    assert page.count("[[") == page.count("]]")


def test_no_color_in_a_terminal_has_brackets_too(seen: RecipeFound) -> None:
    page = printed(seen, 160, terminal=True, no_color=True)
    assert "<eos>]]" in page
    assert "\x1b[32m" not in page


def test_with_colour_trained_text_is_green_and_bare(seen: RecipeFound) -> None:
    page = printed(seen, 160, terminal=True, color_system="standard")
    assert "[[" not in page
    assert "\x1b[1;32m" in page
    assert "\x1b[1;7;32m<eos>" in page


def test_defaults_are_counted_or_listed(seen: RecipeFound) -> None:
    settings = seen.stages[0].settings
    hidden = sum(s.origin == "default" for s in settings)
    assert f"and {hidden} defaults (--all shows them)" in printed(seen, 100)
    assert "num_train_epochs" not in printed(seen, 100)
    assert "num_train_epochs" in printed(seen, 100, everything=True)


def test_it_ends_with_faults_and_a_verdict(seen: RecipeFound) -> None:
    page = printed(seen, 100)
    assert "4 stages: 0 done, 4 to run, about " in page.splitlines()[-1]
    first = replace(seen.stages[0], seen=replace(seen.stages[0].seen, faults=("sft: something is wrong\x1b[2J",)))
    page = printed(replace(seen, stages=(first, *seen.stages[1:])), 100)
    assert "fault: sft: something is wrong␛[2J" in page
    assert "\x1b" not in page


def test_no_setting_reaches_the_terminal_as_a_control_character(seen: RecipeFound) -> None:
    sly = Setting("stop", ["a\u202eb", "\x1b[2J"], "file")
    page = printed(replace(seen, settings=(sly,)), 100)
    assert "‹U+202E›" in page
    assert "\x1b" not in page


def test_words_of_the_arithmetic_stand_on_the_page(seen: RecipeFound) -> None:
    page = printed(seen, 160)
    for stage in seen.stages:
        assert stage.seen.batches is not None
        assert all(words in page for words in stage.seen.batches.words)
