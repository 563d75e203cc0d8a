"""What `palate check` was pointed at: a recipe, data or a model, told apart by what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from palate import catalogue, settings
from palate.data.columnar import is_saved
from palate.data.containers import container
from palate.data.encode import Encoding
from palate.data.source import Data
from palate.one_stage import words_to_assignments
from palate.settings import PalateError, nearest, value_of

Kind = Literal["recipe", "data", "model"]
_MODEL_FILES = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Target:
    """What to check, and the settings that were given beside it. `model` is the tokenizer that data is shown by."""

    kind: Kind
    name: str
    words: tuple[str, ...] = ()
    model: str | None = None

    def data(self) -> Data:
        """The data as a stage would have it: `rows=100`, `format=trl`."""
        return settings.parse(Data, {"path": self.name, **self._given("")}, "data")

    def encoding(self) -> Encoding:
        """How rows become tokens: `encoding.max_length=512`."""
        return settings.parse(Encoding, self._given("encoding."), "encoding")

    def _given(self, prefix: str) -> dict[str, Any]:
        pairs = [value_of(word) for word in self.words]
        inside = {name: value for name, value in pairs if name.startswith("encoding.")}
        if prefix:
            return {name.removeprefix(prefix): value for name, value in inside.items()}
        return {name: value for name, value in pairs if name not in inside}


def targeted(target: str | None, data: str | None, model: str | None, words: Sequence[str]) -> Target:
    """What the command line asks for. Raises PalateError where that is nothing, or more than one thing."""
    if target is not None and "=" in target and not Path(target).exists():
        words, target = [target, *words], None
    assigned = tuple(words_to_assignments(list(words)))
    if target is not None and data is not None:
        raise PalateError(f"check: {target!r} and --data are two things. Name one.")
    if data is not None:
        return Target("data", data, assigned, model)
    if target is None:
        if model is None:
            raise PalateError("check: name a recipe, a data set or a model. Example: palate check tasting_room.")
        return _model(model, assigned)
    kind = _kind(target)
    if kind == "recipe":
        if model is not None:
            raise PalateError("check: --model goes with data; a recipe names its own models. Leave it out.")
        found = Path(target) if Path(target).exists() else catalogue.recipe(target)
        return Target("recipe", str(found), assigned)
    if kind == "data":
        return Target("data", target, assigned, model)
    if model is not None:
        raise PalateError(f"check: {target!r} is a model, and so is --model. Name one.")
    return _model(target, assigned)


def _model(name: str, words: tuple[str, ...]) -> Target:
    if words:
        raise PalateError(f"check: {words[0]!r}: a model on its own takes no settings. Leave them out.")
    return Target("model", name)


def _kind(target: str) -> Kind:
    """Recipe, data or model, by what lies there."""
    path = Path(target).expanduser()
    if target.startswith("world:") or any(mark in target for mark in "*?["):
        return "data"
    if path.is_file():
        return "recipe" if path.suffix in (".yaml", ".yml") else "data"
    if path.is_dir():
        return _kind_of_folder(path)
    if target in catalogue.recipes():
        return "recipe"
    if path.suffix in (".yaml", ".yml") or container(path) is not None:
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise PalateError(f"{target}: no such file.{nearest(path.name, there)} Check the path.")
    raise PalateError(
        f"{target}: no such file, folder or recipe.{nearest(target, catalogue.recipes())} A name on the hub may be "
        f"either: write --data {target} or --model {target}."
    )


def _kind_of_folder(folder: Path) -> Kind:
    is_model = any((folder / name).exists() for name in _MODEL_FILES)
    held = is_saved(folder) or any(_holds_rows(f) for f in folder.rglob("*") if f.is_file())
    if is_model and held:
        raise PalateError(f"{folder}: it holds a model and data. Write --model {folder} or --data {folder}.")
    if is_model:
        return "model"
    if (folder / "resolved.yaml").exists():
        raise PalateError(
            f"{folder}: this is a run directory. Check its recipe, {folder / 'run.yaml'}, or the model of one of its "
            "stages, for example with `palate check RUN/1-NAME/model`."
        )
    if held:
        return "data"
    raise PalateError(f"{folder}: neither a model (no config.json) nor data files are in it. Check the path.")


def _holds_rows(file: Path) -> bool:
    """Whether a file holds rows. JSON and text files beside a model are its own."""
    return container(file) not in (None, "json", "txt") or (
        container(file) is not None and not any((file.parent / name).exists() for name in _MODEL_FILES)
    )
