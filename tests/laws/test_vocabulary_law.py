"""Vocabulary law: no algorithm ever holds one number for each token of a batch and each word of the vocabulary.

Watched where it happens: every tensor that is alive while a loss and its gradient are computed, at V = 50,257.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from palate import settings
from palate.batches import Comparisons, Examples, Labelled, Pairs, Rollouts, Rows, Scored, Trajectories
from palate.cast import Cast, Seat
from palate.cutting import Microbatch
from palate.models import words
from palate.models.heads import fresh_action_head, fresh_head
from palate.models.trunk import Trunk
from palate.parallel import World
from palate.step import Optimiser, Stepper

V, ROWS, WIDTH, PROMPT = 50_257, 8, 100, 4
FULL = 4 * V * ROWS * (WIDTH - PROMPT)
"""Bytes of one number for each answer token and word: 154 MB."""


class Watch(TorchDispatchMode):
    """The largest tensor that is made, and the most bytes that are alive at once, each storage counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._known:
            return
        self._known.add(place)
        self.largest, self.alive = max(self.largest, size), self.alive + size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.alive -= size


def _tokens(rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(3, V, (rows, WIDTH), generator=torch.Generator().manual_seed(1))
    real = torch.ones(rows, WIDTH, dtype=torch.bool)
    action = real.clone()
    action[:, :PROMPT] = False
    return tokens, real, action


def _trunk() -> Trunk:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=V, n_positions=128, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    return Trunk(GPT2LMHeadModel(config), V)


def _cast(roles: Iterator[str] | tuple[str, ...]) -> Cast:
    own, seats = _trunk(), dict[str, Seat]()
    for role in roles:
        if role in ("value", "reward"):
            seats[role] = Seat(own, None, fresh_head(8, "reference", 1))
        elif "q" in role:
            seats[role] = Seat(own, None, fresh_action_head(8, V, 1, role))
        else:
            seats[role] = Seat(own if role == "policy" else _trunk().requires_grad_(False), None, None)
    return Cast(seats)


def _pairs() -> Pairs:
    parts = (x.unflatten(0, (ROWS // 2, 2)) for x in _tokens())
    some = torch.ones(ROWS // 2)
    tokens, real, action = parts
    return Pairs(tokens, real, action, some, 0 * some, action.clone())


def _scored() -> Scored:
    tokens, real, action = _tokens()
    rollouts = Rollouts(
        tokens, real, action, torch.full(tokens.shape, -10.8), torch.ones(ROWS).bool(), torch.arange(ROWS) // 4, 0
    )
    return Scored(rollouts, torch.arange(float(ROWS)), torch.zeros(tokens.shape), {}, {"kl_coef": 0.1})


def _rankings() -> Comparisons:
    pairs, half = _pairs(), ROWS // 2
    ranks = torch.tensor([[0, 1]] * half)
    return Comparisons(
        pairs.tokens_BKT, pairs.real_BKT, torch.ones(half, 2).bool(), ranks, torch.zeros(half), pairs.action_BKT
    )


def _rated() -> Trajectories:
    return Trajectories(*_tokens(), torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(2)))


BATCHES: dict[str, Callable[[], Rows]] = {
    "demonstrations": lambda: Examples(*_tokens()),
    "pairs": _pairs,
    "corrections": _pairs,
    "labels": lambda: Labelled(*_tokens(), torch.arange(ROWS) % 2 == 0),
    "rankings": _rankings,
    "returns": _rated,
    "": _scored,
}
CASES: dict[str, dict[str, Any]] = {
    name: {} for name in settings.kinds("algorithms") if not name.startswith("_") and name != "protocol"
}
CASES |= {
    "reward": {"language_loss_coefficient": 0.1},
    "rloo": {"num_generations": 4},
    "grpo": {"num_generations": 4},
    "ppo": {"entropy_coef": 0.01},
}


def _watched(name: str) -> Watch:
    algorithm: Any = settings.build("algorithms", {"kind": name, **CASES[name]}, "algorithm")
    roles = dict.fromkeys((*algorithm.trains, *algorithm.needs, *algorithm.moves))
    cast = _cast(tuple(roles))
    raw = BATCHES[getattr(algorithm, "reads", "")]()
    if isinstance(raw, Scored):
        raw = replace(raw, memory={**raw.memory, **algorithm.memory()}, baseline_B=torch.zeros(ROWS))
    stepper = Stepper(cast.parameters(algorithm.trains), Optimiser(learning_rate=0.0), World())
    watch = Watch()
    with watch:
        with torch.no_grad():
            batch = algorithm.prepare(cast, raw)
        stepper.step(batch, lambda part: algorithm.loss(cast, part), Microbatch(rows=ROWS), 0.0)
    return watch


@pytest.mark.parametrize("name", CASES)
def test_nothing_as_large_as_all_logits_is_ever_there(name: str) -> None:
    watch = _watched(name)
    assert 4 * V * 8 <= watch.largest < FULL / 3, "not even a block of logits, or all of them"
    # blocks, those that each head keeps for its backward pass, and the embedding with its optimiser
    more_heads = 2 if name == "ilql" else 0
    assert watch.peak < 1.3 * FULL + 4 * words.KEEP * more_heads


def test_the_watch_sees_a_loss_that_holds_them_all() -> None:
    trunk, (tokens, real, _) = _trunk(), _tokens()
    watch = Watch()
    with watch:
        trunk.logits(trunk.hidden(tokens, real)).log_softmax(-1)[..., 0].sum().backward()
    assert watch.largest >= FULL
    assert watch.peak > 2 * FULL
