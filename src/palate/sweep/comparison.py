"""Which settings differ, and which only seem to: means over seeds, and differences paired by seed.

Two settings under the same seed share data order and much of their luck, so what counts is the spread of their
difference, not of each alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from palate.sweep.measure import Measure
from palate.sweep.sweep import Sweep
from palate.sweep.trials import Trial

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """How far a setting is behind the best one, over the seeds both have. `p_value` is adjusted for all comparisons."""

    mean: float
    standard_error: float
    p_value: float


@dataclass(frozen=True)
class Row:
    """One setting: its value under each seed, None where the run failed or logged nothing finite."""

    trial: Trial
    values: Mapping[int, float | None]
    failures: Mapping[int, str]
    behind: Difference | None = None
    """None for the best one, and where fewer than two seeds are shared with it."""
    best: bool = False

    @property
    def known(self) -> list[float]:
        """The values that are there."""
        return [v for v in self.values.values() if v is not None]

    @property
    def mean(self) -> float:
        """Over the seeds that are there; nan where there is none."""
        return fmean(self.known) if self.known else math.nan

    @property
    def standard_error(self) -> float:
        """s / √n; nan below two seeds."""
        return stdev(self.known) / math.sqrt(len(self.known)) if len(self.known) > 1 else math.nan

    @property
    def verdict(self) -> str:
        """In words, for a table."""
        lost = len(self.values) - len(self.known)
        tail = f"; {lost} of {len(self.values)} seeds failed" if lost else ""
        if not self.known:
            return "failed"
        if self.best:
            return f"best{tail}"
        if self.behind is None:
            return f"not compared{tail}"
        if self.behind.p_value < LEVEL:
            return f"worse (p {p_text(self.behind.p_value)}){tail}"
        return f"within noise (p {p_text(self.behind.p_value)}){tail}"


@dataclass(frozen=True)
class Comparison:
    """A whole sweep compared by one measure; `rows` are in the order of the trials."""

    name: str
    measure: Measure
    seeds: tuple[int, ...]
    keys: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def ranked(self) -> list[Row]:
        """The rows, best first; those that lack seeds behind those that do not, those without a value last."""
        sign = self.measure.sign
        return sorted(self.rows, key=lambda r: (not r.known, -len(r.known), -sign * r.mean if r.known else 0.0))

    @property
    def best(self) -> Row | None:
        """The best row of those with most seeds."""
        return next((row for row in self.rows if row.best), None)


def p_text(p_value: float) -> str:
    """A p-value in two digits that is never said to be 0."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.2g}"


def compare(sweep: Sweep, measure: Measure, failures: Mapping[str, str]) -> Comparison:
    """Read every run's value and hold every setting against the best."""
    rows: list[Row] = []
    for trial in sweep.trials:
        runs = [run for run in sweep.runs if run.trial is trial]
        values = {run.seed: None if run.name in failures else measure.of(run) for run in runs}
        failed = {run.seed: failures[run.name] for run in runs if run.name in failures}
        rows.append(Row(trial, values, failed))
    keys = tuple(axis.key for axis in sweep.axes)
    return Comparison(sweep.folder.name, measure, sweep.seeds, keys, judged(rows, measure.sign))


def judged(rows: Sequence[Row], sign: float) -> tuple[Row, ...]:
    """The rows with the best marked and the others' distance from it."""
    known = [row for row in rows if row.known]
    if not known:
        return tuple(rows)
    most = max(len(row.known) for row in known)
    best = max((row for row in known if len(row.known) == most), key=lambda row: sign * row.mean)
    raw = {row.trial.number: behind(best.values, row.values, sign) for row in rows if row is not best}
    found = {number: difference for number, difference in raw.items() if difference is not None}
    adjusted = dict(zip(found, holm([d.p_value for d in found.values()]), strict=True))
    return tuple(
        Row(
            row.trial,
            row.values,
            row.failures,
            _with(found.get(row.trial.number), adjusted.get(row.trial.number)),
            row is best,
        )
        for row in rows
    )


def _with(difference: Difference | None, p_value: float | None) -> Difference | None:
    if difference is None or p_value is None:
        return None
    return Difference(difference.mean, difference.standard_error, p_value)


def behind(best: Mapping[int, float | None], other: Mapping[int, float | None], sign: float = 1.0) -> Difference | None:
    """The paired t-test of best − other over the seeds both have (Student 1908); None below two such seeds."""
    pairs = [(best.get(seed), value) for seed, value in other.items()]
    gaps = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
    if len(gaps) < 2:
        return None
    mean, error = fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))
    if error == 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    return Difference(mean, error, two_sided(mean / error, len(gaps) - 1))


def two_sided(t: float, degrees: int) -> float:
    """P(|T| ≥ |t|) of Student's t with a whole number of degrees of freedom: a finite series in θ = atan(t/√ν).

    Abramowitz and Stegun 1964, 26.7.3 (odd ν) and 26.7.4 (even ν). ValueError below one degree.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, not {degrees}")
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1 - inside))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false alarm among all of them stays at the level. Holm 1979."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = running
    return adjusted


def summary(found: Comparison) -> list[str]:
    """What may be said of a sweep, and what may not, in sentences."""
    best = found.best
    if best is None:
        return ["No run of this sweep has a value to compare."]
    if not found.keys:
        return [_spread_alone(found, best)]
    name = settings_text(best.trial)
    worse = [row for row in found.rows if row.behind is not None and row.behind.p_value < LEVEL]
    close = [row for row in found.rows if row.behind is not None and row.behind.p_value >= LEVEL]
    said = [f"The best mean is that of {name}."]
    if len(found.seeds) == 1:
        said.append("With one seed no difference can be told from luck. Run the same command with --seeds 3 or more.")
        return said
    if worse:
        said.append(f"{len(worse)} of {len(worse) + len(close)} other settings are worse by more than seeds explain.")
    if close:
        who = "No other setting is" if not worse else f"{len(close)} {'is' if len(close) == 1 else 'are'} not"
        said.append(f"{who} told apart from it by {len(found.seeds)} seeds: this is not proof that they are equal.")
    count = len(worse) + len(close)
    if not count:
        return [*said, "No other setting shares two seeds with it, so no difference is judged."]
    said.append(f"Differences are paired by seed (t-test, adjusted by Holm for {count} comparisons, level {LEVEL}).")
    said.append("The best of several noisy means is flattered by having been picked; measure it again under new seeds.")
    return said


def _spread_alone(found: Comparison, best: Row) -> str:
    error = "" if math.isnan(best.standard_error) else f" ± {best.standard_error:.4g} (standard error)"
    return f"{found.measure.metric} is {best.mean:.4g}{error} over {len(best.known)} seeds of one setting."


def settings_text(trial: Trial) -> str:
    """`beta=0.1, learning_rate=1e-5`, or `the recipe as it is` where nothing is swept."""
    names = labels([key for key, _ in trial.texts])
    return ", ".join(f"{names[key]}={text}" for key, text in trial.texts) or "the recipe as it is"


def labels(keys: Sequence[str]) -> dict[str, str]:
    """For each dotted key its last part, or so many of the last parts that no two keys are called the same."""
    parts = {key: key.split(".") for key in keys}
    found: dict[str, str] = {}
    for key in keys:
        count = 1
        while any(other != key and parts[other][-count:] == parts[key][-count:] for other in keys):
            count += 1
        found[key] = ".".join(parts[key][-count:])
    return found
