"""Which curves a stage's page shows, and what a series of numbers amounts to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from palate.diagnosis import svg
from palate.diagnosis.run_folder import Points, StageFolder


@dataclass(frozen=True)
class Curve:
    """One chart: the metrics that share it as (metric, label, style), and what the eye should look for.

    `include` are values the vertical axis must show. Where `units_differ`, series of unequal size get a chart
    each.
    """

    title: str
    caption: str
    metrics: tuple[tuple[str, str, str], ...]
    include: tuple[float, ...] = ()
    units_differ: bool = False


@dataclass(frozen=True)
class Figure:
    """A drawn chart with its words. `legend` holds (label, style) where several series share it."""

    title: str
    caption: str
    drawing: str
    legend: tuple[tuple[str, str], ...] = ()


SCORES = Curve(
    "Score and truth",
    "What the reward says (proxy) and what is true (gold). They should rise together.",
    (("objective/scores", "proxy", "proxy"), ("gold/mean", "gold", "gold")),
    units_differ=True,
)
CURVES = (
    Curve(
        "KL to the reference",
        "Nats per answer: how far the policy has moved.",
        (("objective/kl", "KL", "kl"),),
        (0.0,),
    ),
    Curve(
        "Reward after the KL penalty",
        "The score with the penalty taken off: what is really climbed.",
        (("objective/rlhf_reward", "score − penalty", "proxy"), ("objective/non_score_reward", "penalty", "kl")),
    ),
    Curve(
        "Entropy",
        "Nats per answer. Falling is learning; near nothing is one answer for every prompt.",
        (("objective/entropy", "entropy", "ink"),),
    ),
    Curve("Answer length", "Tokens. A jump means that length pays.", (("response/length_mean", "tokens", "ink"),)),
    Curve(
        "Answers that end by themselves",
        "Share with an end token before the limit.",
        (("response/eos_rate", "share", "ink"),),
        (0.0, 1.0),
    ),
    Curve(
        "Value: explained variance",
        "1: all returns foreseen. Below 0: worse than a constant.",
        (("val/explained_variance", "explained variance", "value"),),
        (0.0, 1.0),
    ),
    Curve("Policy loss", "Hovers near zero by its nature.", (("loss/policy_avg", "policy loss", "proxy"),)),
    Curve("Value loss", "Should fall, then stay.", (("loss/value_avg", "value loss", "value"),)),
    Curve(
        "Clipped share",
        "Tokens whose update was cut. Above a third, steps are too large.",
        (("policy/clipfrac_avg", "policy", "proxy"), ("val/clipfrac_avg", "value", "value")),
        (0.0,),
    ),
    Curve(
        "Step size",
        "Approximate KL of one round of updates.",
        (("policy/approxkl_avg", "approximate KL", "kl"),),
        (0.0,),
    ),
    Curve("KL coefficient", "The price of a nat.", (("objective/kl_coef", "coefficient", "kl"),)),
    Curve(
        "Loss",
        "Training beside held-out rows, where some were held out.",
        (("loss", "training", "proxy"), ("eval/loss", "held out", "gold")),
    ),
    Curve(
        "Accuracy on comparisons",
        "Pairs in the raters' order; chance is ½.",
        (("accuracy", "training", "proxy"), ("eval/accuracy", "held out", "gold")),
        (0.5, 1.0),
    ),
    Curve(
        "Accuracy on pairs",
        "Pairs whose chosen answer the policy raised more. A collapsed policy has it too: see the next chart.",
        (("rewards/accuracies", "training", "proxy"), ("eval/rewards/accuracies", "held out", "gold")),
        (0.5, 1.0),
    ),
    Curve(
        "Change of log π(chosen)",
        "Nats per answer against the reference. Below −5 the policy unlearns what it is shown.",
        (("logps/chosen_change", "training", "proxy"), ("eval/logps/chosen_change", "held out", "gold")),
        (0.0,),
    ),
    Curve(
        "log π of pairs",
        "Nats per answer. Both may fall while their distance grows.",
        (("logps/chosen", "chosen", "gold"), ("logps/rejected", "rejected", "kl")),
    ),
    Curve(
        "Margin",
        "Score of the better answer minus that of the worse.",
        (("margin", "training", "proxy"), ("eval/margin", "held out", "gold")),
    ),
    Curve(
        "Rewards",
        "Lowest, mean and highest of a batch.",
        (("min_reward", "lowest", "kl"), ("mean_reward", "mean", "proxy"), ("max_reward", "highest", "value")),
    ),
    Curve(
        "Token accuracy",
        "Demonstrated tokens that were the likeliest.",
        (("mean_token_accuracy", "training", "proxy"), ("eval/mean_token_accuracy", "held out", "gold")),
    ),
    Curve("Entropy per token", "Nats.", (("entropy", "entropy", "ink"), ("policy/entropy_avg", "entropy", "ink"))),
    Curve("Learning rate", "As scheduled.", (("lr", "learning rate", "ink"),), (0.0,)),
)

_MISMATCH = 8.0
"""Series of other units whose spans differ by more than this get a chart each: one would look flat beside the other."""
_RAW = 40
"""Series up to this many points are drawn as they are; longer ones smoothed, with the raw ones faint behind."""


def figures(stage: StageFolder) -> list[Figure]:
    """The charts of one stage: those of `CURVES` whose metrics it logged at least twice."""
    return [figure for curve in CURVES for figure in _draw(stage, curve)]


def _draw(stage: StageFolder, curve: Curve) -> list[Figure]:
    lines = [
        svg.Line(label, smooth(points), style, points if len(points) > _RAW else ())
        for metric, label, style in curve.metrics
        if len(points := stage.series(metric)) > 1
    ]
    if not lines:
        return []
    if not curve.units_differ or together([line.points for line in lines]):
        return [_figure(curve, lines, curve.title)]
    return [_figure(curve, [line], f"{curve.title}: {line.label}") for line in lines]


def _figure(curve: Curve, lines: Sequence[svg.Line], title: str) -> Figure:
    drawn = [svg.Line(line.label, svg.thin(line.points, 240), line.style, svg.thin(line.faint, 240)) for line in lines]
    said = "; ".join(
        f"{line.label} from {svg.short(line.points[0][1])} to {svg.short(line.points[-1][1])}" for line in lines
    )
    drawing = svg.line_chart(drawn, f"{title}: {said}.", include=curve.include)
    return Figure(title, curve.caption, drawing, _legend(lines) if len(lines) > 1 else ())


def _legend(lines: Sequence[svg.Line]) -> tuple[tuple[str, str], ...]:
    return tuple((line.label, line.style) for line in lines)


def smooth(points: Points) -> Points:
    """A centred moving average over about a twentieth of the series; short series are left alone."""
    reach = window(points) // 2
    values = [v for _, v in points]
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [(step, sum(w) / len(w)) for (step, _), w in zip(points, windows, strict=True)]


def window(points: Points) -> int:
    """How many neighbouring points `smooth` averages: an odd number, 1 for short series."""
    return 1 if len(points) <= _RAW else 2 * max(1, len(points) // 40) + 1


def together(series: Sequence[Sequence[svg.Point]]) -> bool:
    """Whether series are of one size, so that one vertical axis serves them all."""
    spans = [max(v for _, v in s) - min(v for _, v in s) for s in series]
    values = [v for s in series for _, v in s]
    widest, whole = max(spans), max(values) - min(values)
    return widest == 0 or (min(spans) * _MISMATCH >= widest and whole <= _MISMATCH * widest)


def start_of(points: Points) -> float:
    """The mean of the first tenth of a series (at least its first point)."""
    head = points[: max(1, len(points) // 10)]
    return sum(v for _, v in head) / len(head)


def end_of(points: Points) -> float:
    """The mean of the last tenth of a series (at least its last point)."""
    tail = points[-max(1, len(points) // 10) :]
    return sum(v for _, v in tail) / len(tail)


def noise_of(points: Points) -> float:
    """The deviation of one smoothed point about the trend, estimated from the steps between raw neighbours."""
    steps = [(after - before) ** 2 for (_, before), (_, after) in pairwise(points)]
    return math.sqrt(sum(steps) / len(steps) / 2 / window(points)) if steps else 0.0


def frontier(stage: StageFolder) -> list[Figure]:
    """Score and gold over training, and both against the KL they cost (Gao et al. 2022); nothing without a KL."""
    kl = dict(smooth(stage.series("objective/kl")))
    lines: list[svg.Line] = []
    for metric, label, style in (("objective/scores", "proxy", "proxy"), ("gold/mean", "gold", "gold")):
        path = [(kl[step], value) for step, value in smooth(stage.series(metric)) if step in kl]
        if len(path) > 1:
            lines.append(svg.Line(label, svg.thin(path, 60), style))
    if not lines:
        return []
    shared = together([line.points for line in lines])
    paths = [_frontier(group) for group in ([lines] if shared else [[line] for line in lines])]
    return [*_draw(stage, SCORES), *paths]


def _frontier(lines: Sequence[svg.Line]) -> Figure:
    names = " and ".join(line.label for line in lines)
    title = f"{names} against KL to the reference, in the order of training"
    caption = "Training runs from the hollow dot to the full one. Where gold bends down, the proxy is overused."
    drawing = svg.frontier(lines, title, "KL to the reference, nats", "mean score")
    return Figure(f"{names[0].upper()}{names[1:]} against KL", caption, drawing, _legend(lines))
