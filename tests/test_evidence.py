"""What a result depends on, by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate.evidence import Evidence, digest, functions, gather


def _gathered(**changed: Any) -> Evidence:
    given: dict[str, Any] = {
        "settings": {"rate": 0.1},
        "seed": 1,
        "references": ["sft"],
        "hashes": {"sft": "aa", "other": "bb"},
        "files": [],
        "given": {},
    }
    return gather(**{**given, **changed})


def test_equal_evidence_has_equal_hashes_and_any_part_counts() -> None:
    assert _gathered().hash == _gathered().hash
    for change in (
        {"settings": {"rate": 0.2}},
        {"seed": 2},
        {"hashes": {"sft": "cc", "other": "bb"}},
        {"files": ["nothing here"]},
        {"given": {"reward": "dd"}},
    ):
        assert _gathered(**change).hash != _gathered().hash, change
    assert _gathered(hashes={"sft": "aa", "other": "zz"}).hash == _gathered().hash


def test_a_change_is_named() -> None:
    before = _gathered(settings={"optimiser": {"rate": 0.1, "eps": 1.0}}).parts
    after = _gathered(settings={"optimiser": {"rate": 0.2, "eps": 1.0}}, seed=2)
    assert after.difference(before) == "settings.optimiser.rate, seed"
    assert after.difference(after.parts) == "its own outputs"


def test_content_counts_and_names_inside_a_folder_do(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    folder = digest(tmp_path)
    assert digest(tmp_path / "a") != folder
    (tmp_path / "a").rename(tmp_path / "b")
    assert digest(tmp_path) != folder
    (tmp_path / "b").rename(tmp_path / "a")
    assert digest(tmp_path) == folder
    assert digest(tmp_path / "gone") == "absent"


def test_the_users_own_code_counts_wherever_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "package_of_mine").mkdir()
    module = tmp_path / "package_of_mine" / "tricks.py"
    for spelled in ("package_of_mine.tricks:score", f"{module}:score"):
        settings = {"reward": {"parts": [{"function": spelled}]}, "model": "stage:sft", "data": "world:room/prompts"}
        module.write_text("score = len")
        before = _gathered(settings=settings)
        module.write_text("score = max")
        assert _gathered(settings=settings).difference(before.parts).startswith("code.")
        assert list(before.parts["code"]) == [spelled]


def test_a_function_given_as_an_object_counts_by_its_source_and_what_it_closes_over() -> None:
    def scale(factor: float) -> Any:
        return lambda prompts, completions: [factor for _ in completions]

    first, again, other = (functions({"stages": [{"reward": scale(f)}]}) for f in (1.0, 1.0, 2.0))
    assert list(first) == ["stages.0.reward"]
    assert first == again
    assert first != other
    assert functions({"rate": 0.1, "names": ["a", None]}) == {}
