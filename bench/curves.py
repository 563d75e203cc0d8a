"""Learning curves by shape: the 2019 sentiment task in small, over several seeds, against section 4.1 of the notes.

python recipes/stories/prepare.py
python -m bench.curves                   # runs what is not done yet; writes bench/curves.md, docs/img/curves.svg
python -m bench.curves moments           # the numbers that bench/lexicon.py scales its score with
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, pstdev

from bench import picture
from bench.lexicon import raw
from palate import run
from palate.data.encode import encode_prompts
from palate.data.source import load as read
from palate.diagnosis.curves import smooth
from palate.diagnosis.run_folder import Points
from palate.engines.local import LocalEngine
from palate.live import Display
from palate.models.load import load
from palate.randomness import key
from palate.stages.online import Stage
from palate.tracking import JsonLines

RECIPE, SEEDS = Path("bench/curves.yaml"), (1, 2, 3)
TABLE, PICTURE = Path("bench/curves.md"), Path("docs/img/curves.svg")
NEAR = 0.15
"""KL counts as locked while its moving average stays this near to the target, as a share of it."""


@dataclass(frozen=True)
class Shape:
    """What one run's curves amount to. Starts are the first fiftieth of a run, ends its last tenth."""

    kl_end: float
    kl_peak: float
    kl_locked_from: float
    """The share of the run after which the KL's moving average stays near its target; 1 when it never does."""
    score_start: float
    score_end: float
    entropy_start: float
    entropy_end: float
    beta_least: float
    beta_end: float
    clipfrac_third: float
    """Mean of the first third."""
    clipfrac_end: float
    approxkl_third: float
    approxkl_end: float


Rows = Sequence[Mapping[str, float]]


def series(rows: Rows, metric: str) -> list[float]:
    """One metric, in the order of training."""
    return [float(row[metric]) for row in rows]


def first(values: Sequence[float], share: float) -> float:
    """The mean of the first `share` of a series, at least of one value."""
    return fmean(values[: max(1, round(len(values) * share))])


def last(values: Sequence[float], share: float) -> float:
    """The mean of the last `share` of a series, at least of one value."""
    return fmean(values[-max(1, round(len(values) * share)) :])


def moving(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` neighbours, in order; shorter than `values` by window − 1."""
    return [fmean(values[i : i + window]) for i in range(len(values) - window + 1)]


def locked_from(values: Sequence[float], target: float, near: float = NEAR) -> float:
    """The share of a series after which its moving average over a tenth never leaves target·(1 ± near) again."""
    window = max(1, round(len(values) / 10))
    means = moving(values, window)
    outside = [i for i, mean in enumerate(means) if abs(mean / target - 1) > near]
    if not outside:
        return 0.0
    return 1.0 if outside[-1] == len(means) - 1 else (outside[-1] + 1) / len(values)


def shape(rows: Rows, target: float) -> Shape:
    """The shape of one run's curves."""
    kl, score = series(rows, "objective/kl"), series(rows, "objective/scores")
    entropy, beta = series(rows, "objective/entropy"), series(rows, "objective/kl_coef")
    clipfrac, approxkl = series(rows, "policy/clipfrac_avg"), series(rows, "policy/approxkl_avg")
    return Shape(
        kl_end=last(kl, 0.1),
        kl_peak=max(moving(kl, min(5, len(kl)))),
        kl_locked_from=locked_from(kl, target),
        score_start=first(score, 0.02),
        score_end=last(score, 0.1),
        entropy_start=first(entropy, 0.02),
        entropy_end=last(entropy, 0.1),
        beta_least=min(beta),
        beta_end=last(beta, 0.1),
        clipfrac_third=first(clipfrac, 1 / 3),
        clipfrac_end=last(clipfrac, 0.1),
        approxkl_third=first(approxkl, 1 / 3),
        approxkl_end=last(approxkl, 0.1),
    )


def mean_shape(shapes: Sequence[Shape]) -> Shape:
    """The mean over seeds, field by field."""
    return Shape(**{f.name: fmean(getattr(s, f.name) for s in shapes) for f in fields(Shape)})


def statements(found: Shape, target: float) -> dict[str, bool]:
    """The published shape as statements that can be false."""
    return {
        "KL ends within 10 % of its target": abs(found.kl_end / target - 1) < 0.1,
        "score rises": found.score_end > found.score_start,
        "entropy falls": found.entropy_end < found.entropy_start,
        "clip fraction of the last tenth is below a third of the first third's": found.clipfrac_end
        < found.clipfrac_third / 3,
        "approxkl of the last tenth is below a third of the first third's": found.approxkl_end
        < found.approxkl_third / 3,
    }


Cell = Callable[[Shape], str]
LINES: Sequence[tuple[str, Cell, str]] = (
    ("KL, last tenth", lambda s: f"{s.kl_end:.2f}", "6.0 (target 6)"),
    ("KL, peak", lambda s: f"{s.kl_peak:.1f}", "~7"),
    ("KL near its target from, share of the run", lambda s: f"{s.kl_locked_from:.0%}", "15 %"),
    ("score, start → last tenth", lambda s: f"{s.score_start:.2f} → {s.score_end:.2f}", "−0.4 → 1.72"),
    ("entropy, start → last tenth", lambda s: f"{s.entropy_start:.1f} → {s.entropy_end:.1f}", "53 → 44.3"),
    ("β, least → last tenth", lambda s: f"{s.beta_least:.3f} → {s.beta_end:.3f}", "0.118 → 0.25"),
    ("clip fraction, first third → last tenth", lambda s: f"{s.clipfrac_third:.4f} → {s.clipfrac_end:.5f}", "→ 0"),
    ("approxkl, first third → last tenth", lambda s: f"{s.approxkl_third:.2e} → {s.approxkl_end:.2e}", "→ 0"),
)


def table(shapes: Mapping[int, Shape], target: float) -> str:
    """Markdown: the numbers of each seed, their mean, and the published ones; then the statements."""
    columns = {**{f"seed {seed}": s for seed, s in shapes.items()}, "mean": mean_shape(list(shapes.values()))}
    lines = [
        f"| | {' | '.join(columns)} | published (GPT-2 124M) |",
        "|---|" + "---|" * (len(columns) + 1),
        *(f"| {name} | {' | '.join(cell(s) for s in columns.values())} | {said} |" for name, cell, said in LINES),
        "",
    ]
    for statement in statements(columns["mean"], target):
        holds = [str(seed) for seed, s in shapes.items() if statements(s, target)[statement]]
        lines.append(f"- {statement}: seeds {', '.join(holds) or 'none'} of {', '.join(map(str, shapes))}")
    return "\n".join(lines) + "\n"


PANELS: Sequence[tuple[str, str, str]] = (
    ("KL to the start, nats per answer", "objective/kl", "kl"),
    ("Score", "objective/scores", "proxy"),
    ("Entropy, nats per answer", "objective/entropy", "ink"),
    ("β, the price of a nat", "objective/kl_coef", "gold"),
    ("Clip fraction", "policy/clipfrac_avg", "value"),
    ("approxkl", "policy/approxkl_avg", "value"),
)


def draw(runs: Sequence[Rows], target: float) -> str:
    """The six curves over episodes, each seed thin and their mean thick, as one standalone SVG."""
    panels = []
    for title, metric, style in PANELS:
        seeds = [[(float(row["episode"]), float(row[metric])) for row in rows] for rows in runs]
        goal = target if metric == "objective/kl" else None
        panels.append(picture.Panel(title, [smooth(s) for s in seeds], smooth(_mean(seeds)), style, goal))
    return picture.sheet(panels)


def _mean(seeds: Sequence[Points]) -> Points:
    return [(points[0][0], fmean(value for _, value in points)) for points in zip(*seeds, strict=True)]


def go(seed: int) -> Rows:
    """The metrics of one seed's run, which is run first where it is not done."""
    plan = run.plan_file(RECIPE, [f"seed={seed}", f"name=seed-{seed}"])
    run.execute(plan, Display())
    return JsonLines(plan.stage_folder(0) / "metrics.jsonl").read()


def moments(rows: int = 512, seed: int = 0) -> tuple[float, float]:
    """Mean and population deviation of the lexicon's sum over the start model's whole answers (detail 21)."""
    stage = run.plan_file(RECIPE).stages[0]
    assert isinstance(stage, Stage)
    loaded = load(stage.model)
    records = read(stage.prompts, seed)[:rows]
    prompts = encode_prompts(records, loaded.tokenizer, stage.encoding).rows
    keys = [key(seed, "moments", row) for row in range(len(prompts))]
    said = LocalEngine(loaded.trunk, loaded.tokenizer, stage.sampling).generate([p.tokens for p in prompts], keys)
    texts = [loaded.tokenizer.decode(t[a].tolist()) for t, a in zip(said.tokens_BT, said.action_BT, strict=True)]
    scores = [raw(text) for text in texts]
    return fmean(scores), pstdev(scores)


def main(asked: Sequence[str]) -> None:
    """`moments`, or everything."""
    if list(asked) == ["moments"]:
        mean, std = moments()
        print(f"MEAN, STD = {mean:.2f}, {std:.2f}")
        return
    stage = run.plan_file(RECIPE).stages[0]
    target = stage.algorithm.target_kl  # pyright: ignore[reportAttributeAccessIssue]
    runs = {seed: go(seed) for seed in SEEDS}
    TABLE.write_text(table({seed: shape(rows, target) for seed, rows in runs.items()}, target), encoding="utf-8")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(list(runs.values()), target), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(sys.argv[1:])
