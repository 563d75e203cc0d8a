"""The likeliest answer to each prompt, scored: what an algorithm may measure sampled answers against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from palate.algorithms.protocol import Online, ReadsGreedy
from palate.batches import Scored
from palate.data.encode import PromptRow
from palate.engines.engine import Engine
from palate.stages._judging import Judging


def with_baseline(
    scored: Scored, prompts: Sequence[PromptRow], algorithm: Online, engine: Engine, judging: Judging
) -> tuple[Scored, dict[str, float]]:
    """The same with the greedy answers' scores as `baseline_B`, and a metric, where the algorithm asks for them."""
    if not (isinstance(algorithm, ReadsGreedy) and algorithm.greedy_baseline):
        return scored, {}
    asked, owner_B = [p.tokens for p in prompts], scored.rollouts.prompt_B
    rollouts = engine.generate(asked, [0] * len(asked), version=scored.rollouts.version, greedy=True)
    best, _ = judging.score(rollouts, prompts, scored.memory, watched=False)
    worth_P = best.score_B + best.token_reward_BT.sum(-1)
    return replace(scored, baseline_B=worth_P[owner_B]), {"objective/greedy_scores": float(worth_P.mean())}
