"""`palate check`: a recipe, a data set or a model, looked at before anything is trained."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from palate.check.target import Target


@click.argument("target", required=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[key=value ...]")
@click.option("--data", "data", help="Check this data set: a file, folder, hub id or world:NAME/SHAPE.")
@click.option("--model", "model", help="Check this model; beside data: lay its rows out with this model's tokenizer.")
@click.option("--quick", is_flag=True, help="Measure nothing: no forward pass, no answer, no reward is asked.")
@click.option("--geometry", is_flag=True, help="Cut one update of each stage in several ways; its gradient must stay.")
@click.option("--all", "everything", is_flag=True, help="List the settings that are defaults too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document with everything; see docs/check.md.")
def check(
    target: str | None,
    words: Sequence[str],
    data: str | None,
    model: str | None,
    quick: bool,
    geometry: bool,
    everything: bool,
    as_json: bool,
) -> None:
    """Show what TARGET would do, without running it: a recipe, a data set, or a model folder.

    For a recipe: settings with their origin, batch arithmetic, rows as they are trained on, what memory and time it
    takes, and which stages would run. Nothing is written. Exit code 2 when something would fail or teach nothing.

    \b
    Example:
      palate check recipes/tasting_room.yaml
      palate check tasting_room seed=2 stages.ppo.rollout_batch_size=64 --quick
      palate check pairs.jsonl --model gpt2
      palate check runs/tasting_room/1-sft/model
      palate check tasting_room --json
      palate check my_recipe.yaml --geometry
    """
    from palate.check.target import targeted

    asked = targeted(target, data, model, words)
    found, document, faults = _cut(asked) if geometry else _look(asked, measure=not quick)
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False, indent=1, default=str))
    else:
        _print("geometry" if geometry else asked.kind, found, everything)
    if faults:
        noun = "fault" if len(faults) == 1 else "faults"
        click.echo(f"palate: {asked.name}: {len(faults)} {noun}. Mend what is named and check again.", err=True)
        sys.exit(2)


def _look(asked: Target, measure: bool) -> tuple[Any, dict[str, Any], Sequence[str]]:
    """(what was found, the same as a document, its faults)."""
    from palate.catalogue import find_own_code
    from palate.check import alone, recipe
    from palate.check.found import document

    find_own_code(Path(asked.name).parent)
    if asked.kind == "recipe":
        try:
            found = recipe.check_recipe(Path(asked.name), asked.words, measure, _tell)
        finally:
            _tell("")
        totals = {"seconds": found.seconds, "peak_bytes": found.peak}
        return found, document("recipe", found, healthy=not found.all_faults, **totals), found.all_faults
    if asked.kind == "data":
        rows = alone.check_data(asked.data(), asked.model, asked.encoding())
        return rows, document("data", rows, healthy=rows.report.healthy and not rows.faults), rows.faults
    one = alone.check_model(asked.name)
    return one, document("model", one, healthy=True), ()


def _cut(asked: Target) -> tuple[Any, dict[str, Any], Sequence[str]]:
    """As `_look`, for the batch-geometry law."""
    from dataclasses import asdict

    from palate.catalogue import find_own_code
    from palate.check.geometry import check_geometry
    from palate.settings import PalateError

    if asked.kind != "recipe":
        raise PalateError(f"{asked.name}: --geometry cuts the updates of a recipe, and this is none.")
    find_own_code(Path(asked.name).parent)
    found = check_geometry(Path(asked.name), asked.words, _tell)
    _tell("")
    faults = [one.fault for one in found if not one.holds]
    stages = [{**asdict(one), "holds": one.holds} for one in found]
    return found, {"what": "geometry", "healthy": not faults, "stages": stages, "faults": faults}, faults


def _tell(text: str) -> None:
    """What is being done, for people who wait at a terminal: one line that the next one replaces."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", err=True, nl=False)


def _print(kind: str, found: Any, everything: bool) -> None:
    from rich.console import Console

    from palate.check.page import Page

    console = Console(highlight=False, markup=False, emoji=False)
    page = Page(console, everything)
    with console.capture() as printed:
        {"geometry": page.geometry, "recipe": page.recipe, "data": page.data, "model": page.model}[kind](found)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))
