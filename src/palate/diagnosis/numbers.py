"""The key numbers of an evaluation: cards for the eye, one table for the record, and the reward-model pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from palate.diagnosis import svg
from palate.diagnosis.curves import Figure
from palate.diagnosis.findings import judge_of, last_model
from palate.diagnosis.run_folder import Row, at, mapping

Show = Callable[[float], str]


@dataclass(frozen=True)
class Card:
    """One number: its name, its value as text, a line of context, and perhaps a drawing of its interval.

    `mood` is good or bad where the direction of the change is known to be, else empty.
    """

    name: str
    value: str
    context: str
    drawing: str = ""
    mood: str = ""


@dataclass(frozen=True)
class Table:
    """Measures in rows, models in columns, all as text."""

    models: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def percent(value: float) -> str:
    """A share as a percentage with one decimal, none where it is whole."""
    return f"{value:.1%}".replace(".0%", "%")


def change(was: float, now: float, show: Show) -> str:
    """Before and after in one line; one value where they read alike."""
    return show(now) if show(was) == show(now) else f"{show(was)} → {show(now)}"


def moved(was: float, now: float, show: Show) -> str:
    """The difference: in points for shares, else as a number with its sign."""
    if show(was) == show(now):
        return "unchanged"
    return f"{signed((now - was) * 100)} points" if show is percent else signed(now - was)


_SEEN = 0.1
"""A world's measure has no interval here; a change below this share of it is not coloured as one."""

_WORLD: Mapping[str, tuple[str, Show, int]] = {
    "coverage": ("Facts covered", percent, 1),
    "invented": ("Facts invented per answer", svg.short, -1),
    "rude": ("Rude sentences per answer", svg.short, -1),
    "ended": ("Properly ended", percent, 1),
}
"""What is shown of a world's summary: its name, how it is written, and whether more is better (1) or worse (−1)."""

_TEXT: Mapping[str, tuple[str, Show]] = {
    "length_mean": ("Length, tokens", svg.short),
    "eos_rate": ("Ends by itself", percent),
    "distinct_answers": ("Different answers", percent),
    "distinct_1": ("Distinct words", percent),
    "distinct_2": ("Distinct word pairs", percent),
    "self_repetition": ("Repeats itself", percent),
    "empty_rate": ("Empty answers", percent),
}


def cards(found: Row) -> list[Card]:
    """The key numbers of one evaluation, the last model beside the baseline."""
    before, after = str(found.get("baseline")), last_model(found)
    return [
        *_duel(found, after),
        *_scores(found, before, after),
        *_world(found, before, after),
        *_shape(found, before, after),
        *(card for name in mapping(found, "reward_models") for card in _reward_card(found, name)),
    ]


def _duel(found: Row, after: str) -> Iterator[Card]:
    judge = judge_of(found) or ""
    rate = mapping(found, "models", after, "win_rate", judge, "rate")
    share, low, high = (at(rate, key) for key in ("estimate", "low", "high"))
    if share is None or low is None or high is None:
        return
    title = f"win rate {share:.1%}, 95 % interval {low:.1%} to {high:.1%}; one half is no difference"
    mood = "good" if low > 0.5 else "bad" if high < 0.5 else ""
    context = f"{low:.1%} to {high:.1%} under {judge}"
    yield Card("Win rate", percent(share), context, svg.interval_bar(share, low, high, 0.5, title), mood)


def _scores(found: Row, before: str, after: str) -> Iterator[Card]:
    for reward in mapping(found, "models", after, "scores"):
        was, now = (at(found, "models", m, "scores", reward, "mean", "estimate") for m in (before, after))
        gain = mapping(found, "models", after, "gain", reward, "mean")
        low, high = at(gain, "low"), at(gain, "high")
        if was is None or now is None or before == after:
            continue
        sure = low is not None and high is not None and low * high > 0
        mood = ("good" if now > was else "bad") if sure else ""
        interval = f" · {signed(low)} to {signed(high)}" if low is not None and high is not None else ""
        kind = "true utility" if reward == found.get("gold") else "reward"
        yield Card(f"{reward} ({kind})", change(was, now, svg.short), f"{signed(now - was)}{interval}", "", mood)


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"+{svg.short(value)}" if value > 0 else svg.short(value)


def _world(found: Row, before: str, after: str) -> Iterator[Card]:
    for key, (name, show, better) in _WORLD.items():
        was, now = (at(found, "models", m, "world", key) for m in (before, after))
        if was is not None and now is not None:
            seen = abs(now - was) >= _SEEN * max(abs(was), _SEEN)
            mood = ("good" if (now - was) * better > 0 else "bad") if seen else ""
            yield Card(name, change(was, now, show), moved(was, now, show), "", mood)


def _shape(found: Row, before: str, after: str) -> Iterator[Card]:
    kl, error = (at(found, "models", after, "kl", key) for key in ("mean", "standard_error"))
    if kl is not None:
        context = f"nats per answer from {before}" + (f", ± {svg.short(error)}" if error is not None else "")
        yield Card("KL", svg.short(kl), context)
    for key in ("length_mean", "eos_rate", "distinct_answers"):
        name, show = _TEXT[key]
        was, now = (at(found, "models", m, "text", key) for m in (before, after))
        if was is not None and now is not None:
            yield Card(name, change(was, now, show), moved(was, now, show))


def _reward_card(found: Row, name: str) -> Iterator[Card]:
    page = mapping(found, "reward_models", name)
    accuracy, low, high = at(page, "accuracy"), at(page, "by_prompt", "low"), at(page, "by_prompt", "high")
    if accuracy is None or low is None or high is None:
        return
    ceiling = at(page, "truth", "ceiling")
    context = f"ceiling {percent(ceiling)}" if ceiling is not None else f"{percent(low)} to {percent(high)}"
    title = f"accuracy {accuracy:.1%}, 95 % interval {low:.1%} to {high:.1%}; one half is chance"
    drawing = svg.interval_bar(accuracy, low, high, 0.5, title)
    yield Card(f"Reward model {name}", percent(accuracy), context, drawing, "good" if low > 0.5 else "bad")


def table(found: Row) -> Table:
    """Every measure of every model."""
    models = tuple(mapping(found, "models"))
    rows = list(_rows(found))
    return Table(models, tuple((name, cells) for name, cells in rows if any(cell != "–" for cell in cells)))


def _rows(found: Row) -> Iterator[tuple[str, tuple[str, ...]]]:
    models = mapping(found, "models")

    def row(name: str, show: Show, *path: str) -> tuple[str, tuple[str, ...]]:
        values = (at(found, "models", model, *path) for model in models)
        return name, tuple("–" if v is None else show(v) for v in values)

    rewards = dict.fromkeys(r for m in models for r in mapping(found, "models", m, "scores"))
    for reward in rewards:
        yield row(f"{reward}: mean score", svg.short, "scores", reward, "mean", "estimate")
        yield row(f"{reward}: win rate", percent, "win_rate", reward, "rate", "estimate")
    yield row("KL, nats per answer", svg.short, "kl", "mean")
    for key, (name, show) in _TEXT.items():
        yield row(name, show, "text", key)
    for key in dict.fromkeys(k for m in models for k in mapping(found, "models", m, "world")):
        name, show, _ = _WORLD.get(key, (f"world: {key}", svg.short, 0))
        yield row(name, show, "world", key)
    for key in ("rouge1", "rouge2", "rougeL"):
        yield row(f"ROUGE-{key.removeprefix('rouge')}", percent, "rouge", key)


def reward_pages(found: Row) -> list[tuple[str, str, list[Figure]]]:
    """(name, sentence, charts) of every reward model that was held against comparisons."""
    pages = mapping(found, "reward_models")
    return [(name, _sentence(mapping(pages, name)), _charts(mapping(pages, name))) for name in pages]


def _sentence(page: Row) -> str:
    pairs, prompts = at(page, "pairs"), at(page, "prompts")
    error, length = at(page, "calibration", "error"), at(page, "length_correlation")
    parts = [f"{pairs:.0f} held pairs of {prompts:.0f} prompts." if pairs and prompts else ""]
    parts.append(f"Calibration error {error:.1%}." if error is not None else "")
    parts.append(f"Correlation of score and length {svg.short(length)}." if length is not None else "")
    if (share := at(page, "truth", "share")) is not None:
        parts.append(f"{share:.0%} of the way from chance to the ceiling.")
    return " ".join(part for part in parts if part)


def _charts(page: Row) -> list[Figure]:
    return [*_accuracy_chart(page), *_calibration_chart(page), *_length_chart(page)]


def _accuracy_chart(page: Row) -> Iterator[Figure]:
    bars = [
        svg.Bar(label, value, style, low, high)
        for label, value, style, low, high in (
            ("this model", at(page, "accuracy"), "proxy", at(page, "by_prompt", "low"), at(page, "by_prompt", "high")),
            ("longer wins", at(page, "longer_wins"), "plain", None, None),
            ("ceiling of the labels", at(page, "truth", "ceiling"), "gold", None, None),
            ("model on true order", at(page, "truth", "gold_accuracy"), "value", None, None),
        )
        if value is not None
    ]
    if bars:
        said = ", ".join(f"{bar.label} {bar.value:.1%}" for bar in bars)
        caption = "Pairs in the raters' order, with a 95 % interval that draws whole prompts."
        yield Figure("Accuracy", caption, svg.bars(bars, f"Accuracy on held comparisons: {said}"))


def _calibration_chart(page: Row) -> Iterator[Figure]:
    bins = mapping(page, "calibration").get("bins") or []
    points = [(at(b, "predicted"), at(b, "observed"), at(b, "count")) for b in bins]
    known = [(said, right, count) for said, right, count in points if said and right is not None and count]
    if known:
        total = sum(count for _, _, count in known)
        drawing = svg.calibration_chart(
            [(said, right, count / total) for said, right, count in known],
            "Calibration: confidence of the model against the share it got right; the dashed line is perfect",
        )
        yield Figure("Calibration", "On the dashed line, 80 % sure means right in 80 % of pairs.", drawing)


def _length_chart(page: Row) -> Iterator[Figure]:
    bins = [b for b in page.get("length_bins") or [] if at(b, "model") is not None]
    if not bins:
        return
    bars = [bar for b in bins for bar in _length_bars(b)]
    caption = "How often the longer answer is preferred, by how much longer it is (tokens). Alike is unbiased."
    drawing = svg.bars(bars, "How often the model and the raters prefer the longer answer, by length difference")
    yield Figure("Length bias", caption, drawing, (("model", "proxy"), ("raters", "plain")))


def _length_bars(found: Row) -> Iterator[svg.Bar]:
    low, high = at(found, "low") or 0, at(found, "high") or 0
    longer = f"+{low:.0f}" if low == high else f"+{low:.0f} to {high:.0f}"
    yield svg.Bar(f"{longer}: model", at(found, "model") or 0.0, "proxy")
    yield svg.Bar("raters", at(found, "label") or 0.0, "plain")
