"""Micro-batch law: any cut gives the gradient of the whole batch. Padding law: padding and garbage change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from palate.algorithms import ppo, reward, sft
from palate.batches import Comparisons, Examples, Experience, Loss, Rollouts, Rows, Scored, Term, without_shown
from palate.cast import Cast, Layout, assemble
from palate.cutting import Microbatch
from palate.models.make import Make, make
from palate.parallel import World
from palate.step import Optimiser, Stepper

SIZES = Make(hidden_size=32, layers=2, heads=2, vocabulary=300, context=64)
TEXTS = ["The soup is warm and salty.", "A sour cake, they said."]


def cast_for(roles: tuple[str, ...], layout: str = "separate") -> Cast:
    torch.manual_seed(0)
    settings = Layout(kind=layout, value_init="random", lora_rank=4)  # pyright: ignore
    cast = assemble(settings, make(SIZES, TEXTS, 3), roles, 7)
    with torch.no_grad():  # adapters start at zero, where half of their gradient vanishes
        for name, parameter in cast.parameters([r for r in roles if r != "reference"]).items():
            if "lora" in name or "adapters" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return cast


def rows(*lengths: int, start: int = 3, width: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    place, ends = torch.arange(width), torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 255, (len(lengths), width), generator=generator)
    return tokens, place < ends, (place >= start) & (place < ends)


def sft_case(layout: str) -> tuple[Cast, Rows, object]:
    return cast_for(("policy",), layout), Examples(*rows(5, 14, 9, 4, 11, 7)), sft.Algorithm()


def reward_case(layout: str) -> tuple[Cast, Rows, object]:
    tokens, real, action = rows(5, 14, 9, 4, 11, 7, 8, 10, 6, 12, 5, 9)
    present = torch.tensor([[True] * 3, [True, True, False], [True] * 3, [True, False, True]])
    ranks = torch.tensor([[0, 1, 2], [1, 0, 0], [0, 0, 1], [1, 0, 0]])
    shape = (4, 3, -1)
    batch = Comparisons(
        tokens.reshape(shape), real.reshape(shape), present, ranks, torch.zeros(4), action.reshape(shape)
    )
    algorithm = reward.Algorithm(center_rewards_coefficient=0.01, language_loss_coefficient=0.1)
    return cast_for(("reward",), layout), batch, algorithm


def ppo_case(layout: str) -> tuple[Cast, Rows, object]:
    cast = cast_for(("policy", "reference", "value"), layout)
    tokens, real, action = rows(5, 14, 9, 4, 11, 7)
    generator = torch.Generator().manual_seed(6)
    noise = torch.randn(tokens.shape, generator=generator)
    rollouts = Rollouts(
        tokens, real, action, -2 + 0.1 * noise, torch.ones(6).bool(), torch.arange(6), version=0, temperature=0.8
    )
    scored = Scored(rollouts, torch.randn(6, generator=generator), torch.zeros(tokens.shape), {}, {"kl_coef": 0.1})
    algorithm = ppo.Algorithm(old_logprobs="sampled", score_position="after", cliprange=0.05)
    with torch.no_grad():
        experience = algorithm.prepare(cast, scored)
    return cast, without_shown(experience), algorithm


def gradients(cast: Cast, batch: Rows, algorithm: object, microbatch: int | Microbatch) -> dict[str, Tensor]:
    """What `Stepper.step` hands to the optimiser, caught before weights move."""
    parameters = cast.parameters(algorithm.trains)  # type: ignore[attr-defined]
    stepper = Stepper(parameters, Optimiser(learning_rate=0.0), World())
    caught: dict[str, Tensor] = {}

    def catch(*_: object) -> None:
        caught.update({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})

    stepper.adam.register_step_pre_hook(catch)
    most = Microbatch(rows=microbatch) if isinstance(microbatch, int) else microbatch
    stepper.step(batch, lambda part: algorithm.loss(cast, part), most, 0.0)  # type: ignore[attr-defined]
    return caught


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative distance of two gradients as one long vector each."""
    assert a.keys() == b.keys()
    gap = torch.cat([(a[n] - b[n]).flatten() for n in a]).norm()
    return float(gap / torch.cat([a[n].flatten() for n in a]).norm())


BY_TOKENS = (Microbatch(tokens=1), Microbatch(tokens=25), Microbatch(rows=3, tokens=60))
"""Limits that cut the ragged rows of these tests, and those of pairs and rankings, unevenly."""
CASES = [(sft_case, layout) for layout in ("separate", "adapters")]
CASES += [(reward_case, layout) for layout in ("separate", "adapters")]
CASES += [(ppo_case, layout) for layout in ("separate", "shared", "adapters", "hydra")]
NAMES = [f"{case.__name__}-{layout}" for case, layout in CASES]


@pytest.mark.parametrize(("case", "layout"), CASES, ids=NAMES)
def test_any_micro_batch_gives_the_gradient_of_the_whole_batch(case, layout) -> None:
    cast, batch, algorithm = case(layout)
    whole = gradients(cast, batch, algorithm, batch.size)
    assert all(torch.isfinite(g).all() for g in whole.values())
    assert any(g.abs().max() > 0 for g in whole.values())
    for most in (1, 2, 5, *BY_TOKENS):
        assert distance(whole, gradients(cast, batch, algorithm, most)) < 1e-6


@pytest.mark.parametrize(("case", "layout"), CASES, ids=NAMES)
def test_garbage_in_masked_cells_and_more_padding_change_nothing(case, layout) -> None:
    cast, batch, algorithm = case(layout)
    whole = gradients(cast, batch, algorithm, batch.size)
    assert distance(whole, gradients(cast, widened(spoiled(batch)), algorithm, batch.size)) < 1e-6


def spoiled(batch: Rows) -> Rows:
    """Other tokens under the padding, and nan in every float cell that no mask covers."""
    name = "BKT" if isinstance(batch, Comparisons) else "BT"
    real, tokens = getattr(batch, f"real_{name}"), getattr(batch, f"tokens_{name}")
    changes = {f"tokens_{name}": torch.where(real, tokens, torch.full_like(tokens, 17))}
    if isinstance(batch, Experience):
        nan = torch.tensor(float("nan"))
        for field, mask in (("logp_BT", batch.action_BT), ("advantage_BT", batch.action_BT)):
            changes[field] = torch.where(mask, getattr(batch, field), nan)
        for field in ("value_BT", "returns_BT"):
            changes[field] = torch.where(batch.value_mask_BT, getattr(batch, field), nan)
    return replace(batch, **changes)


def widened(batch: Rows, columns: int = 5) -> Rows:
    changes = {}
    for field in vars(batch):
        value = getattr(batch, field)
        if field.endswith(("_BT", "_BKT")) and isinstance(value, Tensor):
            changes[field] = torch.cat([value, value.new_zeros(*value.shape[:-1], columns)], -1)
    return replace(batch, **changes)


@pytest.mark.parametrize(("case", "layout"), CASES[:5:2], ids=NAMES[:5:2])
def test_the_order_of_rows_does_not_matter(case, layout) -> None:
    """The step lays rows of like beginnings together; what belongs to a row goes with it."""
    cast, batch, algorithm = case(layout)
    whole = gradients(cast, batch, algorithm, 2)
    turned = batch.select(torch.arange(batch.size).flip(0))
    assert distance(whole, gradients(cast, turned, algorithm, Microbatch(tokens=25))) < 1e-6


def test_the_law_rejects_a_mean_of_micro_batch_means() -> None:
    """The bug the law is there for: each micro-batch divided by its own token count."""
    cast, batch, _ = sft_case("separate")

    class Averaging(sft.Algorithm):
        def loss(self, cast: Cast, batch: Examples) -> Loss:
            right = super().loss(cast, batch)
            share = batch.counts()["tokens"] / len(str(batch.size))
            return replace(right, terms={"loss": Term(right.terms["loss"].total / share, "rows")})

    wrong = Averaging()
    for most in (2, BY_TOKENS[1]):
        assert distance(gradients(cast, batch, wrong, batch.size), gradients(cast, batch, wrong, most)) > 1e-3
