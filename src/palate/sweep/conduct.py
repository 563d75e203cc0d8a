"""A sweep from its plan to its report."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from palate.live import Display
from palate.run import held
from palate.settings import PalateError
from palate.sweep import report
from palate.sweep.comparison import compare, summary
from palate.sweep.measure import Goal, Measure, choose
from palate.sweep.sweep import Run, Sweep
from palate.sweep.work import work


class RunsFailed(PalateError):
    """Some runs of a sweep failed; the others are done and compared. Exit code 1."""

    exit_code = 1


def conduct(sweep: Sweep, display: Display, jobs: int = 1, metric: str | None = None, goal: Goal | None = None) -> None:
    """Make the runs that are not done and compare all of them.

    Raises RunsFailed at the end when a run failed, PalateError for a metric that is not there or another sweep under
    this name, and Stopped or KeyboardInterrupt when it was stopped; the same call goes on.
    """
    with held(sweep.folder):
        sweep.remember()
        measured = _Measured(metric, goal)
        failures = work(sweep, jobs, display, measured.tell)
        if measured.measure is not None:
            _close(sweep, measured.measure, failures, display)
    if failures:
        first, why = next(iter(failures.items()))
        end = "" if why.endswith((".", "!", "?")) else "."
        raise RunsFailed(
            f"{len(failures)} of {len(sweep.runs)} runs failed, the first of them {first}: {why}{end} "
            "Mend that and run the same command again: what is done is kept."
        )


class _Measured:
    """Finds the measure at the first run that ended, so that a wrong metric does not wait for the last."""

    def __init__(self, metric: str | None, goal: Goal | None) -> None:
        self.metric = metric
        self.goal: Goal | None = goal
        self.measure: Measure | None = None

    def tell(self, run: Run) -> str:
        """The value of a finished run in a few words."""
        self.measure = self.measure or choose(run, self.metric, self.goal)
        value = self.measure.of(run)
        return f"{self.measure.metric} {'not finite' if value is None else f'{value:.4g}'}"


def _show(table: Table, console: Console) -> None:
    """A terminal gets columns that fit it; a file or a pipe gets all of them, however long the lines."""
    whole = console.measure(table, options=console.options.update(width=1000)).maximum
    console.print(table, width=None if console.is_terminal else whole, crop=console.is_terminal)


def _close(sweep: Sweep, measure: Measure, failures: Mapping[str, str], display: Display) -> None:
    found = compare(sweep, measure, failures)
    page = report.write(found, sweep.folder)
    better = "more" if measure.goal == "max" else "less"
    display.say(f"compared by {measure.metric} ({better} is better):")
    _show(report.terminal(found), display.console)
    for sentence in summary(found):
        display.say(sentence)
    display.say(f"report: {page}")
