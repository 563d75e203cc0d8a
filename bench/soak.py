"""Thousands of small PPO steps in one process: does memory grow, do file handles leak, do steps slow down?

    python -m bench.soak --steps 2000        exit code 1 if a promise is broken
    python -m bench.soak --page bench/soak.md --picture docs/img/soak.svg --json build/soak.json

The run is bench/soak.yaml with every default, saving and logging included. It is measured from inside, each time the
stage logs a step; a step lasts from one log to the next, so that everything between them counts, but for the time in
which it was ready to go on and other programs had the cores: the kernel knows that time, and it is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles

from bench import picture
from palate import run
from palate.live import Display
from palate.workspace import Workspace

RECIPE, STAGE = Path("bench/soak.yaml"), "rlhf"
ANSWERS = 8
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SETTLED = 0.1
"""The share of the run after which everything has been used once and memory must stay."""
WINDOW = 0.05
"""Memory before and after are medians over this share of the run."""
GROWTH, SLOWEST = 0.02, 2.0


@dataclass
class Watch:
    """What was seen at each step, in plain arrays that hardly grow themselves."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    """The step's own time."""
    waited: array[float] = field(default_factory=lambda: array("d"))
    """The time in which other programs had the cores."""
    resident: array[float] = field(default_factory=lambda: array("d"))
    handles: array[float] = field(default_factory=lambda: array("d"))
    threads: array[float] = field(default_factory=lambda: array("d"))
    _last: tuple[float, float] | None = None

    def look(self) -> None:
        """One step is over."""
        now, waiting = time.perf_counter(), seconds_in_line()
        if self._last is not None:
            waited = waiting - self._last[1]
            self.waited.append(waited)
            self.seconds.append(now - self._last[0] - waited)
            self.resident.append(resident_bytes())
            self.handles.append(len(os.listdir("/proc/self/fd")))
            self.threads.append(len(os.listdir("/proc/self/task")))
        self._last = time.perf_counter(), seconds_in_line()


def resident_bytes() -> int:
    """The memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def seconds_in_line() -> float:
    """How long this thread has stood in line for a core, by the kernel's count; 0 where the kernel does not count."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except OSError:
        return 0.0


@dataclass(frozen=True)
class Figures:
    """What a soak comes down to; memory in bytes, times in seconds."""

    steps: int
    resident_before: float
    resident_after: float
    growth: float
    handles_least: float
    handles_most: float
    threads_least: float
    threads_most: float
    step_median: float
    step_p99: float
    step_longest: float
    waited: float
    """The share of all time in which other programs had the cores."""

    @property
    def promises(self) -> dict[str, bool]:
        """What must hold, each as a statement that can be false."""
        return {
            f"memory grows by less than {GROWTH:.0%} after the first tenth": self.growth < GROWTH,
            "the number of open file handles stays the same": self.handles_least == self.handles_most,
            "the number of threads stays the same": self.threads_least == self.threads_most,
            f"99 of 100 steps take less than {SLOWEST:g} × the median": self.step_p99 < SLOWEST * self.step_median,
        }


def figures(watch: Watch) -> Figures:
    """The figures of a run; handles, threads and times are those after the first tenth."""
    count = len(watch.seconds)
    first, window = int(count * SETTLED), max(1, int(count * WINDOW))
    before = median(watch.resident[first : first + window])
    after = median(watch.resident[-window:])
    seconds = watch.seconds[first:]
    return Figures(
        steps=count,
        resident_before=before,
        resident_after=after,
        growth=after / before - 1,
        handles_least=min(watch.handles[first:]),
        handles_most=max(watch.handles[first:]),
        threads_least=min(watch.threads[first:]),
        threads_most=max(watch.threads[first:]),
        step_median=median(seconds),
        step_p99=quantiles(seconds, n=100, method="inclusive")[-1],
        step_longest=max(seconds),
        waited=sum(watch.waited) / (sum(watch.waited) + sum(watch.seconds)),
    )


def soak(steps: int, folder: Path) -> Watch:
    """Run the recipe in this process and watch its online stage from inside."""
    watch, log = Watch(), Workspace.log

    def looking(self: Workspace, step: int, metrics: Mapping[str, float]) -> None:
        log(self, step, metrics)
        if self.name == STAGE:
            watch.look()

    plan = run.plan_file(RECIPE, [f"output_dir={folder}", f"stages.{STAGE}.total_episodes={steps * ANSWERS}"])
    Workspace.log = looking
    try:
        run.execute(plan, Display(quiet=True))
    finally:
        Workspace.log = log
    return watch


def table(found: Figures) -> str:
    """Markdown."""
    mega = 2**20
    lines = [
        f"| {found.steps} steps | |",
        "|---|---|",
        f"| memory after a tenth → at the end | {found.resident_before / mega:.1f} → "
        f"{found.resident_after / mega:.1f} MiB ({found.growth:+.2%}) |",
        f"| open file handles | {found.handles_least:.0f} to {found.handles_most:.0f} |",
        f"| threads | {found.threads_least:.0f} to {found.threads_most:.0f} |",
        f"| step, median / p99 / longest | {found.step_median * 1e3:.1f} / {found.step_p99 * 1e3:.1f} / "
        f"{found.step_longest * 1e3:.1f} ms |",
        f"| time in which other programs had the cores, left out above | {found.waited:.0%} |",
        "",
    ]
    return (
        "\n".join(lines + [f"- {text}: {'yes' if kept else '**no**'}" for text, kept in found.promises.items()]) + "\n"
    )


def draw(watch: Watch) -> str:
    """Memory and step time over the run."""
    memory = [(float(step), value / 2**20) for step, value in enumerate(watch.resident, 1)]
    times = [(float(step), value * 1e3) for step, value in enumerate(watch.seconds, 1)]
    panels = [
        picture.Panel("Resident memory, MiB", [], thinned(memory), "value"),
        picture.Panel("Step time, ms: median of neighbours, and the slowest", [slowest(times)], thinned(times), "kl"),
    ]
    return picture.sheet(panels, x_label="step")


Points = Sequence[tuple[float, float]]


def _parts(points: Points, parts: int = 200) -> list[Points]:
    size = -(-len(points) // parts)
    return [points[start : start + size] for start in range(0, len(points), size)]


def thinned(points: Points) -> Points:
    """The medians of neighbours, two hundred points at most."""
    return [(fmean(x for x, _ in part), median(y for _, y in part)) for part in _parts(points)]


def slowest(points: Points) -> Points:
    """The largest of neighbours."""
    return [max(part, key=lambda point: point[1]) for part in _parts(points)]


def main(words: Sequence[str]) -> int:
    """The exit code: 0 when every promise held."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--page", type=Path, help="write the figures here as well")
    parser.add_argument("--picture", type=Path, help="write a chart")
    parser.add_argument("--json", type=Path, help="write the figures and every step for machines")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        watch = soak(asked.steps, Path(folder))
    found = figures(watch)
    print(table(found))
    if asked.page:
        title = f"# Growth\n\n`python -m bench.soak --steps {asked.steps}`\n\n"
        asked.page.write_text(title + table(found), encoding="utf-8")
    if asked.picture:
        asked.picture.write_text(draw(watch), encoding="utf-8")
    if asked.json:
        series = {name: list(getattr(watch, name)) for name in ("seconds", "waited", "resident", "handles", "threads")}
        asked.json.write_text(json.dumps({**asdict(found), "series": series}), encoding="utf-8")
    return 0 if all(found.promises.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
