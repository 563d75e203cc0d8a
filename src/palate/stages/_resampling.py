"""Dynamic sampling: groups whose answers are all worth the same teach nothing, so others are drawn in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from palate import credit
from palate.algorithms.protocol import Online, Resamples
from palate.batches import Rows, Scored
from palate.data.encode import PromptRow
from palate.settings import PalateError
from palate.stages._judging import heard

R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class Round:
    """Answers to one batch of prompts, scored, and what was seen on the way. `scored` numbers its prompts from 0."""

    scored: Scored
    prompts: Sequence[PromptRow]
    seen: Mapping[str, float]
    drawn: int = 1
    """Batches of prompts that were drawn for it."""


def filled(ask: Callable[[int], Round], algorithm: Online, pad: int, number: int) -> Round:
    """What `ask(0)` gives, its groups without spread replaced by groups of `ask(1)`, `ask(2)`, … where there are some.

    At most as many further rounds are drawn as the algorithm says. Where they do not suffice, groups without spread
    fill the rest: they push in no direction. Metrics speak of everything that was drawn. Raises PalateError where no
    group of any round had spread.
    """
    rounds = [ask(0)]
    more = algorithm.dynamic_sampling if isinstance(algorithm, Resamples) else 0
    if not more:
        return rounds[0]
    group, wanted = algorithm.group, len(rounds[0].prompts)
    while sum(int(_spread(r.scored, group).sum()) for r in rounds) < wanted and len(rounds) <= more:
        rounds.append(ask(len(rounds)))
    every = _together(rounds, pad)
    spread_G = _spread(every.scored, group)
    if not bool(spread_G.any()):
        raise PalateError(
            f"rollout {number}: in none of {spread_G.numel()} groups, drawn in {len(rounds)} rounds, did the answers "
            "differ in worth, so there is nothing to learn. Look whether the reward is constant; take prompts that "
            "are sometimes answered well and sometimes not, a higher temperature, or more rounds of dynamic_sampling."
        )
    seen = {
        "sampling/groups_dropped": float((~spread_G).float().mean()),
        "sampling/rounds": float(len(rounds)),
    }
    first_G = torch.argsort(~spread_G, stable=True)[:wanted].sort().values
    return replace(_chosen(every, first_G, group), seen={**every.seen, **seen})


def _spread(scored: Scored, group: int) -> Tensor:
    """Whether the answers of each group differ in worth."""
    worth_B = scored.score_B + scored.token_reward_BT.sum(-1)
    return credit.group_spread(worth_B, group)[::group] > credit.NO_SPREAD


def _together(rounds: Sequence[Round], pad: int) -> Round:
    """All rounds as one, prompts not yet numbered anew; means of rewards are over all of them."""
    prompts = [prompt for one in rounds for prompt in one.prompts]
    scored = _stacked([one.scored for one in rounds], pad)
    return Round(scored, prompts, {**rounds[0].seen, **heard(scored.parts)}, len(rounds))


def _chosen(every: Round, chosen_G: Tensor, group: int) -> Round:
    """Some groups alone, their prompts numbered from 0."""
    rows_B = (chosen_G[:, None].cpu() * group + torch.arange(group)).flatten()
    scored = every.scored.select(rows_B)
    owner_B = torch.arange(len(chosen_G), device=scored.score_B.device).repeat_interleave(group)
    scored = replace(scored, rollouts=replace(scored.rollouts, prompt_B=owner_B))
    return replace(every, scored=scored, prompts=[every.prompts[g] for g in chosen_G.tolist()])


def _stacked(parts: Sequence[R], pad: int) -> R:
    """Batches one below the other, padded on the right; numbers and names are the first one's."""
    width = max(
        (x.shape[-1] for part in parts for n, x in vars(part).items() if n.endswith("_BT") and x is not None), default=0
    )

    def put(name: str, values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, Rows):
            return _stacked(cast("Sequence[Rows]", values), pad)
        if isinstance(first, dict):
            return {key: put(key, [value[key] for value in values]) for key in cast("dict[str, Any]", first)}
        if not isinstance(first, Tensor):
            return first
        if name.endswith("_BT"):
            filler = pad if name == "tokens_BT" else 0
            values = [functional.pad(x, (0, width - x.shape[-1]), value=filler) for x in values]
        return torch.cat(list(values))

    named = {f.name: [getattr(part, f.name) for part in parts] for f in fields(parts[0])}
    return replace(parts[0], **{name: put(name, values) for name, values in named.items()})
