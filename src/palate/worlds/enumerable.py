"""The enumerable world: 4 prompts, 1,555 answers each, and a best policy that is known exactly.

KL-regularised reinforcement learning has a closed answer, π* ∝ π_ref·exp(r/β). Here all answers can be listed, so
every method can be scored against it, and where a biased method ends can be computed too. The reference is a
random GPT-2 of 26,176 parameters which `write_reference` leaves as a model folder.

Symbols are the letters a to f and the end token; a prompt is one of a, b, c, d; an answer ends with the end token
or is cut at four symbols. Train on its data with `encoding: {max_length: 5}`: the end token that would follow a
cut answer is then cut off as well, as the world wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from palate.randomness import generator
from palate.records import Demonstration, Prompt, Rated, Record, Text, Unpaired, preference
from palate.settings import PalateError, Settings, nearest, parse
from palate.worlds.small import gpt2, law, tree
from palate.worlds.small.gradient import FixedPoint, Problem, Rows, Side, fixed_point

__all__ = [
    "LETTERS",
    "SHAPES",
    "SIZES",
    "Draws",
    "FixedPoint",
    "Problem",
    "Rows",
    "Score",
    "Side",
    "World",
    "fixed_point",
    "records",
    "score",
    "spelled",
    "symbols",
    "world",
    "write_reference",
]

LETTERS = "abcdef"
SIZES = gpt2.Sizes(vocabulary=tree.SYMBOLS, positions=8, width=32, layers=2, heads=2)
NATS_PER_TOKEN = 1.5
"""Entropy to which the reference's head is scaled; uniform choice would be ln 7 = 1.95."""
SCALES = (0.5, 0.8, 1.2, 1.5)
"""Spread of the reward per prompt, before their mean square is made 1: unequal, so that a bias of scale shows."""
NOISE = 0.1
"""Reward that no network could read from the symbols, against the rest's 1."""


@dataclass(frozen=True)
class Score:
    """A policy against the exact optimum at one β; means over the prompts."""

    share: float
    """(J(π) − J(π_ref)) / (J* − J(π_ref)); equals 1 − β·KL(π‖π*) / (J* − J(π_ref))."""
    value: float
    """J(π) = E[r] − β·KL(π‖π_ref)."""
    reward: float
    kl_from_reference: float
    """KL(π‖π_ref), nats per answer."""
    kl_to_best: float
    """KL(π‖π*): the same number as `share` in other words."""
    kl_from_best: float
    """KL(π*‖π): the independent one, large where π has lost answers that π* gives."""
    entropy: float


@dataclass(frozen=True)
class World:
    """One world; all numbers float64, answers in the order of `tree.ANSWERS`."""

    number: int
    weights: Mapping[str, Tensor]
    """The reference's weights as transformers calls them, float32."""
    reference_PSV: Tensor
    """Next-token log-probabilities of π_ref in every state."""
    reward_PK: Tensor
    """Mean 0 per prompt under π_ref; variance 1 over all prompts."""

    @cached_property
    def reference_PK(self) -> Tensor:
        """log π_ref(y|x)."""
        return tree.answer_logp(self.reference_PSV)

    @property
    def problem(self) -> Problem:
        """What expected gradients need."""
        return Problem(self.reference_PSV, self.reward_PK)

    def best(self, beta: float) -> Tensor:
        """log π*(y|x), P×K."""
        return law.tilted(self.reference_PK, self.reward_PK, beta)

    def best_value(self, beta: float) -> Tensor:
        """J* per prompt."""
        return law.best_value(self.reference_PK, self.reward_PK, beta)

    def value(self, logp_PK: Tensor, beta: float) -> Tensor:
        """J(π) per prompt; differentiable in finite log-probabilities."""
        return law.value(logp_PK, self.reference_PK, self.reward_PK, beta)

    def share(self, logp_PK: Tensor, beta: float) -> float:
        """The part of what is to be gained that a policy has gained: 0 for π_ref, 1 for π*; may be negative."""
        start = self.value(self.reference_PK, beta).mean()
        return float((self.value(logp_PK, beta).mean() - start) / (self.best_value(beta).mean() - start))

    def best_of(self, n: int) -> Tensor:
        """log-law of the best of n answers of π_ref."""
        return law.best_of(self.reference_PK, self.reward_PK, n)

    def surest(self) -> Tensor:
        """log-law of always giving the answer with the highest reward."""
        return law.surest(self.reward_PK)

    def score(self, logp_PK: Tensor, beta: float) -> Score:
        """Everything about one policy; `logp_PK` from `tree.answer_logp(tree.table(next_logp))` for a network."""
        best_PK = self.best(beta)
        return Score(
            share=self.share(logp_PK, beta),
            value=float(self.value(logp_PK, beta).mean()),
            reward=float(law.expectation(logp_PK, self.reward_PK).mean()),
            kl_from_reference=float(law.kl(logp_PK, self.reference_PK).mean()),
            kl_to_best=float(law.kl(logp_PK, best_PK).mean()),
            kl_from_best=float(law.kl(best_PK, logp_PK).mean()),
            entropy=float(law.entropy(logp_PK).mean()),
        )

    def score_network(self, next_logp: Callable[[Tensor], Tensor], beta: float) -> Score:
        """As `score`, of a network that gives next-token log-probabilities R×T×V for 864×4 ids: one pass."""
        with torch.no_grad():
            return self.score(tree.answer_logp(tree.table(next_logp)), beta)


@lru_cache(maxsize=8)
def world(number: int = 1) -> World:
    """World `number`: the same weights and rewards everywhere."""
    random = torch.Generator().manual_seed(1000 + number)
    weights = gpt2.draw(SIZES, random, embedding=0.5, matrix=None, head=SIZES.width**-0.5, gain=0.7)
    weights["lm_head.weight"] = weights["lm_head.weight"] * _sharpness(weights)
    reference_PSV = _table(weights)
    return World(number, weights, reference_PSV, _rewards(tree.answer_logp(reference_PSV), random))


def _table(weights: Mapping[str, Tensor]) -> Tensor:
    double = {name: weight.double() for name, weight in weights.items()}
    return tree.table(lambda tokens_RT: gpt2.next_logp(double, SIZES, tokens_RT))


def _sharpness(weights: Mapping[str, Tensor]) -> float:
    """What to scale the head by, found by bisection, so that π_ref has `NATS_PER_TOKEN` of entropy, mean of prompts.

    Scaled logits differ from scaled log-probabilities by a constant per state, so one pass serves every try.
    """
    blunt_PSV = _table(weights)
    low, high = 1e-3, 50.0
    for _ in range(50):
        middle = math.sqrt(low * high)
        logp_PK = tree.answer_logp((blunt_PSV * middle).log_softmax(-1))
        length_P = law.expectation(logp_PK, tree.LENGTH_K.double().expand_as(logp_PK))
        dull = float((law.entropy(logp_PK) / length_P).mean()) > NATS_PER_TOKEN
        low, high = (middle, high) if dull else (low, middle)
    return math.sqrt(low * high)


def _rewards(reference_PK: Tensor, random: torch.Generator) -> Tensor:
    """Likes of prompt and symbol, of neighbouring symbols, and noise; squashed, so that no answer is all of π*."""
    symbol_PV, pair_VV = (torch.randn(rows, tree.SYMBOLS, generator=random) for rows in (tree.PROMPTS, tree.SYMBOLS))
    noise_PK = torch.randn(reference_PK.shape, generator=random).double()
    prompts = torch.arange(tree.PROMPTS)
    first_PK1 = prompts[:, None, None].expand(-1, len(tree.ANSWERS), 1)
    answer_PKT = tree.ANSWER_KT.expand(tree.PROMPTS, -1, -1)
    before_PKT = torch.cat([first_PK1, answer_PKT[..., :-1]], -1)
    liked_PKT = symbol_PV.double()[prompts[:, None, None], answer_PKT] + pair_VV.double()[before_PKT, answer_PKT]
    raw_PK = _standard((liked_PKT * tree.REAL_KT).sum(-1), reference_PK)
    squashed_PK = _standard(2 * torch.tanh((raw_PK + NOISE * noise_PK) / 2), reference_PK)
    scale_P = torch.tensor(SCALES, dtype=torch.float64)
    return squashed_PK * (scale_P / scale_P.square().mean().sqrt())[:, None]


def _standard(value_PK: Tensor, logp_PK: Tensor) -> Tensor:
    """Mean 0 and variance 1 per prompt under a law."""
    centred_PK = value_PK - law.expectation(logp_PK, value_PK)[:, None]
    return centred_PK / law.expectation(logp_PK, centred_PK.square()).sqrt()[:, None]


def write_reference(folder: Path | str, number: int = 1) -> Path:
    """The reference of world `number` as a model folder: config.json, model.safetensors, a tokenizer of 7 symbols."""
    return gpt2.write(Path(folder), world(number).weights, SIZES, LETTERS)


def spelled(answer: Sequence[int]) -> str:
    """Symbols as letters; the end token is not spelled. Four letters are an answer that was cut."""
    return "".join(LETTERS[symbol] for symbol in answer if symbol != tree.END)


def symbols(completion: str) -> tuple[int, ...]:
    """A completion's symbols, the end symbol put where it is shorter than four. PalateError for other letters."""
    if len(completion) > tree.LONGEST or set(completion) - set(LETTERS):
        raise PalateError(
            f"world enumerable: {completion[:20]!r} is no answer. Give at most 4 of the letters {LETTERS}."
        )
    content = tuple(LETTERS.index(letter) for letter in completion)
    return content if len(content) == tree.LONGEST else (*content, tree.END)


def score(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The reward as a reward function. A column `world` names the world of each row; world 1 without it."""
    numbers = columns.get("world") or [1] * len(prompts)
    return [
        float(world(int(number)).reward_PK[_prompt_number(prompt), tree.NUMBER_OF[symbols(completion)]])
        for prompt, completion, number in zip(prompts, completions, numbers, strict=True)
    ]


def _prompt_number(prompt: str) -> int:
    if len(prompt) != 1 or prompt not in LETTERS[: tree.PROMPTS]:
        raise PalateError(f"world enumerable: {prompt[:20]!r} is no prompt. Give one of {', '.join(LETTERS[:4])}.")
    return LETTERS.index(prompt)


class Draws(Settings):
    """What the records of this world are drawn from."""

    world: int = Field(default=1, ge=0)
    """Which world: another number has another reference and another reward."""
    temperature: float = Field(default=1.0, gt=0)
    """Noise of the labels: y is preferred to y′ with probability sigmoid((r(y) − r(y′)) / temperature)."""
    soft: bool = False
    """Pairs only: say how likely the choice was, for losses that weigh both orders by it (exact labels)."""
    best_of: int = Field(default=1, ge=1)
    """Demonstrations only: each is the best of this many answers of the reference."""


def records(shape: str, rows: int, seed: int, **options: object) -> list[Record]:
    """`rows` records of one shape, a pure function of the arguments; `options` are the fields of `Draws`.

    Answers are drawn from the exact law of the reference. The first n rows of a longer call equal a call for n.
    Prompts come in turn and all else by chance, both with repetition, for the laws of sampling are the point. Each
    draw is a group of its own, so that rows held out follow the same law.
    """
    draws = parse(Draws, options, "world enumerable")
    if shape not in SHAPES:
        raise PalateError(
            f"world enumerable: there is no shape {shape!r}.{nearest(shape, SHAPES)} Known: {', '.join(SHAPES)}."
        )
    sampler = _Sampler(draws)
    stream = (record for row in count() for record in SHAPES[shape](sampler, row, seed))
    return list(islice(stream, max(rows, 0)))


class _Sampler:
    """Answers of the reference by inverting its distribution function."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.world = world(draws.world)
        self.columns = {"world": draws.world}
        self._cumulative_PK: NDArray[np.float64] = self.world.reference_PK.exp().cumsum(-1).numpy()

    def answer(self, prompt: int, rng: np.random.Generator) -> int:
        """The place of one answer."""
        cumulative_K = self._cumulative_PK[prompt]
        return int(np.searchsorted(cumulative_K, rng.random() * cumulative_K[-1], side="right"))

    def pair(self, row: int, seed: int) -> tuple[int, int, int, float]:
        """(prompt, chosen, rejected, probability of that choice).

        Equal answers teach nothing, so they are drawn again; DPO-like losses have no gradient there anyway.
        """
        rng = generator("enumerable", "pairs", seed, row)
        prompt = int(rng.integers(tree.PROMPTS))
        first = second = self.answer(prompt, rng)
        while second == first:
            second = self.answer(prompt, rng)
        wins = self._wins(prompt, first, second)
        if rng.random() < wins:
            return prompt, first, second, wins
        return prompt, second, first, 1.0 - wins

    def _wins(self, prompt: int, first: int, second: int) -> float:
        reward_K = self.world.reward_PK[prompt]
        return float(torch.sigmoid((reward_K[first] - reward_K[second]) / self.draws.temperature))


def _text(answer: int) -> Text:
    return spelled(tree.ANSWERS[answer])


def _symbols_of(prompt: int, *answers: int) -> dict[str, Any]:
    """Answers as tokens: the one that is the end token alone has no letter and is an answer like any other."""
    return {"prompt_tokens": [prompt], "completion_tokens": [list(tree.ANSWERS[answer]) for answer in answers]}


def _prompts(sampler: _Sampler, row: int, seed: int) -> Iterator[Record]:
    yield Prompt(LETTERS[row % tree.PROMPTS], sampler.columns)


def _demonstrations(sampler: _Sampler, row: int, seed: int) -> Iterator[Record]:
    rng = generator("enumerable", "demonstrations", seed, row)
    prompt = int(rng.integers(tree.PROMPTS))
    drawn = [sampler.answer(prompt, rng) for _ in range(sampler.draws.best_of)]
    best = max(drawn, key=lambda answer: float(sampler.world.reward_PK[prompt, answer]))
    yield Demonstration(LETTERS[prompt], sampler.columns, f"row {row}", completion=_text(best))


def _pairs(sampler: _Sampler, row: int, seed: int) -> Iterator[Record]:
    prompt, chosen, rejected, probability = sampler.pair(row, seed)
    columns = {**sampler.columns, **_symbols_of(prompt, chosen, rejected), "probability": probability}
    yield preference(
        LETTERS[prompt],
        _text(chosen),
        _text(rejected),
        probability=probability if sampler.draws.soft else None,
        columns=columns,
        group=f"row {row}",
    )


def _labelled(sampler: _Sampler, row: int, seed: int) -> Iterator[Record]:
    """The two answers of a pair, one with a thumb up and one with a thumb down."""
    prompt, chosen, rejected, _ = sampler.pair(row, seed)
    for answer, label in ((chosen, True), (rejected, False)):
        columns = {**sampler.columns, **_symbols_of(prompt, answer)}
        yield Unpaired(LETTERS[prompt], columns, f"row {row}", completion=_text(answer), label=label)


def _rated(sampler: _Sampler, row: int, seed: int) -> Iterator[Record]:
    rng = generator("enumerable", "rated", seed, row)
    prompt = int(rng.integers(tree.PROMPTS))
    answer = sampler.answer(prompt, rng)
    rating = float(sampler.world.reward_PK[prompt, answer])
    columns = {**sampler.columns, **_symbols_of(prompt, answer)}
    yield Rated(LETTERS[prompt], columns, f"row {row}", completion=_text(answer), rating=rating)


SHAPES: dict[str, Callable[[_Sampler, int, int], Iterator[Record]]] = {
    "prompts": _prompts,
    "demonstrations": _demonstrations,
    "pairs": _pairs,
    "labelled": _labelled,
    "thumbs": _labelled,
    "rated": _rated,
}
"""Every shape of data the world gives; `thumbs` is `labelled` as the tasting room calls it."""
