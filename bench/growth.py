"""How cost grows: seven quantities at five sizes each, every other held; the exponent of a power law through them.

    python -m bench.growth                        some minutes, alone on the machine; writes bench/growth.md
    python -m bench.growth --tiny                 seconds, to see that it runs; prints the page and keeps nothing

A point is one SFT step, one GRPO iteration, or one rollout of a GPT-2 with random weights (4 blocks of width 256, 6,000
words, unless it is what grows), by the calls of a stage (`bench/rig.py`). The five points of a series take turns, round
after round, so that a slower minute of the machine meets all of them; the first round is not counted.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from bench import growth_page, rig
from palate.cast import Layout
from palate.engines.engine import Sampling

PAGE, PICTURE = Path(__file__).with_suffix(".md"), Path("docs/img/growth.svg")
Run = Callable[[], object]


@dataclass(frozen=True)
class Series:
    """What grows, and how a point of it is made ready to run."""

    title: str
    unit: str
    sizes: tuple[int, ...]
    ready: Callable[[int], Run]
    law: str
    """What the exponent should be, and why."""
    cost: Callable[[int], int] = lambda size: size
    """The x of a size, where that is another number."""


@dataclass(frozen=True)
class Fit:
    """y ≈ factor · x^exponent, by least squares on logarithms; `error` is the exponent's standard error."""

    exponent: float
    error: float
    factor: float


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """A straight line through the logarithms; three points at least, or there is no error to tell."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    n, mean_u, mean_v = len(u), sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    slope = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread
    start = mean_v - slope * mean_u
    left = sum((b - start - slope * a) ** 2 for a, b in zip(u, v, strict=True))
    return Fit(slope, math.sqrt(left / (n - 2) / spread), math.exp(start))


def _sft(shape: rig.Shape, rows: int, tokens: int) -> Run:
    bench = rig.Bench(rig.model(shape), {"kind": "sft"}, Layout(), Sampling())
    batch = rig.examples(shape, rows, tokens)
    return lambda: bench.learn(batch)


def _grpo(shape: rig.Shape, group: int, prompts: int, asked: int, said: int) -> Run:
    sampling = Sampling(max_new_tokens=said, fixed_length=True)
    bench = rig.Bench(rig.model(shape), {"kind": "grpo", "num_generations": group}, Layout(), sampling)
    texts, numbers = rig.ids(shape, prompts, asked, "prompts").tolist(), iter(range(1, 1 << 30))
    return lambda: bench.iteration(texts, next(numbers))


def _rollout(shape: rig.Shape, rows: int, asked: int, said: int) -> Run:
    sampling = Sampling(max_new_tokens=said, fixed_length=True)
    bench = rig.Bench(rig.model(shape), {"kind": "sft"}, Layout(), sampling)
    texts, numbers = rig.ids(shape, rows, asked, "prompts").tolist(), iter(range(1, 1 << 30))
    return lambda: bench.answers(texts, next(numbers))


def series(shape: rig.Shape = rig.SMALL, scale: int = 1) -> list[Series]:
    """All seven; `scale` divides the sizes."""

    def sizes(*full: int) -> tuple[int, ...]:
        return tuple(max(i + 2, size // scale) for i, size in enumerate(full))

    def wide(width: int) -> rig.Shape:
        return replace(shape, width=width, vocabulary=max(300, 1024 // scale))

    eight, tokens = max(2, 8 // scale), max(8, 128 // scale)
    asked, said = max(4, 32 // scale), max(4, 64 // scale)
    widths = (128, 192, 256, 384, 512) if scale == 1 else (8, 16, 24, 32, 48)
    words = (2000, 4000, 8000, 16000, 32000) if scale == 1 else (300, 400, 500, 600, 700)
    return [
        Series(
            "SFT step: tokens of a row",
            "tokens of each of 8 rows",
            sizes(64, 128, 256, 512, 1024),
            lambda t: _sft(shape, eight, t),
            "1, and above it where attention, which grows with the square, is no longer small",
        ),
        Series(
            "SFT step: rows",
            "rows of 128 tokens",
            sizes(4, 8, 16, 32, 64),
            lambda b: _sft(shape, b, tokens),
            "1; below it while Adam and other costs of a step that no row adds to still count",
        ),
        Series(
            "SFT step: model",
            "weights multiplied",
            widths,
            lambda d: _sft(wide(d), eight, tokens),
            "1 by arithmetic; below it, as wider products run nearer to the machine's limit",
            lambda d: wide(d).multiplied,
        ),
        Series(
            "SFT step: vocabulary",
            "words",
            words,
            lambda v: _sft(replace(shape, vocabulary=v), eight, tokens),
            "towards 1: the head is one term beside the blocks, which stay the same",
        ),
        Series(
            "GRPO iteration: group",
            "answers to each of 8 prompts",
            sizes(2, 4, 8, 16, 32),
            lambda k: _grpo(shape, k, eight, asked * 3 // 4, said * 5 // 6),
            "1 at most: answers to one prompt share its reading",
        ),
        Series(
            "Rollout: new tokens",
            "new tokens of each of 32 answers",
            sizes(16, 32, 64, 128, 256),
            lambda t: _rollout(shape, eight * 4, asked, t),
            "1, and above it as each token attends to more; below it where reading the prompts counts",
        ),
        Series(
            "Rollout: answers",
            "answers at a time, 64 new tokens each",
            sizes(4, 8, 16, 32, 64),
            lambda b: _rollout(shape, b, asked, said),
            "far below 1 while a step mostly reads weights, towards 1 when products dominate",
        ),
    ]


def measure(one: Series, rounds: int) -> dict[int, list[float]]:
    """Seconds of every point in every counted round, by x."""
    runs = {one.cost(size): one.ready(size) for size in one.sizes}
    seconds: dict[int, list[float]] = {x: [] for x in runs}
    for turn in range(rounds + 1):
        for x, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[x].append(time.perf_counter() - began)
    return seconds


def main(words: Sequence[str]) -> int:
    """Measure, fit, write the page and the picture; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth")
    parser.add_argument("--tiny", action="store_true", help="small sizes and two rounds; nothing is written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args(words)
    torch.set_num_threads(asked.threads)
    rounds = 2 if asked.tiny else asked.rounds
    found: dict[str, growth_page.Found] = {}
    for one in series(rig.Shape(2, 32, 2, 300, 128), 16) if asked.tiny else series():
        print(f"{one.title} …", file=sys.stderr, flush=True)
        found[one.title] = _found(one, measure(one, rounds))
    how = f"{platform.machine()}, torch {torch.__version__}, {asked.threads} threads, float32; {rounds} rounds"
    text = growth_page.page(found, how)
    print(text)
    if not asked.tiny:
        PAGE.write_text(text, encoding="utf-8")
        PICTURE.write_text(growth_page.picture(found), encoding="utf-8")
    return 0


def _found(one: Series, seconds: Mapping[int, Sequence[float]]) -> growth_page.Found:
    points = tuple((x, median(s), min(s), max(s)) for x, s in seconds.items())
    line = fit([p[0] for p in points], [p[1] for p in points])
    return growth_page.Found(one.unit, points, line.exponent, line.error, line.factor, one.law)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
