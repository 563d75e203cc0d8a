"""`palate data check`: what is in a file, and what would hurt, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from palate.data.encode import Encoding, begins_by_itself, trained_counts
from palate.data.segments import Speaker
from palate.data.source import Data, Part, Reading, read_part
from palate.randomness import key
from palate.records import (
    Correction,
    Demonstration,
    Message,
    Ranking,
    Rated,
    Record,
    Text,
    Unpaired,
    fingerprint,
    text_of,
)
from palate.settings import PalateError

_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
_WORLD_ROWS = 1000


@dataclass(frozen=True)
class Report:
    """Counts and shares over the records of a source; shares are of records (of pairs where pairs are named)."""

    source: str
    formats: tuple[str, ...]
    kinds: dict[str, int]
    records: int
    prompts: int
    """Distinct prompts or groups: what a split can divide."""

    duplicates: int
    """Records that say exactly what an earlier one says."""

    empty_prompts: int
    empty_answers: int
    pairs: int
    chosen_is_rejected: int
    """Pairs whose two answers are the same text."""

    ties: int
    """Pairs of equal rank: they teach nothing to a ranking loss."""

    longer_is_better: float | None
    """Share of pairs in which the longer answer is the better one: the floor that a reward model must beat."""

    labels: dict[str, int]
    length_unit: str
    prompt_lengths: dict[str, float]
    answer_lengths: dict[str, float]
    over_long: float | None
    """Share of records longer than max_length; None when none was given."""

    double_bos: int | None
    """Records that spell out the begin token themselves at their start; None without a tokenizer."""

    untrained: float | None
    """Share of records without a trained token; None without a tokenizer or where nothing would be trained."""

    notes: tuple[str, ...]
    faults: tuple[str, ...]
    """Rows that could not be read, the first of them in words."""

    fault_count: int

    @property
    def healthy(self) -> bool:
        """Whether nothing was found that would make training fail or teach nothing."""
        bad = self.fault_count + self.chosen_is_rejected + (self.double_bos or 0)
        return not bad and not self.untrained and self.records > 0


def check(
    records: Sequence[Record],
    tokenizer: Speaker | None = None,
    max_length: int | None = None,
    source: str = "",
    reading: Reading | None = None,
) -> Report:
    """A report on records; lengths are in tokens with a tokenizer and in words without one."""
    found = reading or Reading(Part(path=source))
    faults = [row.message for row in found.bad] + ([str(found.broken)] if found.broken else [])
    pairs = [(r, i, j) for r in records if isinstance(r, Ranking) for i, j in _all_pairs(r)]
    prompt_lengths = [_length(r.prompt, tokenizer) for r in records]
    answers = [[_length(a, tokenizer) for a in _answers(r)] for r in records]
    long = [p + max(a, default=0) for p, a in zip(prompt_lengths, answers, strict=True)]
    return Report(
        source=source,
        formats=tuple(found.formats),
        kinds=dict(Counter(type(r).__name__ for r in records)),
        records=len(records),
        prompts=len({r.key for r in records}),
        duplicates=len(records) - len({_content(r) for r in records}),
        empty_prompts=sum(not text_of(r.prompt).strip() for r in records),
        empty_answers=sum(any(not _said(a).strip() for a in _answers(r)) for r in records),
        pairs=len(pairs),
        chosen_is_rejected=sum(r.completions[i] == r.completions[j] for r, i, j in pairs),
        ties=sum(r.ranks[i] == r.ranks[j] for r, i, j in pairs),
        longer_is_better=_longer_is_better(pairs),
        labels=dict(Counter(str(r.label).lower() for r in records if isinstance(r, Unpaired))),
        length_unit="tokens" if tokenizer else "words",
        prompt_lengths=_quantiles(prompt_lengths),
        answer_lengths=_quantiles([n for lengths in answers for n in lengths]),
        over_long=float(np.mean([n > max_length for n in long])) if max_length and long else None,
        double_bos=None if tokenizer is None else _doubled(records, tokenizer),
        untrained=None if tokenizer is None else _untrained(records, tokenizer, max_length),
        notes=tuple(found.notes),
        faults=tuple(faults[:5]),
        fault_count=len(faults),
    )


def check_data(data: Data, seed: int = 0, tokenizer: Speaker | None = None, max_length: int | None = None) -> Report:
    """A report on a source: faulty rows are counted and the first of them told, instead of stopping at one."""
    whole = read_all(data, seed)
    return check(whole.records, tokenizer, max_length, whole.part.path, whole)


def read_all(data: Data, seed: int = 0) -> Reading:
    """Every part of a source as one reading, its faults kept. Raises PalateError when there is no row to speak of."""
    whole = Reading(Part(path=data.path or ", ".join(part.path for part in data.parts())))
    for part in data.parts():
        rows = data.rows or (_WORLD_ROWS if part.path.startswith("world:") else None)
        reading = read_part(part, rows, key("data", seed), tolerant=True)
        whole.records += reading.records
        whole.formats += reading.formats
        whole.notes += reading.notes
        whole.bad += reading.bad
        whole.broken = whole.broken or reading.broken
    if not whole.records and (whole.bad or whole.broken):
        raise PalateError(whole.bad[0].message if whole.bad else str(whole.broken))
    return whole


def report_dict(report: Report) -> dict[str, Any]:
    """The report for --json."""
    return {**asdict(report), "healthy": report.healthy}


def report_text(report: Report) -> str:
    """The report as aligned lines for people; lines that need care begin with an exclamation mark."""
    share = f"{report.over_long:.1%}" if report.over_long is not None else None
    untrained = f"{report.untrained:.1%}" if report.untrained is not None else None
    longer = f"{report.longer_is_better:.1%} of pairs" if report.longer_is_better is not None else None
    lines: list[tuple[str, Any, bool]] = [
        ("format", ", ".join(report.formats) or None, False),
        ("records", ", ".join(f"{count} {kind}" for kind, count in report.kinds.items()), not report.records),
        ("distinct prompts", report.prompts, report.prompts < 2),
        ("duplicates", report.duplicates, report.duplicates > 0),
        ("empty prompts", report.empty_prompts or None, False),
        ("empty answers", report.empty_answers, report.empty_answers > 0),
        ("pairs", report.pairs or None, False),
        ("chosen = rejected", report.chosen_is_rejected if report.pairs else None, report.chosen_is_rejected > 0),
        ("ties", report.ties if report.pairs else None, False),
        ("longer is better", longer, False),
        ("labels", ", ".join(f"{n} {label}" for label, n in sorted(report.labels.items())) or None, _lopsided(report)),
        (f"prompt {report.length_unit}", _spelled(report.prompt_lengths), False),
        (f"answer {report.length_unit}", _spelled(report.answer_lengths), False),
        ("over-long", share, bool(report.over_long)),
        ("double begin token", report.double_bos, bool(report.double_bos)),
        ("without trained token", untrained, bool(report.untrained)),
        ("faulty rows", report.fault_count or None, True),
    ]
    shown = [f"{'!' if care else ' '} {name:<22} {value}" for name, value, care in lines if value is not None]
    return "\n".join([report.source or "records", *shown, *(f"    {n}" for n in (*report.notes, *report.faults))])


def _lopsided(report: Report) -> bool:
    """Fewer than one label in ten is of the rarer kind."""
    counts = report.labels.values()
    return bool(counts) and (len(counts) < 2 or min(counts) < 0.1 * sum(counts))


def _spelled(quantiles: dict[str, float]) -> str | None:
    return ", ".join(f"{name} {value:.0f}" for name, value in quantiles.items()) or None


def _answers(record: Record) -> tuple[Text, ...]:
    if isinstance(record, Ranking):
        return record.completions
    if isinstance(record, Correction):
        return (record.original, record.corrected)
    return (record.completion,) if isinstance(record, Demonstration | Unpaired | Rated) else ()


def _said(text: Text) -> str:
    """What is said without who says it, so that an empty turn is empty."""
    return text if isinstance(text, str) else "\n".join(turn.content for turn in text)


def _content(record: Record) -> str:
    judged = getattr(record, "ranks", getattr(record, "label", getattr(record, "rating", None)))
    return fingerprint(record.prompt, _answers(record), judged)


def _length(text: Text, tokenizer: Speaker | None) -> int:
    said = _said(text)
    return len(tokenizer.encode(said)) if tokenizer else len(said.split())


def _all_pairs(record: Ranking) -> list[tuple[int, int]]:
    """(better, worse) of every two answers, ties included."""
    ranks = record.ranks
    return [(i, j) for i in range(len(ranks)) for j in range(len(ranks)) if (ranks[i], i) < (ranks[j], j)]


def _longer_is_better(pairs: Sequence[tuple[Ranking, int, int]]) -> float | None:
    """Share of untied pairs whose better answer has more characters; equal lengths count one half."""
    wins: list[float] = []
    for record, better, worse in pairs:
        if record.ranks[better] != record.ranks[worse]:
            ahead = len(_said(record.completions[better])) - len(_said(record.completions[worse]))
            wins.append(0.5 if ahead == 0 else float(ahead > 0))
    return float(np.mean(wins)) if wins else None


def _quantiles(lengths: Sequence[int]) -> dict[str, float]:
    if not lengths:
        return {}
    names = ("shortest", "median", "90%", "99%", "longest")
    return {n: float(v) for n, v in zip(names, np.quantile(lengths, _QUANTILES), strict=True)}


def _doubled(records: Sequence[Record], tokenizer: Speaker) -> int:
    """Records whose text spells the begin token where the tokenizer or the template would put another."""
    if tokenizer.bos is None:
        return 0
    bos = tokenizer.decode([tokenizer.bos], skip_special=False)
    templated = tokenizer.render([Message("user", "a")], True).startswith(bos)

    def double(text: Text) -> bool:
        said = _said(text).lstrip()
        added = begins_by_itself(tokenizer) or (templated and not isinstance(text, str))
        return said.startswith(bos if added else bos + bos)

    return sum(any(double(text) for text in (record.prompt, *_answers(record))) for record in records)


def _untrained(records: Sequence[Record], tokenizer: Speaker, max_length: int | None) -> float | None:
    """Share of demonstrations and rankings that would be left out for want of a trained token."""
    encoding = Encoding(max_length=max_length, eos=tokenizer.eos is not None)
    ours = [r for r in records if isinstance(r, Demonstration | Ranking)]
    counts = trained_counts(ours, tokenizer, encoding)
    return counts.count(0) / len(counts) if counts else None
