"""The two Adams on PPO's first two epochs over one recorded rollout, beside the published table (details 41, 42).

    python recipes/stories/prepare.py
    palate run bench/bigger.yaml
    python -m bench.adam_ablation            # writes bench/adam_ablation.md

The task is that of bench/curves.yaml. For each seed one rollout is recorded; every optimiser then starts from the same
weights, takes two steps on that same data, and the policy is compared with the one that wrote the answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from palate import parallel, run, step
from palate.batches import Experience, Loss
from palate.cast import Cast, assemble
from palate.cutting import Microbatch
from palate.data.encode import encode_prompts
from palate.data.source import load as read
from palate.engines.local import LocalEngine
from palate.models.load import load
from palate.randomness import key
from palate.stages._judging import Judging
from palate.stages.online import Stage

RECIPE, TABLE = Path("bench/curves.yaml"), Path("bench/adam_ablation.md")
SEEDS = (1, 2, 3)
STORY, BIGGER = Path("build/stories/stories260K"), Path("build/curves/bigger/1-sft/model")
EPISODES = 256
GPT2 = 124_439_808
PUBLISHED = {
    "approxkl": (3.717e-4, 2.367e-3),
    "clipfrac": (0.004557, 0.020182),
    "ratio var": (7.717e-4, 5.374e-3),
    "ratio max": (1.2272, 1.8121),
    "ratio min": (0.7400, 0.4011),
    "logp diff max": (0.2047, 0.5945),
    "logp diff min": (-0.3010, -0.9134),
}
"""Section 4.2 of the reference notes: (TensorFlow 1, PyTorch), GPT-2 124M, learning rate 1e-5, ε 1e-5."""


@dataclass(frozen=True)
class Recorded:
    """A rollout with everything PPO learns from it, and the cast that made it, still where it was."""

    stage: Stage
    cast: Cast
    experience: Experience
    start: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.cast.parameters(("policy", "value")).values())

    def loss(self, part: Experience) -> Loss:
        """PPO's loss, as the stage asks for it."""
        return self.stage.algorithm.loss(self.cast, part)  # pyright: ignore[reportAttributeAccessIssue]


def task(model: Path) -> Stage:
    """The task of bench/curves.yaml for another model: its full stop is found by its spelling where it has one."""
    stop = [] if model == STORY else ['stages.0.truncation.token="."']
    stage = run.plan_file(RECIPE, [f"stages.0.model={model}", *stop]).stages[0]
    assert isinstance(stage, Stage)
    return stage


def record(stage: Stage, seed: int, episodes: int = EPISODES) -> Recorded:
    """Sample, score and prepare one rollout exactly as the stage's first iteration does."""
    loaded = load(stage.model)
    roles = ("policy", "reference", "value")
    cast = assemble(stage.layout, loaded, roles, key(seed, stage.name))
    records = read(stage.prompts, seed)[:episodes]
    prompts = encode_prompts(records, loaded.tokenizer, stage.encoding, loaded.trunk.context // 2).rows
    keys = [key(seed, stage.name, 1, p.key, 0, "sample") for p in prompts]
    engine = LocalEngine(loaded.trunk, loaded.tokenizer, stage.sampling)
    rollouts = engine.generate([p.tokens for p in prompts], keys)
    algorithm = stage.algorithm
    judging = Judging(stage.reward, None, stage.shaping, stage.truncation, loaded.tokenizer)
    with torch.no_grad():
        scored, _ = judging.score(rollouts, prompts, algorithm.memory())  # pyright: ignore[reportAttributeAccessIssue]
        experience = algorithm.prepare(cast, scored)  # pyright: ignore[reportAttributeAccessIssue]
    start = {name: tensor.clone() for name, tensor in cast.state(("policy", "value")).items()}
    return Recorded(stage, cast, experience, start)


@dataclass(frozen=True)
class Trace:
    """What two updates did: the table's figures after each, and the first gradient."""

    after: tuple[Mapping[str, float], ...]
    gradient_N: Tensor


def two_updates(recorded: Recorded, variant: str, rate: float, eps: float) -> Trace:
    """From the start weights, two epochs of one minibatch each; every variant sees the same data in the same order."""
    recorded.cast.restore(recorded.start)
    chosen = recorded.stage.optimiser.model_copy(update={"variant": variant, "eps": eps, "learning_rate": rate})
    stepper = step.Stepper(recorded.cast.parameters(("policy", "value")), chosen, parallel.World())
    after: list[Mapping[str, float]] = []
    gradient_N = torch.zeros(0)
    for update in range(2):
        stepper.step(recorded.experience, recorded.loss, Microbatch(recorded.stage.microbatch_size), rate)
        if update == 0:
            gradient_N = _gradient(stepper)
        after.append(change(recorded))
    return Trace(tuple(after), gradient_N)


def _gradient(stepper: step.Stepper) -> Tensor:
    """The first gradient, out of Adam's memory: after one update the first moment is (1 − β₁) of it."""
    share = 1.0 - stepper.settings.betas[0]
    moments = [t.flatten() / share for name, t in stepper.state().items() if name.startswith("exp_avg/")]
    return torch.cat(moments)


@torch.no_grad()
def change(recorded: Recorded) -> dict[str, float]:
    """The published table's figures: the policy now against the log-probabilities that were recorded."""
    experience = recorded.experience
    parts = experience.split(recorded.stage.microbatch_size or experience.size)
    logp_BT = torch.cat([recorded.cast.logp("policy", part, experience.temperature) for part in parts])
    diff = (logp_BT - experience.logp_BT)[experience.action_BT].double()
    ratio, advantage = diff.exp(), experience.advantage_BT[experience.action_BT]
    clip = recorded.stage.algorithm.cliprange  # pyright: ignore[reportAttributeAccessIssue]
    cut = -advantage * ratio.clamp(1 - clip, 1 + clip) > -advantage * ratio
    return {
        "approxkl": float(0.5 * diff.square().mean()),
        "clipfrac": float(cut.double().mean()),
        "ratio var": float(ratio.var(correction=0)),
        "ratio max": float(ratio.max()),
        "ratio min": float(ratio.min()),
        "logp diff max": float(diff.max()),
        "logp diff min": float(diff.min()),
    }


@dataclass(frozen=True)
class Setting:
    """One comparison. Without a `rate`, TensorFlow's approxkl after two epochs is brought to the published one."""

    title: str
    eps: float
    rate: float | None = None


@dataclass(frozen=True)
class Result:
    """One setting over all seeds; `pairs` holds (TensorFlow, torch) of each seed."""

    setting: Setting
    size: int
    rate: float
    pairs: tuple[tuple[Trace, Trace], ...]

    def mean(self, variant: int, update: int, name: str) -> float:
        """A figure of a variant (0 TensorFlow, 1 torch) after update 0 or 1, averaged over seeds."""
        return fmean(pair[variant].after[update][name] for pair in self.pairs)

    def ratios(self, update: int, name: str) -> list[float]:
        """torch over TensorFlow for each seed; nan where TensorFlow's figure is 0."""
        both = [(torch_.after[update][name], tf.after[update][name]) for tf, torch_ in self.pairs]
        return [a / b if b else math.nan for a, b in both]

    def quantiles(self) -> list[float]:
        """|g|/ε at the 5th, 25th, 50th, 75th and 95th percentile of all entries, averaged over seeds."""
        shares = (0.05, 0.25, 0.5, 0.75, 0.95)
        found = [_quantiles(tf.gradient_N.abs() / self.setting.eps, shares) for tf, _ in self.pairs]
        return [fmean(column) for column in zip(*found, strict=True)]

    @property
    def norm(self) -> float:
        """The first gradient's norm, averaged over seeds."""
        return fmean(float(tf.gradient_N.norm()) for tf, _ in self.pairs)


def _quantiles(x_N: Tensor, shares: Sequence[float]) -> list[float]:
    ordered = x_N.sort().values  # torch.quantile refuses more than 16 million entries
    return [float(ordered[int(share * (len(ordered) - 1))]) for share in shares]


def compare(recordings: Sequence[Recorded], setting: Setting) -> Result:
    """Both Adams on every recorded rollout."""
    rate = setting.rate or rate_for(recordings[0], setting.eps)
    pairs = [
        (two_updates(r, "tensorflow", rate, setting.eps), two_updates(r, "torch", rate, setting.eps))
        for r in recordings
    ]
    return Result(setting, recordings[0].size, rate, tuple(pairs))


def rate_for(recorded: Recorded, eps: float, rounds: int = 2) -> float:
    """The rate at which TensorFlow's Adam has the published approxkl after two epochs; approxkl goes as its square."""
    rate = 5e-5
    for _ in range(rounds):
        seen = two_updates(recorded, "tensorflow", rate, eps).after[1]["approxkl"]
        rate *= math.sqrt(PUBLISHED["approxkl"][0] / seen)
    return float(f"{rate:.2g}")


def scaled_eps(size: int) -> float:
    """The ε that stands to a model's gradient entries as 1e-5 does to GPT-2's, were both gradients equally long.

    A gradient of norm n over P weights has entries of about n/√P, so ε grows by √(P of GPT-2 / P).
    """
    return float(f"{1e-5 * math.sqrt(GPT2 / size):.2g}")


def story_settings(size: int) -> list[Setting]:
    """What is asked of the story model: the published numbers as they are, then ε from there to the scaled one."""
    literal = Setting("story model, published rate and ε", 1e-5, 1e-5)
    between = [Setting("story model", eps) for eps in (1e-5, 3e-5, 1e-4)]
    return [literal, *between, Setting("story model, scaled ε", scaled_eps(size))]


def measure(seeds: Sequence[int] = SEEDS) -> Iterator[Result]:
    """Every setting of the page, as it is ready; the bigger model takes part where it has been trained."""
    story = [record(task(STORY), seed) for seed in seeds]
    yield from (compare(story, setting) for setting in story_settings(story[0].size))
    if BIGGER.is_dir():
        bigger = [record(task(BIGGER), seed) for seed in seeds]
        yield compare(bigger, Setting("bigger model", 1e-5))


def row(found: Result) -> str:
    """One line of the first table."""
    cells = [f"{found.size / 1e6:.2f} M", f"{found.setting.eps:.1e}", f"{found.rate:.1e}", f"{found.norm:.2f}"]
    cells.append(" / ".join(f"{q:.2g}" for q in found.quantiles()))
    for update, name in ((0, "approxkl"), (1, "approxkl"), (1, "clipfrac")):
        cells.append(f"{found.mean(0, update, name):.2e} / {found.mean(1, update, name):.2e}")
        cells.append(_spread(found.ratios(update, name)))
    return f"| {found.setting.title} | {' | '.join(cells)} |"


def _spread(ratios: Sequence[float]) -> str:
    known = [r for r in ratios if not math.isnan(r)]
    if not known:
        return "–"
    return f"**{fmean(known):.1f}×** ({min(known):.1f}–{max(known):.1f})"


HEAD = (
    "| | weights | ε | rate | norm of g | abs(g)/ε at 5, 25, 50, 75, 95 % | approxkl after 1: TF / torch | ratio "
    "| approxkl after 2 | ratio | clipfrac after 2 | ratio |"
)


def table(results: Sequence[Result]) -> str:
    """Markdown: every setting in a line; then the scaled one in full beside the published table."""
    published = "| *published, GPT-2* | 124 M | 1.0e-05 | 1.0e-05 | | | | | 3.72e-04 / 2.37e-03 | **6.4×** "
    published += "| 4.56e-03 / 2.02e-02 | **4.4×** |"
    lines = [HEAD, "|---|" + "---|" * 11, *(row(r) for r in results), published, ""]
    full = next((r for r in results if "scaled" in r.setting.title), results[-1])
    lines += [
        f"| {full.setting.title}, mean of {len(full.pairs)} | TF, after 1 | torch, after 1 | TF, after 2 "
        "| torch, after 2 | published TF | published torch |",
        "|---|" + "---|" * 6,
    ]
    for name, (tf, torch_) in PUBLISHED.items():
        mine = [full.mean(variant, update, name) for update in (0, 1) for variant in (0, 1)]
        lines.append(f"| {name} | {' | '.join(f'{x:.4g}' for x in (*mine, tf, torch_))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print as it comes, write the page."""
    results: list[Result] = []
    for result in measure():
        results.append(result)
        print(row(result), flush=True)
    TABLE.write_text(table(results), encoding="utf-8")


if __name__ == "__main__":
    main()
