"""Hydra: what trains, what is shared, what it costs."""

from __future__ import annotations

import pytest
import torch

from palate.models.hydra import block_stack, branch, freeze_below, frozen_copy
from palate.models.make import Make, make
from palate.models.seats import Layout, take_seats
from palate.models.trunk import Trunk
from palate.settings import PalateError

TOKENS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(5))
REAL = torch.ones_like(TOKENS, dtype=torch.bool)

ABOVE = {  # what runs after the blocks, by family
    "gpt2": {"transformer.ln_f"},
    "llama": {"model.norm", "lm_head"},
    "qwen2": {"model.norm", "lm_head"},
    "qwen3": {"model.norm", "lm_head"},
    "opt": {"model.decoder.final_layer_norm", "model.decoder.project_out"},
    "bloom": {"transformer.ln_f"},
    "gpt_neox": {"gpt_neox.final_layer_norm"},
}
BLOCKS = {
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("family", ABOVE)
def test_the_top_blocks_and_what_follows_them_train(build, family):
    trunk = Trunk(build(family, tie_word_embeddings=family in ("gpt2", "bloom", "opt")), 60)
    freeze_below(trunk, 1)
    blocks = BLOCKS.get(family, "model.layers")
    training = {path.rpartition(".")[0] for path, p in trunk.model.named_parameters() if p.requires_grad}
    outside = {path for path in training if not path.startswith(f"{blocks}.")}
    expected = ABOVE[family] | ({_head_name(trunk)} if family == "gpt_neox" else set())
    if family == "opt":  # a norm that this configuration does not have
        expected = {path for path in expected if _has(trunk, path)}
    assert outside == expected
    assert {path.removeprefix(f"{blocks}.").split(".")[0] for path in training - outside} == {"1"}


def _head_name(trunk: Trunk) -> str:
    head = trunk.model.get_output_embeddings()
    return next(path for path, module in trunk.model.named_modules() if module is head)


def _has(trunk: Trunk, path: str) -> bool:
    return path in dict(trunk.model.named_modules())


@pytest.mark.parametrize("unfrozen", [0, 1, 2, -1])
def test_the_reference_costs_what_trains_and_nothing_more(build, family, unfrozen):
    trunk = Trunk(build(family), 60)
    freeze_below(trunk, unfrozen)
    reference = frozen_copy(trunk)
    mine = {p.data_ptr() for p in trunk.parameters()}
    extra = sum(p.numel() for p in reference.parameters() if p.data_ptr() not in mine)
    assert extra == sum(p.numel() for p in trunk.parameters() if p.requires_grad)
    assert not any(p.requires_grad for p in reference.parameters())
    if unfrozen == 0:
        assert extra == 0
    if unfrozen == -1:
        assert extra == sum(p.numel() for p in trunk.parameters())


@pytest.mark.parametrize("unfrozen", [0, 1, 2, -1])
def test_the_reference_starts_bit_equal_and_never_moves(build, family, unfrozen):
    trunk = Trunk(build(family), 60)
    freeze_below(trunk, unfrozen)
    reference = frozen_copy(trunk)
    with torch.no_grad():  # a pass that learns may round otherwise: there GELU is not part of a product
        start = trunk.logits(trunk.hidden(TOKENS, REAL))
    assert torch.equal(reference.logits(reference.hidden(TOKENS, REAL)), start)
    torch.testing.assert_close(trunk.logits(trunk.hidden(TOKENS, REAL)), start, rtol=1e-5, atol=1e-5)
    trained = [p for p in trunk.parameters() if p.requires_grad]
    if trained:
        optimiser = torch.optim.SGD(trained, lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            trunk.logits(trunk.hidden(TOKENS, REAL))[..., :60].square().mean().backward()
            optimiser.step()
        assert not torch.equal(trunk.logits(trunk.hidden(TOKENS, REAL)), start)
    assert torch.equal(reference.logits(reference.hidden(TOKENS, REAL)), start)


def test_more_blocks_than_there_are_is_refused(build):
    with pytest.raises(PalateError, match=r"unfrozen_blocks: 3 of 2 blocks"):
        freeze_below(Trunk(build("llama"), 60), 3)


@pytest.mark.parametrize(("unfrozen", "blocks"), [(0, 1), (1, 1), (1, 2), (0, -1), (-1, -1)])
def test_a_value_branch_is_a_copy_of_its_blocks_on_what_is_frozen(build, family, unfrozen, blocks):
    trunk = Trunk(build(family), 60)
    freeze_below(trunk, unfrozen)
    value = branch(trunk, blocks)
    # Not to the last bit: the policy's bottom may be higher, and what is below is read row by row.
    torch.testing.assert_close(value.hidden(TOKENS, REAL), trunk.hidden(TOKENS, REAL), atol=1e-5, rtol=1e-6)
    theirs = {id(p) for p in trunk.parameters()}
    own = [p for p in value.parameters() if id(p) not in theirs]
    assert all(p.requires_grad for p in own)
    assert not any(p.requires_grad for p in value.parameters() if id(p) in theirs)
    whole = sum(p.numel() for p in trunk.base.parameters())
    a_block = sum(p.numel() for p in _block(trunk).parameters())
    above = sum(p.numel() for p in own) - (2 if blocks == -1 else blocks) * a_block
    assert (sum(p.numel() for p in own) == whole) if blocks == -1 else (0 <= above < a_block)
    policy = trunk.hidden(TOKENS, REAL).detach()
    optimiser = torch.optim.SGD(own, lr=0.05)
    value.hidden(TOKENS, REAL).square().mean().backward()
    optimiser.step()
    assert torch.equal(trunk.hidden(TOKENS, REAL), policy)
    assert not torch.equal(value.hidden(TOKENS, REAL), policy)
    assert not any(p.grad is not None for p in trunk.parameters())


def _block(trunk: Trunk) -> torch.nn.Module:
    return block_stack(trunk)[-1]


def test_a_value_branch_stands_on_frozen_blocks_alone(build):
    trunk = Trunk(build("llama"), 60)
    freeze_below(trunk, 2)
    with pytest.raises(PalateError, match=r"value_blocks: 1 is less than unfrozen_blocks"):
        branch(trunk, 1)
    with pytest.raises(PalateError, match=r"value_blocks: 3 of 2 blocks"):
        branch(trunk, 3)


@pytest.mark.parametrize(
    ("kind", "roles"),
    [("separate", ("policy", "value")), ("shared", ("policy", "value")), ("hydra", ("policy", "reference"))],
)
def test_blocks_for_a_value_that_would_not_get_them_are_refused(kind: str, roles: tuple[str, ...]) -> None:
    start = make(Make(hidden_size=16, layers=2, heads=2, vocabulary=280, context=32), ["some text"], 1)
    with pytest.raises(PalateError, match=r"layout.value_blocks: only a value .* Set kind: hydra"):
        take_seats(Layout(kind=kind, value_blocks=1), start, roles, 1)  # type: ignore[arg-type]
