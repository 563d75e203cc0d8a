"""`palate sweep`: one recipe under several settings, each under several seeds, and a comparison of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from palate.sweep.sweep import Sweep

_SHAPES = (
    ("0.05,0.1,0.5", "these; so do grid(...) and choice(...); commas inside brackets part nothing"),
    ("uniform(0,1)", "any number between; loguniform(1e-6,1e-4): any order of magnitude alike"),
    ("quniform(0,1,0.1)", "multiples of 0.1; qloguniform(1e-6,1e-4,1e-6) likewise"),
    ("randint(1,5)", "1, 2, 3 or 4; lograndint likewise; qrandint(2,8,2): 2, 4, 6 or 8; qlograndint likewise"),
    ("normal(0,1)", "mean and standard deviation; also called randn; qrandn(0,1,0.5): in steps"),
)


class SweepCommand(click.Command):
    """Its help ends with the ways to write values."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of ways."""
        with formatter.section("Values of a setting"):
            formatter.write_dl([(f"KEY={shape}", meaning) for shape, meaning in _SHAPES], 30)


@click.argument("recipe")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[key=VALUES ...]")
@click.option("--seeds", default="3", show_default=True, help="How many, from the recipe's own on; or which: 1,2,7.")
@click.option("--search", type=click.Choice(["grid", "random"]), help="Every combination, or --trials of them.")
@click.option("--trials", type=click.IntRange(min=1), help="Trials of a random search; 8 when not given.")
@click.option("--metric", help="What to compare by; else the first that is known of the last stage (docs/sweep.md).")
@click.option("--goal", type=click.Choice(["max", "min"]), help="Whether more or less of the metric is better.")
@click.option("--name", help="The sweep's folder under output_dir; RECIPE-sweep when not given.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at once.")
@click.option("--plan", "only_plan", is_flag=True, help="Show the trials and run none.")
def sweep(
    recipe: str,
    words: Sequence[str],
    seeds: str,
    search: Literal["grid", "random"] | None,
    trials: int | None,
    metric: str | None,
    goal: Literal["max", "min"] | None,
    name: str | None,
    jobs: int,
    only_plan: bool,
) -> None:
    """Run RECIPE under several settings, each under several seeds, and tell which differences are more than luck.

    A setting with several values is swept; one with a single value is the same everywhere. Every trial and seed is an
    ordinary run in runs/NAME/trial-003-seed-2. Stages that trials have in common are trained once. The same command
    goes on where a sweep was stopped; more --seeds or --trials add to what is there.

    \b
    Example:
      palate sweep recipe.yaml stages.1.algorithm.beta=0.05,0.1,0.5 --seeds 3
      palate sweep recipe.yaml 'stages.1.optimiser.learning_rate=loguniform(1e-6,1e-4)' --trials 8
      palate sweep recipe.yaml stages.sft.optimiser.betas=[0.9,0.95],[0.9,0.999] --plan
      palate sweep recipe.yaml --seeds 5          (nothing swept: how much do seeds alone differ?)
    """
    from palate import catalogue, one_stage, ranks
    from palate.settings import PalateError
    from palate.sweep.sweep import plan_sweep

    if ranks.size() > 1:
        raise PalateError("palate sweep starts its runs itself: start it without torchrun, and use --jobs.")
    path = Path(recipe)
    if not path.exists() and recipe in catalogue.recipes():
        path = catalogue.recipe(recipe)
    catalogue.find_own_code(path.parent)
    planned = plan_sweep(path, one_stage.words_to_assignments(list(words)), seeds, search, trials, name)
    if only_plan:
        _show(planned)
        return
    from palate.live import Display
    from palate.sweep.conduct import conduct

    conduct(planned, Display(), jobs, metric, goal)


def _show(planned: Sweep) -> None:
    """The trials, and what of each is there already."""
    seeds = ", ".join(map(str, planned.seeds))
    count = len(planned.trials)
    noun = "trial" if count == 1 else "trials"
    click.echo(f"{planned.folder}: {count} {noun} ({planned.search}) x seeds {seeds} = {len(planned.runs)} runs")
    for trial in planned.trials:
        runs = [run for run in planned.runs if run.trial is trial]
        done = sum(run.is_done() for run in runs)
        there = f"  ({done} of {len(runs)} done)" if done else ""
        click.echo(f"  {trial.name}  {'  '.join(trial.assignments) or '(the recipe as it is)'}{there}")
    stages = sum(len(run.plan.stages) for run in planned.runs)
    made = len({evidence.hash for run in planned.runs for evidence in run.evidences})
    click.echo(f"{stages} stages, of which {made} are made and {stages - made} taken over from runs with equal ones")
