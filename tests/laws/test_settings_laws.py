"""Laws of the living classes: settings explain themselves, are few, and inherit little; --help is light."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import palate
from palate.settings import Choice, Settings, find, kinds

# Where data and models come from, which weights train and how they move, and how text becomes tokens is the same in
# every training stage, whatever the algorithm; each of these groups counts as the one setting it is there.
ONE_DOOR_EACH = ("prompts", "pretraining", "loading", "encoding", "layout", "optimiser")


def _ours() -> list[type]:
    """Every class that the package defines."""
    names = [m.name for m in pkgutil.walk_packages(palate.__path__, "palate.") if not m.name.endswith("__main__")]
    modules = [import_module(name) for name in names]
    return [c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]


def test_every_setting_has_a_docstring() -> None:
    silent = [
        f"{cls.__module__}.{cls.__name__}.{name}"
        for cls in _ours()
        if issubclass(cls, Settings)
        for name, field in cls.model_fields.items()
        if not field.description and name != "kind"
    ]
    assert not silent, "\n".join(sorted(silent))


def test_no_class_is_more_than_two_below_another_of_ours() -> None:
    deep = [c.__qualname__ for c in _ours() if sum(b.__module__.startswith("palate.") for b in c.__mro__[1:]) > 2]
    assert not deep


def _leaves(cls: type[BaseModel]) -> Iterator[str]:
    """Every value a user may set, groups of settings opened."""
    for name, field in cls.model_fields.items():
        groups = [a for a in (field.annotation, *get_args(field.annotation)) if _is_group(a)]
        if groups and name not in ONE_DOOR_EACH:
            yield from (f"{name}.{leaf}" for leaf in _leaves(groups[0]))
        else:
            yield name


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings) and not issubclass(annotation, Choice)


def test_a_complete_online_stage_has_at_most_sixty_settings() -> None:
    """The stage with its groups, and the algorithm with the most settings; a model made from nothing not counted."""
    stage = [leaf for leaf in _leaves(find("stages", "online")) if not leaf.startswith(("model.", "kind"))]
    names = [k for k in kinds("algorithms") if k != "protocol"]
    most = max(len(list(_leaves(find("algorithms", k)))) for k in names)
    assert len(stage) + most <= 60, "\n".join(stage)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["sft", "--help"], ["list", "algorithms"]])
def test_help_and_lists_load_no_torch(words: list[str]) -> None:
    program = (
        "import sys\nfrom palate.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
