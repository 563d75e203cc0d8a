"""Scored rollouts for the methods without a critic: scripted ones in float64, of a table, of a real model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palate.batches import Graded, Loss, Rollouts, Scored, Tokens
from palate.cast import Cast
from tests.laws import test_microbatch_law as law
from tests.stages import tiny_runs

LENGTHS = (3, 7, 1, 5, 7, 2, 4, 6)
LIMIT = 7
START = 2


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Told:
    """A cast that says given log-probabilities; a row's first token is its number in `said[role]` (R×T)."""

    def __init__(self, **said: Tensor) -> None:
        self.said = said
        self.asked: list[str] = []

    def logp(self, role: str, batch: Tokens, temperature: float = 1.0, entropy: bool = False) -> Any:
        self.asked.append(role)
        assert temperature == 0.8, "the temperature of the rollout"
        logp_BT = self.said[role][batch.tokens_BT[:, 0]][:, : batch.tokens_BT.shape[1]]
        return (logp_BT, torch.zeros_like(logp_BT)) if entropy else logp_BT

    def chunked(self, batch: Tokens, speak: Callable[[Tokens], Tensor]) -> Tensor:
        return torch.cat([speak(part).detach() for part in batch.split(64)])


def told(seed: int = 0, apart: float = 0.3) -> tuple[Told, Scored]:
    """Eight answers of 1 to 7 tokens; garbage wherever there is none."""
    rows = len(LENGTHS)
    place, ends = torch.arange(START + LIMIT + 1), torch.tensor(LENGTHS)[:, None] + START
    action_BT = (place >= START) & (place < ends)
    garbage = torch.full(action_BT.shape, -77.0, dtype=torch.float64)

    def said(offset: int) -> Tensor:
        numbers = random(*action_BT.shape, seed=seed, scale=0.5) - 2 + random(*action_BT.shape, seed=offset) * apart
        return torch.where(action_BT, numbers, garbage)

    tokens_BT = torch.zeros(action_BT.shape, dtype=torch.long)
    tokens_BT[:, 0] = torch.arange(rows)
    finished_B = torch.tensor(LENGTHS) < LIMIT
    owner_B = torch.arange(rows) // 4
    rollouts = Rollouts(tokens_BT, place < ends, action_BT, said(seed + 9), finished_B, owner_B, 0, 0.8, LIMIT)
    scored = Scored(rollouts, random(rows, seed=seed + 3), torch.zeros(action_BT.shape), {}, {"kl_coef": 0.2})
    cast = Told(policy=said(seed + 1).requires_grad_(), reference=said(seed + 2))
    return cast, scored


def cells(row: int) -> range:
    """Where the answer of a row lies."""
    return range(START, START + LENGTHS[row])


def gradient(loss: Loss, leaf: Tensor, batch: Graded) -> Tensor:
    """Of the loss as the step divides it, with respect to what the policy said."""
    return torch.autograd.grad(total(loss, batch), leaf)[0]


def total(loss: Loss, batch: Graded) -> Tensor:
    counts = batch.counts()
    return torch.stack([t.total * t.weight / counts[t.per] for t in loss.terms.values()]).sum()


def value(loss: Loss, batch: Graded) -> float:
    """`total` as a number."""
    return float(total(loss, batch).detach())


# --- a policy that is a table: every answer of DEPTH symbols is enumerated -------------------------------------------

DEPTH, SYMBOLS = 3, 3
STATES = sum(SYMBOLS**d for d in range(DEPTH))
ANSWERS = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=DEPTH)))


def states() -> Tensor:
    """Answers × depth: the number of the state in which each symbol is chosen."""
    found = torch.zeros_like(ANSWERS)
    for d in range(1, DEPTH):
        before = sum(SYMBOLS**k for k in range(d))
        code = sum(ANSWERS[:, k] * SYMBOLS ** (d - 1 - k) for k in range(d))
        found[:, d] = before + code
    return found


STATE = states()


def table_logp(logits_SV: Tensor) -> Tensor:
    """log π of each symbol of every answer."""
    return logits_SV.log_softmax(-1)[STATE, ANSWERS]


class Table:
    """A cast whose policy is a table of logits, and whose rows are all answers in order, behind one prompt token."""

    def __init__(self, logits_SV: Tensor, reference_SV: Tensor) -> None:
        self.logits = {"policy": logits_SV, "reference": reference_SV}

    def logp(self, role: str, batch: Tokens, temperature: float = 1.0, entropy: bool = False) -> Any:
        logp_BT = torch.nn.functional.pad(table_logp(self.logits[role]), (1, 0))[batch.tokens_BT[:, 0]]
        return (logp_BT, torch.zeros_like(logp_BT)) if entropy else logp_BT

    def chunked(self, batch: Tokens, speak: Callable[[Tokens], Tensor]) -> Tensor:
        return speak(batch).detach()


def table(seed: int = 4) -> tuple[Table, Tensor, Scored]:
    """(cast, probability of each answer, all answers as one rollout with random scores)."""
    logits = random(STATES, SYMBOLS, seed=seed).requires_grad_()
    cast = Table(logits, random(STATES, SYMBOLS, seed=seed + 1))
    rows = len(ANSWERS)
    tokens_BT = torch.cat([torch.arange(rows)[:, None], ANSWERS], -1)
    action_BT = torch.ones_like(tokens_BT).bool()
    action_BT[:, 0] = False
    logp_BT = torch.nn.functional.pad(table_logp(logits), (1, 0)).detach()
    done_B = torch.ones(rows).bool()
    rollouts = Rollouts(tokens_BT, action_BT | True, action_BT, logp_BT, done_B, done_B.long() * 0, 0, 1.0, DEPTH)
    scored = Scored(rollouts, random(rows, seed=seed + 2), torch.zeros(logp_BT.shape), {}, {"kl_coef": 0.3})
    return cast, logp_BT.sum(-1).exp(), scored


# --- a real model ----------------------------------------------------------------------------------------------------


def real(algorithm: Any, roles: tuple[str, ...] = ("policy", "reference")) -> tuple[Cast, Graded]:
    """A batch of a tiny model whose policy has moved since the answers were drawn, so that ratios are not 1."""
    cast = law.cast_for(roles)
    tokens, real_BT, action = law.rows(5, 14, 9, 4, 11, 7, 8, 10)
    rollouts = Rollouts(
        tokens, real_BT, action, torch.zeros(tokens.shape), real_BT[:, 11] | True, torch.arange(8) // 4, 0, 0.8, 11
    )
    with torch.no_grad():
        rollouts = law.replace(rollouts, logp_BT=cast.logp("policy", rollouts, 0.8) + 0.2 * law_noise(tokens))
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(8, generator=generator)
    scored = Scored(rollouts, scores, torch.zeros(tokens.shape), {}, {"kl_coef": 0.2}, baseline_B=scores.flip(0))
    with torch.no_grad():
        batch = algorithm.prepare(cast, scored)
    return cast, law.without_shown(batch)


def law_noise(tokens: Tensor) -> Tensor:
    return torch.randn(tokens.shape, generator=torch.Generator().manual_seed(8))


def spoiled(batch: Graded) -> Graded:
    """nan in every float cell off the mask, other tokens under the padding, more padding."""
    nan = torch.tensor(float("nan"))
    names = ("logp_BT", "advantage_BT", "ref_logp_BT", "weight_BT")
    changes = {name: torch.where(batch.action_BT, getattr(batch, name), nan) for name in names}
    tokens_BT = torch.where(batch.real_BT, batch.tokens_BT, torch.full_like(batch.tokens_BT, 17))
    return law.widened(law.replace(batch, tokens_BT=tokens_BT, **changes))


def keeps_the_laws(algorithm: Any) -> None:
    """Any micro-batch gives the gradient of the whole batch; garbage and padding change nothing."""
    cast, batch = real(algorithm)
    whole = law.gradients(cast, batch, algorithm, batch.size)
    assert any(g.abs().max() > 0 for g in whole.values())
    for most in (1, 3, *law.BY_TOKENS):
        assert law.distance(whole, law.gradients(cast, batch, algorithm, most)) < 1e-6
    assert law.distance(whole, law.gradients(cast, spoiled(batch), algorithm, 3)) < 1e-6


def stage(folder: Any, algorithm: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """An online stage on a tiny model, with prompts and model made in the folder."""
    model = folder / "model"
    if not model.exists():
        tiny_runs.save_model(model)
        tiny_runs.write_prompts(folder / "prompts.jsonl")
    given = tiny_runs.ppo(model, str(folder / "prompts.jsonl"), **{"total_episodes": 32, "sample_steps": 9, **changes})
    return {**given, "algorithm": algorithm}
