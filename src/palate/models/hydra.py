"""Hydra: only the top blocks train, and the reference shares everything below them (trlX).

The reference is a second trunk whose frozen parameters are the very tensors of the first, so that its price is the
top blocks alone. What runs below is the same for every trunk that shares it, so each row is read there once
(`palate.models.bottom`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from palate.models.bottom import Bottom, States
from palate.models.trunk import Trunk
from palate.settings import PalateError


def freeze_below(trunk: Trunk, unfrozen: int) -> None:
    """Let the top `unfrozen` blocks and what runs after them train, and freeze the rest.

    0 freezes everything, −1 nothing. A head tied to the embeddings is below: it stays frozen. Raises PalateError
    when the model has fewer blocks.
    """
    blocks = block_stack(trunk)
    if unfrozen > len(blocks):
        raise PalateError(
            f"layout.unfrozen_blocks: {unfrozen} of {len(blocks)} blocks. Use at most {len(blocks)}, or -1 for all."
        )
    trunk.requires_grad_(unfrozen != 0)
    below = list(trunk.base.modules()) if unfrozen == 0 else []
    if unfrozen > 0:
        below = _run_before(trunk, blocks[len(blocks) - unfrozen])
        for parameter in _own(below):
            parameter.requires_grad_(False)
    trunk.ground = _ground(trunk, len(blocks) - unfrozen if unfrozen >= 0 else 0, below)


def frozen_copy(trunk: Trunk) -> Trunk:
    """The trunk as it is now, for good. Parameters that do not train are shared, the others copied."""
    shared: dict[int, Any] = {id(p): p for p in trunk.parameters() if not p.requires_grad}
    twin = copy.deepcopy(trunk, shared)
    twin.ground = _same_ground(trunk, twin)
    return twin.requires_grad_(False)


def branch(trunk: Trunk, blocks: int) -> Trunk:
    """A trunk without a language-model head whose top `blocks` are a copy that trains; what runs before is shared.

    −1 copies everything. What is shared has to be frozen already. Raises PalateError when the model has fewer blocks.
    """
    stack = block_stack(trunk)
    if blocks > len(stack):
        raise PalateError(
            f"layout.value_blocks: {blocks} of {len(stack)} blocks. Use at most {len(stack)}, or -1 for all."
        )
    modules = _run_before(trunk, stack[len(stack) - blocks]) if blocks > 0 else []
    below = _own(modules)
    if any(p.requires_grad for p in below):
        raise PalateError(
            f"layout.value_blocks: {blocks} is less than unfrozen_blocks, so the value would stand on blocks that the "
            "policy moves. Use as many or more, or -1 for all."
        )
    shared: dict[int, Any] = {id(p): p for p in below}
    twin = Trunk(copy.deepcopy(trunk.base, shared), trunk.vocabulary)
    for parameter in twin.parameters():
        parameter.requires_grad_(id(parameter) not in shared)
    depth, mine = len(stack) - blocks, trunk.ground
    if isinstance(mine, Bottom) and mine.depth == depth:
        twin.ground = _same_ground(trunk, twin)
    elif blocks > 0:
        twin.ground = _ground(twin, depth, _run_before(twin, block_stack(twin)[depth]))
    return twin


def _ground(trunk: Trunk, depth: int, below: list[nn.Module]) -> Bottom | None:
    """The lowest `depth` blocks as a bottom to stand on, and None without any; `below` is what runs down there."""
    return Bottom(block_stack(trunk), depth, below, States()) if depth > 0 else None


def _same_ground(trunk: Trunk, twin: Trunk) -> Bottom | None:
    """The bottom of `trunk` as a copy of it has it: other modules with the same weights, and the same states."""
    mine = trunk.ground
    if not isinstance(mine, Bottom):
        return None
    theirs = {module: path for path, module in trunk.base.named_modules()}
    below = [twin.base.get_submodule(theirs[module]) for module in mine.below]
    return Bottom(block_stack(twin), mine.depth, below, mine.states)


def block_stack(trunk: Trunk) -> nn.ModuleList:
    """The model's stack of blocks: the module list as long as its configuration says."""
    depth = trunk.model.config.get_text_config().num_hidden_layers
    for module in trunk.base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise PalateError(
        f"{trunk.family}: palate cannot find its {depth} blocks. Use another layout than hydra, and strategy replicate."
    )


@torch.no_grad()
def _run_before(trunk: Trunk, block: nn.Module) -> list[nn.Module]:
    """The modules that begin to run before `block` does, found by watching one short pass."""
    below: list[nn.Module] = []
    reached: list[nn.Module] = []

    def watch(module: nn.Module, _: object) -> None:
        if module is block:
            reached.append(module)
        elif not reached:
            below.append(module)

    ground, trunk.ground = trunk.ground, None  # every module has to run
    hooks = [module.register_forward_pre_hook(watch) for module in trunk.base.modules()]
    one = torch.zeros(1, 1, dtype=torch.long, device=trunk.device)
    trunk.hidden(one, torch.ones_like(one, dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    trunk.ground = ground
    return below


def _own(modules: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules, without those of modules inside them."""
    return [parameter for module in modules for parameter in module.parameters(recurse=False)]
