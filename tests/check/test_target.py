"""Recipe, data and model are told apart by what is there; what is neither, or two things, is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from palate.check.target import targeted
from palate.settings import PalateError


def test_each_kind_is_known_by_what_lies_there(model: Path, demonstrations: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("stages: []\n")
    assert targeted(str(recipe), None, None, ["seed=2"]).kind == "recipe"
    assert targeted("tasting_room", None, None, []).kind == "recipe"
    assert targeted(str(demonstrations), None, None, []).kind == "data"
    assert targeted(str(demonstrations.parent / "*.jsonl"), None, None, []).kind == "data"
    assert targeted("world:tasting_room/pairs", None, None, ["rows=3"]).data().rows == 3
    assert targeted(str(demonstrations.parent), None, None, []).kind == "data"
    assert targeted(str(model), None, None, []).kind == "model"


def test_flags_say_what_a_name_is(demonstrations: Path) -> None:
    assert targeted(None, "some/dataset", None, []).kind == "data"
    assert targeted(None, None, "gpt2", []).kind == "model"
    both = targeted(None, str(demonstrations), "gpt2", ["encoding.max_length=9", "format=auto"])
    assert (both.kind, both.model, both.encoding().max_length) == ("data", "gpt2", 9)
    assert targeted(str(demonstrations), None, "gpt2", []).model == "gpt2"
    assert targeted("rows=3", str(demonstrations), None, []).data().rows == 3


def test_a_folder_of_both_names_the_flags(model: Path, demonstrations: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(model, both)
    shutil.copy(demonstrations, both)
    with pytest.raises(PalateError, match=rf"--model {both} or --data {both}"):
        targeted(str(both), None, None, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((None, None, None), "name a recipe, a data set or a model"),
        (("org/name", None, None), "--data org/name or --model org/name"),
        (("tasting_rom", None, None), "Did you mean 'tasting_room'"),
        (("nothing.yaml", None, None), "nothing.yaml: no such file"),
        (("nothing.jsonl", None, None), "nothing.jsonl: no such file"),
        (("tasting_room", "x", None), "Name one"),
        (("tasting_room", None, "gpt2"), "a recipe names its own models"),
    ],
)
def test_what_cannot_be_told_is_refused(words: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(PalateError, match=message):
        targeted(words[0], words[1], words[2], [])


def test_a_run_directory_says_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("name: x\n")
    with pytest.raises(PalateError, match=r"this is a run directory.*run\.yaml"):
        targeted(str(tmp_path), None, None, [])


def test_an_empty_folder_is_neither(tmp_path: Path) -> None:
    with pytest.raises(PalateError, match="neither a model"):
        targeted(str(tmp_path), None, None, [])


def test_a_model_takes_no_settings(model: Path) -> None:
    with pytest.raises(PalateError, match="takes no settings"):
        targeted(str(model), None, None, ["seed=2"])
    with pytest.raises(PalateError, match="there is no setting 'rowz'"):
        targeted("world:tasting_room/pairs", None, None, ["rowz=2"]).data()
