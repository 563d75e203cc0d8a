"""Every answer of a small alphabet as one table, and what turns a law of next tokens into a law of answers.

Legend: P prompts, K answers, T tokens of an answer, S states (beginnings of answers that go on), V symbols. An
answer ends with the end symbol or is cut at four tokens; a cut answer has no end symbol, and no factor for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

SYMBOLS, END, PROMPTS, LONGEST = 7, 6, 4, 4
STATES = sum(END**length for length in range(LONGEST))
"""Beginnings of 0 to 3 content symbols: 259 per prompt."""


def _frozen(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def _answers() -> list[tuple[int, ...]]:
    """The 1,555 answers: those that end, by length and then in order, and then those that are cut."""
    ended = [(*a, END) for n in range(LONGEST) for a in itertools.product(range(END), repeat=n)]
    return [*ended, *itertools.product(range(END), repeat=LONGEST)]


ANSWERS = tuple(_answers())
"""Every answer as symbols, the end symbol included where there is one."""

NUMBER_OF = {answer: number for number, answer in enumerate(ANSWERS)}
"""Which place an answer has in every `_PK` and `_K` table."""


def state_of(beginning: tuple[int, ...]) -> int:
    """The place of a beginning in every `_PS` table: shorter ones first, then in order."""
    before = sum(END**length for length in range(len(beginning)))
    return before + sum(symbol * END**power for power, symbol in enumerate(reversed(beginning)))


ANSWER_KT = _frozen([[*a, *[END] * (LONGEST - len(a))] for a in ANSWERS])
"""Symbols of every answer; places after the end hold the end symbol and are no part of it."""

LENGTH_K = torch.tensor([len(a) for a in ANSWERS])
REAL_KT = torch.arange(LONGEST) < LENGTH_K[:, None]
STATE_KT = _frozen([[state_of(a[:t]) if t < len(a) else 0 for t in range(LONGEST)] for a in ANSWERS])
"""The state in which each symbol was chosen; 0 where there is no symbol."""

ROW_RT = _frozen([[x, *a] for x in range(PROMPTS) for a in itertools.product(range(END), repeat=LONGEST - 1)])
"""864 rows (prompt, three symbols) whose places hold every state of every prompt: one pass scores a network."""

_BEGINNINGS = [a for n in range(LONGEST) for a in itertools.product(range(END), repeat=n)]
_PLACE_S = torch.tensor([len(a) for a in _BEGINNINGS])
_CONTENT = END ** (LONGEST - 1)
_FIRST_S = torch.tensor([sum(s * END ** (LONGEST - 2 - i) for i, s in enumerate(a)) for a in _BEGINNINGS])
_PARENT_S = torch.tensor([state_of(a[:-1]) for a in _BEGINNINGS])
_BY_S = torch.tensor([a[-1] if a else 0 for a in _BEGINNINGS])


def table(next_logp: Callable[[Tensor], Tensor]) -> Tensor:
    """Next-token log-probabilities of a policy in every state, P×S×V, float64, with gradient if it has one.

    `next_logp` gets `ROW_RT` (864×4 ids, no padding) and gives R×T×V: entry t is the law of the token after place t.
    """
    logp_RTV = next_logp(ROW_RT).double()
    row_PS = torch.arange(PROMPTS)[:, None] * _CONTENT + _FIRST_S
    return logp_RTV[row_PS, _PLACE_S.expand_as(row_PS), :SYMBOLS].log_softmax(-1)


def token_logp(logp_PSV: Tensor) -> Tensor:
    """Log-probability of every symbol of every answer, P×K×T; 0 after its end."""
    return torch.where(REAL_KT, logp_PSV[:, STATE_KT, ANSWER_KT], 0.0)


def answer_logp(logp_PSV: Tensor) -> Tensor:
    """Log-probability of every answer, P×K; its exponentials sum to 1 per prompt."""
    return token_logp(logp_PSV).sum(-1)


def table_of(logp_PK: Tensor) -> Tensor:
    """The one table of next-token laws that gives this law of answers, P×S×V; uniform where no answer passes."""
    mass_PK = (logp_PK - logp_PK.amax(-1, keepdim=True)).exp()
    cell_KT = STATE_KT * SYMBOLS + ANSWER_KT
    mass_PC = torch.zeros(len(logp_PK), STATES * SYMBOLS, dtype=logp_PK.dtype)
    spread_PKT = torch.where(REAL_KT, mass_PK[..., None], 0.0)
    mass_PC.index_add_(1, cell_KT.flatten(), spread_PKT.flatten(1))
    mass_PSV = mass_PC.view(-1, STATES, SYMBOLS)
    passed_PS1 = mass_PSV.sum(-1, keepdim=True)
    return torch.where(passed_PS1 > 0, mass_PSV / passed_PS1, 1 / SYMBOLS).log()


def reach_logp(logp_PSV: Tensor) -> Tensor:
    """Log-probability of coming to each state, P×S."""
    reach_PS = torch.zeros_like(logp_PSV[:, :1, 0])
    for length in range(1, LONGEST):
        state_N = torch.arange(STATES)[length == _PLACE_S]
        step_PN = logp_PSV[:, _PARENT_S[state_N], _BY_S[state_N]]
        reach_PS = torch.cat([reach_PS, reach_PS[:, _PARENT_S[state_N]] + step_PN], -1)
    return reach_PS


@lru_cache
def children() -> tuple[Tensor, Tensor]:
    """(next_SV, answer_SV): the state or the answer that each symbol leads to, −1 where it leads to the other."""
    state_SV = torch.full((STATES, SYMBOLS), -1)
    answer_SV = torch.full((STATES, SYMBOLS), -1)
    for state, beginning in enumerate(_BEGINNINGS):
        for symbol in range(SYMBOLS):
            more = (*beginning, symbol)
            if more in NUMBER_OF:
                answer_SV[state, symbol] = NUMBER_OF[more]
            else:
                state_SV[state, symbol] = state_of(more)
    return state_SV, answer_SV


def levels_from_below() -> list[Tensor]:
    """The states by their length, the longest beginnings first: the order of a sweep up the tree."""
    return [torch.arange(STATES)[length == _PLACE_S] for length in reversed(range(LONGEST))]
