"""The library's own pages on every answer of the enumerable world at once: expected gradients without noise.

A `Table` stands where a cast stands: its policy is one logit per state and symbol, in float64. `prepare` and `loss` of
an algorithm run on all 4 × 1,555 answers as one batch, and each row is made as heavy as its answer is likely where its
gradient leaves the page, so nothing of the algorithm has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from palate.algorithms._pair_losses import FORMULAS
from palate.algorithms._pairs import Answers
from palate.batches import Examples, Labelled, Pairs, Rollouts, Scored, Tokens
from palate.worlds.enumerable import Problem, Side
from palate.worlds.small import tree

CONTEXT = 8

Mishearing = Callable[[Tensor, Tensor, Tokens], Tensor]


class _Weighed(torch.autograd.Function):
    """The numbers as they are; of their gradient each row takes its weight."""

    @staticmethod
    def forward(ctx: Any, x_BT: Tensor, weight_B: Tensor) -> Tensor:
        ctx.save_for_backward(weight_B)
        return x_BT.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight_B,) = ctx.saved_tensors
        return gradients[0] * weight_B[:, None], None


class Table:
    """A cast of tables. `said` holds next-token log-probabilities P×S×V by role, `value_PS` values of states."""

    def __init__(self, problem: Problem, policy_PSV: Tensor, value_PS: Tensor | None = None) -> None:
        """`policy_PSV` are logits; values are 0 unless given."""
        self.leaf = policy_PSV.detach().clone().requires_grad_()
        self.said = {"policy": self.leaf.log_softmax(-1), "reference": problem.reference_PSV}
        self.value_PS = torch.zeros_like(problem.reference_PSV[..., 0]) if value_PS is None else value_PS
        self.weight_B: Tensor | None = None
        """How heavy each row is where a gradient flows; none before `prepare` is done."""
        self.mishear: Mishearing | None = None
        """(policy_BT, reference_BT) → what the reference is heard to say; none hears it right."""

    def seat(self, role: str) -> Any:
        """What KTO asks of a seat: how long a row may be."""
        return SimpleNamespace(trunk=SimpleNamespace(context=CONTEXT))

    def chunked(self, batch: Tokens, speak: Callable[[Tokens], Tensor]) -> Tensor:
        """The whole batch in one piece, without gradient."""
        return speak(batch).detach()

    def logp(self, role: str, batch: Tokens, temperature: float = 1.0, entropy: bool = False) -> Any:
        """As `Cast.logp`."""
        every_BTV = self._every(role, batch)
        logp_BT = every_BTV.gather(-1, batch.tokens_BT[..., None])[..., 0].masked_fill(~batch.action_BT, 0.0)
        if role == "reference" and self.mishear is not None:
            own_BT = self.logp("policy", batch).detach()
            logp_BT = self.mishear(own_BT, logp_BT, batch).masked_fill(~batch.action_BT, 0.0)
        entropy_BT = -(every_BTV.exp() * every_BTV).sum(-1).masked_fill(~batch.action_BT, 0.0)
        return (self._weighed(logp_BT), self._weighed(entropy_BT)) if entropy else self._weighed(logp_BT)

    def recital(self, role: str, batch: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """As `Cast.recital`."""
        logp_BT, entropy_BT = self.logp(role, batch, entropy=True)
        likeliest_BT = self._every(role, batch).argmax(-1) == batch.tokens_BT
        return logp_BT, entropy_BT.detach(), likeliest_BT & batch.action_BT

    def values(self, role: str, batch: Tokens, head_only: bool = False) -> Tensor:
        """As `Cast.values`."""
        prompt_B1, state_BT = _states(batch)
        value_BT = self.value_PS[prompt_B1, state_BT]
        return value_BT.masked_fill(torch.arange(value_BT.shape[1]) == 0, 0.0)

    def logp_and_values(self, policy: str, value: str, batch: Tokens, temperature: float = 1.0) -> Any:
        """As `Cast.logp_and_values`; values take no gradient here."""
        return *self.logp(policy, batch, temperature, entropy=True), self.values(value, batch)

    def together(self, one: str, other: str) -> bool:
        """Policy and value are tables of their own."""
        return False

    def _every(self, role: str, batch: Tokens) -> Tensor:
        prompt_B1, state_BT = _states(batch)
        return self.said[role][prompt_B1, state_BT]

    def _weighed(self, x_BT: Tensor) -> Tensor:
        return x_BT if self.weight_B is None or not x_BT.requires_grad else _Weighed.apply(x_BT, self.weight_B)


def _states(batch: Tokens) -> tuple[Tensor, Tensor]:
    """(prompt_B1, state_BT): the state before each token; state 0 for the prompt itself and past the end."""
    tokens_BT = batch.tokens_BT
    state_BT = torch.zeros_like(tokens_BT)
    for t in range(2, tokens_BT.shape[1]):
        state_BT[:, t] = tree.END * state_BT[:, t - 1] + 1 + tokens_BT[:, t - 1]
    gone_BT = ~batch.real_BT
    return tokens_BT[:, :1], state_BT.masked_fill(gone_BT, 0).clamp(max=tree.STATES - 1)


# rows ------------------------------------------------------------------------------------------------


def every_answer(prompts: int = tree.PROMPTS) -> Tokens:
    """All answers to all prompts as token rows, the prompt's symbol first."""
    prompt_B1 = torch.arange(prompts).repeat_interleave(len(tree.ANSWERS))[:, None]
    answer_BT, said_BT = tree.ANSWER_KT.repeat(prompts, 1), tree.REAL_KT.repeat(prompts, 1)
    yes_B1 = torch.ones_like(prompt_B1, dtype=torch.bool)
    return Tokens(
        torch.cat([prompt_B1, answer_BT], -1), torch.cat([yes_B1, said_BT], -1), torch.cat([~yes_B1, said_BT], -1)
    )


# online -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Online:
    """An online algorithm and, for sabotage, what may be changed around its page."""

    algorithm: Any
    score: Callable[[Tensor, Rollouts, Tensor], Tensor] | None = None
    """(score_B, rollouts, weight_B) → the scores that `prepare` sees."""
    mishear: Mishearing | None = None
    said: Callable[[Rollouts], Tensor] | None = None
    """Which tokens `prepare` takes for the policy's own."""
    batch: Callable[[Any], Any] | None = None
    """What `prepare` returned → what `loss` sees."""
    endless_group: bool = False
    """Advantages against the mean and spread of all answers, in the place of those of a group."""


def price(algorithm: Any) -> float:
    """What a nat of KL costs inside the number by which siblings are compared."""
    if algorithm.kind == "rloo":
        return algorithm.kl_coef
    return algorithm.beta if algorithm.kind == "grpo" and algorithm.kl_in == "reward" else 0.0


def expected(case: Online, problem: Problem, policy_PSV: Tensor, value_PS: Tensor | None = None) -> Tensor:
    """The expected gradient P×S×V of one step on answers drawn by the policy.

    A method of groups is given pairs: each answer beside a sibling of no weight that is worth what answers are worth
    on average. Its advantage is linear in the sibling's worth unless it is scaled by the group's spread, so this is
    the mean over all groups; that of k answers is the same, with (k − 1)/k in the place of 1/2 where an answer
    counts in its own baseline. What is divided by a number of tokens is divided by the mean length.
    """
    table = Table(problem, policy_PSV, value_PS)
    table.mishear = case.mishear
    scored, weight_B = _scored(case, table, problem)
    with torch.no_grad():
        batch = case.algorithm.prepare(table, scored)
    if case.endless_group:
        batch = _endless(case.algorithm, table, scored, weight_B, batch)
    return followed(case.algorithm, table, batch if case.batch is None else case.batch(batch), weight_B)


def followed(algorithm: Any, table: Table, batch: Any, weight_B: Tensor, weight_R: Tensor | None = None) -> Tensor:
    """The gradient of a page's loss on a prepared batch, rows weighed; `weight_R` where a batch row is two answers."""
    table.weight_B = weight_B if weight_R is None else weight_R
    found = algorithm.loss(table, batch)
    units = {"rows": float(weight_B.sum())}
    for name in ("tokens", "chosen_tokens"):
        if any(term.per == name for term in found.terms.values()):
            said_BT = batch.action_BT if name == "tokens" else batch.action_BKT[:, 0]
            units[name] = float((weight_B * said_BT.sum(-1)).sum())
    terms = [t.total * t.weight / units[t.per] for t in found.terms.values() if t.total.requires_grad]
    return torch.autograd.grad(torch.stack(terms).sum(), table.leaf)[0]


def _scored(case: Online, table: Table, problem: Problem) -> tuple[Scored, Tensor]:
    """All answers with their scores, siblings of no weight beside them where the method compares siblings."""
    tokens = every_answer()
    rows = problem.rows(table.leaf)
    finished_B = (rows.answer_BT == tree.END).any(-1)
    logp_BT = table.logp("policy", tokens).detach()
    rollouts = Rollouts(**vars(tokens), logp_BT=logp_BT, finished_B=finished_B, prompt_B=rows.prompt_B, version=0)
    rollouts = replace(rollouts, limit=tree.LONGEST)
    score_B = rows.reward_B if case.score is None else case.score(rows.reward_B, rollouts, rows.weight_B)
    if case.said is not None:
        rollouts = replace(rollouts, action_BT=case.said(rollouts))
    weight_B, group = rows.weight_B, case.algorithm.group
    if group > 1:
        if group != 2:
            raise ValueError("a method of groups is measured with num_generations 2")
        paid_B = price(case.algorithm) * (table.logp("policy", rollouts) - table.logp("reference", rollouts)).sum(-1)
        sibling_B = (rows.mean(score_B - paid_B) + paid_B).detach()
        score_B = torch.stack([score_B, sibling_B], -1).flatten()
        weight_B = torch.stack([weight_B, torch.zeros_like(weight_B)], -1).flatten()
        rollouts = rollouts.select(torch.arange(len(rows.weight_B)).repeat_interleave(group))
    baseline_B = torch.tensor([0.3, -0.2, 0.7, -0.4], dtype=torch.float64)[rollouts.prompt_B]
    nothing_BT = torch.zeros_like(rollouts.logp_BT)
    return Scored(rollouts, score_B, nothing_BT, {}, case.algorithm.memory(), baseline_B), weight_B


def _endless(algorithm: Any, table: Table, scored: Scored, weight_B: Tensor, batch: Any) -> Any:
    """The batch with (worth − mean of all answers) / spread of all answers, whatever group `prepare` compared."""
    rollouts = scored.rollouts
    own = torch.arange(0, rollouts.size, algorithm.group)
    paid_B = price(algorithm) * (table.logp("policy", rollouts) - table.logp("reference", rollouts)).sum(-1).detach()
    worth_PK = (scored.score_B - paid_B)[own].view(tree.PROMPTS, -1)
    share_PK = weight_B[own].view(tree.PROMPTS, -1) * tree.PROMPTS
    centred_PK = worth_PK - (share_PK * worth_PK).sum(-1, keepdim=True)
    variance_P1 = (share_PK * centred_PK.square()).sum(-1, keepdim=True)
    if algorithm.scale_rewards == "batch":
        variance_P1 = variance_P1.mean()
    scale = 1.0 if algorithm.scale_rewards == "none" else (variance_P1 + 1e-8).rsqrt()
    advantage_B = (centred_PK * scale).flatten().repeat_interleave(algorithm.group)
    return replace(batch, advantage_BT=advantage_B[:, None] * batch.action_BT)


# offline ----------------------------------------------------------------------------------------------


def expected_of_pairs(
    algorithm: Any,
    problem: Problem,
    policy_PSV: Tensor,
    soft: bool = True,
    shifts: tuple[int, ...] = (1, 7, 311, 900),
    change: Callable[[Pairs], Pairs] | None = None,
) -> Tensor:
    """The expected gradient of a page on pairs, P×S×V: every answer beside those `shifts` places further on.

    A part of all pairs, each as heavy as the reference draws it. With `soft` a pair states how likely its label is;
    else it comes twice, once in either order, as often as that order would be drawn. `change` is for sabotage: what
    `prepare` is given.
    """
    table = Table(problem, policy_PSV)
    tokens, rows = every_answer(), problem.rows(problem.reference_PSV)
    count, place = len(tree.ANSWERS), torch.arange(len(tree.ANSWERS))
    start_P1 = (torch.arange(tree.PROMPTS) * count)[:, None]
    first_N = (start_P1 + place).flatten().repeat(len(shifts))
    second_N = torch.cat([(start_P1 + (place + shift) % count).flatten() for shift in shifts])
    chance_N = rows.weight_B[first_N] * rows.weight_B[second_N]
    wins_N = torch.sigmoid(rows.reward_B[first_N] - rows.reward_B[second_N])
    if not soft:
        first_N, second_N = torch.cat([first_N, second_N]), torch.cat([second_N, first_N])
        chance_N = torch.cat([chance_N * wins_N, chance_N * (1 - wins_N)])
        wins_N = torch.ones_like(chance_N)
    index_NK = torch.stack([first_N, second_N], -1)
    fields_NKT = (x[index_NK] for x in (tokens.tokens_BT, tokens.real_BT, tokens.action_BT))
    nowhere_NKT = torch.zeros(*index_NK.shape, tree.LONGEST + 1, dtype=torch.bool)
    raw = Pairs(*fields_NKT, wins_N, torch.zeros_like(wins_N), nowhere_NKT)
    with torch.no_grad():
        batch = algorithm.prepare(table, raw if change is None else change(raw))
    weight_N = chance_N / chance_N.sum()
    return followed(algorithm, table, batch, weight_N, weight_N.repeat_interleave(2))


def expected_of_duels(algorithm: Any, problem: Problem, policy_PSV: Tensor, shift: int = 7) -> Tensor:
    """The expected gradient of a page on pairs of the policy's own answers, P×S×V: each beside that `shift` further."""
    table, tokens, rows = Table(problem, policy_PSV), every_answer(), problem.rows(policy_PSV)
    count, place = len(tree.ANSWERS), torch.arange(len(tree.ANSWERS))
    start_P1 = (torch.arange(tree.PROMPTS) * count)[:, None]
    index_NK = torch.stack([(start_P1 + place).flatten(), (start_P1 + (place + shift) % count).flatten()], -1)
    picked, index_B = tokens.select(index_NK.flatten()), index_NK.flatten()
    logp_BT = table.logp("policy", picked).detach()
    ended_B = torch.ones_like(index_B, dtype=torch.bool)
    rollouts = Rollouts(**vars(picked), logp_BT=logp_BT, finished_B=ended_B, prompt_B=index_B // count, version=0)
    scored = Scored(rollouts, rows.reward_B[index_B], torch.zeros_like(logp_BT), {}, algorithm.memory())
    with torch.no_grad():
        batch = algorithm.prepare(table, scored)
    weight_N = rows.weight_B[index_NK].prod(-1)
    weight_N = weight_N / weight_N.sum()
    return followed(algorithm, table, batch, weight_N, weight_N.repeat_interleave(2))


def of_formula(algorithm: Any) -> Callable[[Side, Side], Tensor]:
    """The algorithm's own loss per pair, for `Problem.expected_of_pairs`: all pairs of all answers."""

    def loss(chosen: Side, rejected: Side) -> Tensor:
        def read(side: Side, x: Tensor) -> Tensor:
            return (x / side.length if algorithm.averages(algorithm.loss_type) else x).flatten()

        said = Answers(
            read(chosen, chosen.logp),
            read(rejected, rejected.logp),
            read(chosen, chosen.reference),
            read(rejected, rejected.reference),
        )
        return FORMULAS[algorithm.loss_type](algorithm, said, None).view(chosen.logp.shape)  # pyright: ignore

    return loss


def expected_of_thumbs(algorithm: Any, problem: Problem, policy_PSV: Tensor, kl: float = 0.0) -> Tensor:
    """The expected gradient of a page on single answers with thumbs, P×S×V, both thumbs as likely as pairs give them.

    `kl` stands for what `prepare` finds of the batch. For KTO and answers of the reference that is 0: the mean of
    log π − log π_ref over them is −KL(π_ref‖π), which is clamped.
    """
    table = Table(problem, policy_PSV)
    tokens, rows = every_answer(), problem.rows(problem.reference_PSV)
    drawn_PK = tree.answer_logp(problem.reference_PSV).exp()
    reward_PK = problem.reward_PK
    wins_PK = (torch.sigmoid(reward_PK[:, :, None] - reward_PK[:, None, :]) @ drawn_PK[..., None])[..., 0]
    both = torch.arange(tokens.size).repeat(2)
    up_B = torch.arange(2 * tokens.size) < tokens.size
    weight_B = torch.cat([rows.weight_B * wins_PK.flatten(), rows.weight_B * (1 - wins_PK.flatten())])
    picked = tokens.select(both)
    batch = Labelled(**vars(picked), desirable_B=up_B, ref_logp_BT=table.logp("reference", picked), kl=kl)
    return followed(algorithm, table, batch, weight_B)


def expected_of_demonstrations(algorithm: Any, problem: Problem, policy_PSV: Tensor, law_PK: Tensor) -> Tensor:
    """The expected gradient of a page on demonstrations whose log-law is `law_PK`, P×S×V."""
    table, tokens = Table(problem, policy_PSV), every_answer()
    return followed(algorithm, table, Examples(**vars(tokens)), law_PK.exp().flatten() / tree.PROMPTS)
