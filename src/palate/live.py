"""What a run shows while it goes: one live line in a terminal, plain lines elsewhere, a few samples now and
then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

SHOWN: tuple[tuple[str, str], ...] = (
    ("loss", "loss {:.3f}"),
    ("mean_token_accuracy", "accuracy {:.0%}"),
    ("accuracy", "accuracy {:.0%}"),
    ("margin", "margin {:.2f}"),
    ("objective/scores", "reward {:.2f}"),
    ("gold/mean", "gold {:.2f}"),
    ("objective/kl", "KL {:.2f}"),
    ("response/length_mean", "length {:.0f}"),
    ("response/eos_rate", "EOS {:.0%}"),
    ("policy/clipfrac_avg", "clip {:.0%}"),
    ("tokens_per_second", "{:,.0f} tok/s"),
)
"""The metrics of the live line, in its order, each as it is written."""


def line(metrics: Mapping[str, float]) -> str:
    """The metrics worth a glance, in one line."""
    return "  ".join(shape.format(metrics[name]) for name, shape in SHOWN if name in metrics)


def plain(value: Any, width: int = 400) -> str:
    """Any value as one printable line: no control character of a model's text reaches the terminal."""
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    text = text.replace("\n", "⏎")
    shown = "".join(c if c.isprintable() else "·" for c in text[: width + 1])
    return shown if len(shown) <= width else shown[: width - 1] + "…"


class Display:
    """Talks to the person who watches a run. `every` is the least time, in seconds, between plain lines or
    tables.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False, every: float = 10.0) -> None:
        self.console = console or Console(stderr=True, quiet=quiet)
        self.every = every
        self._tables_from = 0.0

    def say(self, text: str) -> None:
        """One plain sentence."""
        self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One sentence that should be seen."""
        self.console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    def bar(self, total: int, title: str, done: int = 0) -> Bar:
        """A progress bar of `total` steps, `done` of them already behind us; use it in a `with`."""
        return Bar(self, total, title, done)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], limit: int = 2) -> None:
        """A few sample rows as a table, unless one was shown a moment ago."""
        now = time.monotonic()
        if not rows or now < self._tables_from:
            return
        self._tables_from = now + self.every
        shown = [_side_by_side(row) for row in rows[:limit]]
        names = list(shown[0])
        title = f"samples at step {step}" if step else "samples"
        table = Table(*names, title=title, title_justify="left", show_lines=True)
        for row in shown:
            table.add_row(*(Text(plain(row.get(name, ""))) for name in names))
        self.console.print(table)


def _side_by_side(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row for the terminal: answers of several models each get a column with their first score."""
    said = row.get("completions")
    if not isinstance(said, Mapping):
        return row
    answers, scores = cast(Mapping[str, Any], said), cast(Mapping[str, Mapping[str, Any]], row.get("scores", {}))
    found: dict[str, Any] = {"prompt": row.get("prompt", "")}
    for name, text in answers.items():
        judged = list(scores.get(name, {}).items())[:1]
        found[name] = f"{text} " + "".join(f"[{judge} {plain(score)}]" for judge, score in judged)
    return found


class Bar:
    """The progress of one stage: a live line in a terminal, a plain line now and then elsewhere."""

    def __init__(self, display: Display, total: int, title: str, done: int) -> None:
        self.display, self.total, self.title, self.done = display, total, title, done
        self._began_at = done
        self._live: tuple[Progress, TaskID] | None = None
        self._began = self._next_line = 0.0

    def __enter__(self) -> Bar:
        self._began = self._next_line = time.monotonic()
        if self.display.console.is_terminal:
            progress = _progress(self.display.console)
            task = progress.add_task(self.title, total=self.total, completed=self.done, seen="")
            progress.start()
            self._live = (progress, task)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live[0].stop()
            self._live = None

    def advance(self, metrics: Mapping[str, float] | None = None, steps: int = 1) -> None:
        """Move on by `steps` and show the newest metrics."""
        self.done += steps
        seen = line(metrics or {})
        if self._live is not None:
            progress, task = self._live
            progress.update(task, completed=self.done, seen=seen)
        elif time.monotonic() >= self._next_line or self.done >= self.total:
            self._next_line = time.monotonic() + self.display.every
            self.display.say(f"{self.title} {self.done}/{self.total}  {seen}  {self._left()}".rstrip())

    def _left(self) -> str:
        """The time that is left, from the mean pace so far."""
        moved = self.done - self._began_at
        if not moved or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self._began) / moved * (self.total - self.done)
        return f"{duration(seconds)} left"


def _progress(console: Console) -> Progress:
    one_line = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[seen]}", markup=False, table_column=one_line),
        TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
    )


def duration(seconds: float) -> str:
    """A time for people: `48 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
