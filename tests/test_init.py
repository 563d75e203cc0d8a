"""Importing palate is light; its names come when they are asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import palate

HEAVY = ("torch", "transformers", "datasets", "numpy", "pydantic")


def _modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("code", ["import palate", "import palate; palate.__version__", "import palate.cli"])
def test_importing_loads_nothing_heavy(code: str) -> None:
    assert not _modules_after(code).intersection(HEAVY)


def test_the_formulas_are_there_when_asked_for() -> None:
    after = _modules_after("import palate; palate.losses.clipped_surrogate; palate.credit.gae; palate.optim.Adam")
    assert "torch" in after
    assert "transformers" not in after


def test_the_door_is_there_when_asked_for() -> None:
    for name in ("train", "sft", "reward", "load"):
        assert callable(getattr(palate, name))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'palate' has no attribute 'trian'"):
        palate.trian  # noqa: B018
    assert not hasattr(palate, "nothing_of_that_name")
