"""The reward models behind a reward: opened once, and the token that each is read at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.check.examples import spelling
from palate.models.load import Loaded, load
from palate.rewards.model import tokens_for
from palate.rewards.reward import Answers, Scorer
from palate.settings import PalateError


def reward_models(*rewards: Scorer | None) -> list[tuple[str, Loaded]]:
    """(label, model) of every reward model among rewards, those of mixtures included."""
    found: list[tuple[str, Loaded]] = []
    for reward in rewards:
        model: Any = getattr(reward, "model", None)
        if isinstance(model, str):
            label = str(getattr(reward, "label", model))
            found.append((label, load(model, "reward", getattr(reward, "loading", None))))
        found += reward_models(*getattr(reward, "rewards", ()))
    return found


def same_ids(judge: Loaded, policy: Loaded) -> bool:
    """Whether the reward model reads the sampled ids themselves."""
    return judge.tokenizer.same_words(policy.tokenizer) and judge.tokenizer.eos == policy.tokenizer.eos


def rule(label: str, judge: Loaded, policy: Loaded) -> str:
    """How a reward model reads an answer, in a sentence."""
    how = "the sampled ids" if same_ids(judge, policy) else "prompt and answer encoded anew by its own tokenizer"
    return f"reward {label} ({judge.trunk.family}) reads {how}, and is read at their last real token"


def fits(label: str, judge: Loaded, policy: Loaded, longest: int, answer: int) -> None:
    """Raises PalateError when the longest prompt and answer would not fit the reward model."""
    if same_ids(judge, policy) and longest + answer > judge.trunk.context:
        raise PalateError(
            f"reward {label}: the longest prompt has {longest:,} tokens and an answer up to {answer:,}; the reward "
            f"model's context is {judge.trunk.context:,}. Shorten prompts or answers, or take another reward model."
        )


def read_at(judges: Sequence[tuple[str, Loaded]], answers: Answers) -> list[str]:
    """For the first answer: which token each reward model is read at."""
    said: list[str] = []
    for label, judge in judges:
        tokens = tokens_for(judge, answers)
        last = int(tokens.real_BT[0].nonzero()[-1])
        count = int(tokens.real_BT[0].sum())
        spelled = spelling(judge.tokenizer, int(tokens.tokens_BT[0, last]))
        said.append(f"reward {label} is read at its token {count} of {count}: {spelled}")
    return said
