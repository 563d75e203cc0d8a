"""Memory: parameters counted by hand, shared tensors once, and activations of a pass that can be worked out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from palate.cast import Layout, assemble
from palate.check import memory
from palate.check.found import RecipeFound
from palate.models.load import load
from palate.models.make import Make, make

D, INSIDE, BLOCKS = 16, 64, 1


def _parameters(vocabulary: int) -> int:
    """A Llama with tied embeddings: its table; four projections, three gated matrices, two norms a block; one norm."""
    return vocabulary * D + BLOCKS * (4 * D * D + 3 * D * INSIDE + 2 * D) + D


def test_every_weight_once(model: Path) -> None:
    loaded = load(model)
    expected = _parameters(loaded.tokenizer.size)
    cast = assemble(Layout(), loaded, ("policy",), 1)
    parameters, held = memory.of_cast(cast, ("policy",))
    assert parameters == {"trained": expected, "frozen": 0}
    assert held["trained weights"] == held["gradients"] == 4 * expected
    assert held["Adam moments"] == 8 * expected


def test_roles_of_a_separate_layout_have_weights_of_their_own(model: Path) -> None:
    loaded = load(model)
    expected = _parameters(loaded.tokenizer.size)
    parameters, _ = memory.of_cast(assemble(Layout(), loaded, ("policy", "reference", "value"), 1), ("policy", "value"))
    assert parameters["trained"] == 2 * expected + D + 1  # the value network shares nothing but has no second head
    assert parameters["frozen"] == expected + 2  # the reference, and the value head's gain and bias


def test_adapters_leave_one_trunk(model: Path) -> None:
    loaded = load(model)
    expected = _parameters(loaded.tokenizer.size)
    layout = Layout(kind="adapters", lora_rank=2)
    parameters, held = memory.of_cast(assemble(layout, loaded, ("policy", "reference"), 1), ("policy",))
    rank = 2 * (4 * (D + D) + 3 * (D + INSIDE))
    assert parameters == {"trained": rank, "frozen": expected}
    assert held["Adam moments"] == 8 * rank


def test_a_hydra_pays_for_its_top_block_alone() -> None:
    made = make(Make(hidden_size=16, layers=3, heads=2, vocabulary=300, context=32), ["one two"], 1)
    whole = sum(p.numel() for p in made.trunk.parameters())
    block = 4 * D * D + 3 * D * INSIDE + 2 * D
    cast = assemble(Layout(kind="hydra", unfrozen_blocks=1), made, ("policy", "reference"), 1)
    parameters, _ = memory.of_cast(cast, ("policy",))
    assert parameters["trained"] == block + D
    assert parameters["trained"] + parameters["frozen"] == whole + block + D


def test_activations_of_a_pass_worked_out_by_hand() -> None:
    first, second = nn.Linear(8, 32), nn.Linear(32, 4)
    given = torch.zeros(5, 8)
    weights = [*first.parameters(), *second.parameters()]
    kept = memory.activations(lambda: second(torch.tanh(first(given))).sum(), weights)
    assert kept == 4 * (5 * 8 + 5 * 32)  # the input of the first layer, and tanh's output, which the second reads too


def test_keys_and_values_of_one_token(model: Path) -> None:
    assert memory.cache_bytes(load(model).trunk) == 2 * BLOCKS * D * 4


def test_the_peak_is_a_step_or_the_writing_never_both() -> None:
    held = {"trained weights": 10, "gradients": 10, "Adam moments": 20, "activations": 5, "keys and values": 40}
    assert memory.memory({}, held, "").peak == 30 + 40
    assert memory.memory({}, {**held, "keys and values": 1}, "").peak == 30 + 15


@pytest.mark.parametrize("number", range(4))
def test_every_stage_of_a_recipe_has_its_memory(seen: RecipeFound, number: int) -> None:
    found = seen.stages[number].seen.memory
    assert found is not None
    assert found.peak >= max(found.bytes.values())
    assert seen.peak >= found.peak
    assert ("activations" in found.bytes) == (number < 3)
