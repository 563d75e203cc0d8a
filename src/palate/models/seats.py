"""Seats: which trunk, adapter and head each role speaks through, by layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import nn

from palate.models.heads import Head, HeadInit, HeadKind, ScalarHead, fresh_action_head, fresh_head
from palate.models.hydra import branch, freeze_below, frozen_copy
from palate.models.load import Loaded
from palate.models.lora import adapter_names, add_adapter
from palate.models.trunk import Trunk
from palate.settings import PalateError, Settings, nearest

ACTION_VALUES: Mapping[str, str] = {"q1": "target_q1", "q2": "target_q2"}
"""Roles that say what each next token is worth, each with the role that follows it without gradient."""
ACTING = (*ACTION_VALUES, *ACTION_VALUES.values())
ROLES = ("policy", "reference", "value", "reward", *ACTING)


@dataclass(frozen=True)
class Seat:
    """Where a role sits: a trunk, the adapter it wears (None: the bare trunk), and a head if it has one."""

    trunk: Trunk
    adapter: str | None
    head: Head | None


class Layout(Settings):
    """Which weights the roles share and which of them train."""

    kind: Literal["separate", "shared", "adapters", "hydra"] = "separate"
    """separate: every role has weights of its own (TL;DR, ColossalChat). shared: policy and value on one trunk, and
    a frozen copy as reference (lm-human-preferences). adapters: one frozen trunk, a LoRA adapter per trained role,
    the reference is the bare trunk. hydra: as shared, but only the top blocks train and are copied (trlX)."""
    unfrozen_blocks: int = Field(default=2, ge=-1)
    """hydra: how many top blocks train (trlX's num_layers_unfrozen); 0: heads only, -1: everything."""
    value_blocks: int = Field(default=0, ge=-1)
    """hydra: how many top blocks the value has a copy of its own of (trlX's num_value_layers_unfrozen), at least as
    many as train; 0: it sits on the policy's, -1: all of them."""
    lora_rank: int = Field(default=16, ge=1)
    """adapters: rank r of the low-rank terms."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """adapters: α; a term is scaled by α / r."""
    lora_targets: str | tuple[str, ...] = "all-linear"
    """adapters: all-linear, or the names of the layers to adapt."""
    value_adapter: Literal["own", "policy"] = "own"
    """adapters: the value role wears an adapter of its own, or the policy's (one forward pass for both)."""
    value_init: Literal["auto", "zero", "random", "reward"] = "auto"
    """The value head's start: zeros, random, or the reward model's head. auto: reward where the value starts from a
    reward model, zero elsewhere."""
    value_head: HeadKind = "linear"
    """One linear layer, or trlX's two with a ReLU; beside values of actions always the latter."""
    reward_init: HeadInit = "reference"
    """A fresh reward head's standard deviation: 1/√(d+1) as the references, 1/(d+1) as Coati, or zero."""


def take_seats(
    layout: Layout, start: Loaded, roles: Sequence[str], key: int, value_start: Loaded | None = None
) -> dict[str, Seat]:
    """A seat for each of `roles`, with `requires_grad` set on exactly what trains.

    Values of actions are heads beside the policy, on its trunk and adapter whatever the layout, and so is the value of
    the state where there are any: one pass gives them all. Heads that `start` brings along go on learning.

    The models given are taken over: the policy (or the reward model) trains in place, and `value_start`, a reward
    model that the value role starts from, becomes the value network. Raises PalateError for combinations that
    cannot be: a value model on a shared trunk, one that sees the future, or one with another tokenizer.
    """
    _check(layout, start, roles, value_start)
    arrange = {"separate": _separate, "shared": _shared, "adapters": _adapters, "hydra": _hydra}[layout.kind]
    beside = _beside_the_policy(roles)
    apart = [role for role in roles if role not in beside]
    places = arrange(layout, start.trunk, apart, key, value_start.trunk if value_start else None)
    heads: dict[str, Callable[[int], Head]] = {
        "value": lambda width: _value_head(layout, width, key, value_start),
        "reward": lambda width: start.head or fresh_head(width, layout.reward_init, key),
    }
    heads |= {role: lambda width, role=role: _acting_head(role, start, layout, width, key) for role in beside}
    seats: dict[str, Seat] = {}
    for role in roles:
        trunk, adapter = places["policy" if role in beside else role]
        head = heads[role](trunk.width) if role in heads else None
        seats[role] = Seat(trunk, adapter, head.to(trunk.device) if head else None)
    return seats


def _beside_the_policy(roles: Sequence[str]) -> list[str]:
    """The values of actions, and then the value of the state too."""
    acting = any(role in ACTING for role in roles)
    return [role for role in roles if role in ACTING or (acting and role == "value")]


def _acting_head(role: str, start: Loaded, layout: Layout, width: int, key: int) -> Head:
    """The head that `start` has for the role, or a fresh one; those without gradient begin as copies."""
    had = start.heads.get(role)
    if role == "value":
        return had or _value_head(layout.model_copy(update={"value_head": "mlp"}), width, key, None)
    if role in ACTION_VALUES:
        return had or fresh_action_head(width, start.trunk.vocabulary, key, role)
    leader = next(q for q, follower in ACTION_VALUES.items() if follower == role)
    return (had or copy.deepcopy(_acting_head(leader, start, layout, width, key))).requires_grad_(False)


_Places = dict[str, tuple[Trunk, str | None]]


def _separate(layout: Layout, trunk: Trunk, roles: Sequence[str], key: int, value: Trunk | None) -> _Places:
    first = next((role for role in roles if role != "reference"), "")

    def place(role: str) -> Trunk:
        if role == first:
            return trunk.requires_grad_(True)
        if role == "reference":
            return copy.deepcopy(trunk).requires_grad_(False)
        if role == "value" and value is not None:
            return value.requires_grad_(True)
        return _mute_copy(trunk)

    return {role: (place(role), None) for role in roles}


def _mute_copy(trunk: Trunk) -> Trunk:
    """The trunk's body with weights of its own and no language-model head, which a scalar role never uses."""
    return _computing_as(trunk, Trunk(copy.deepcopy(trunk.base), trunk.vocabulary).requires_grad_(True))


def _computing_as(trunk: Trunk, twin: Trunk) -> Trunk:
    twin.compute = trunk.compute
    if trunk.recomputes:
        twin.checkpoint_activations()
    return twin


def _shared(layout: Layout, trunk: Trunk, roles: Sequence[str], key: int, value: Trunk | None) -> _Places:
    trunk.requires_grad_(True)
    return {role: (frozen_copy(trunk) if role == "reference" else trunk, None) for role in roles}


def _hydra(layout: Layout, trunk: Trunk, roles: Sequence[str], key: int, value: Trunk | None) -> _Places:
    freeze_below(trunk, layout.unfrozen_blocks)
    found: _Places = {role: (frozen_copy(trunk) if role == "reference" else trunk, None) for role in roles}
    if layout.value_blocks and "value" in roles and "policy" in roles:
        found["value"] = (_computing_as(trunk, branch(trunk, layout.value_blocks)), None)
    return found


def _adapters(layout: Layout, trunk: Trunk, roles: Sequence[str], key: int, value: Trunk | None) -> _Places:
    borrows = layout.value_adapter == "policy" and "policy" in roles
    worn = {role: "policy" if role == "value" and borrows else role for role in roles if role != "reference"}
    for name in dict.fromkeys(worn.values()):
        if name not in adapter_names(trunk.model):
            add_adapter(trunk.model, name, layout.lora_rank, layout.lora_alpha, layout.lora_targets, key)
    return {role: (trunk, worn.get(role)) for role in roles}


def _value_head(layout: Layout, width: int, key: int, value_start: Loaded | None) -> ScalarHead:
    automatic = "reward" if value_start is not None else "zero"
    init = automatic if layout.value_init == "auto" else layout.value_init
    if init != "reward":
        return fresh_head(width, "zero" if init == "zero" else "reference", key, layout.value_head)
    if value_start is None or value_start.head is None:
        raise PalateError("layout.value_init: reward needs a trained reward model to start from. Set value_model.")
    return copy.deepcopy(value_start.head)


def _check(layout: Layout, start: Loaded, roles: Sequence[str], value_start: Loaded | None) -> None:
    for role in roles:
        if role not in ROLES:
            raise PalateError(f"no role is called {role!r}.{nearest(role, ROLES)} Known: {', '.join(ROLES)}.")
    if "policy" in roles and not (start.trunk.causal and start.trunk.speaks):
        raise PalateError(f"{start.source}: it cannot be a policy. Give a causal language model.")
    if any(role in ACTING for role in roles) and "policy" not in roles:
        raise PalateError("values of actions sit beside the policy. Give the cast a policy.")
    if layout.value_blocks and (layout.kind != "hydra" or not {"policy", "value"} <= set(roles)):
        raise PalateError(
            "layout.value_blocks: only a value beside a policy in the hydra layout has blocks of its own. "
            "Set kind: hydra, or leave value_blocks out."
        )
    if value_start is None:
        return
    if layout.kind != "separate":
        raise PalateError(
            f"layout {layout.kind}: policy and value share a trunk, so value_model has no place. "
            "Use layout separate, or leave value_model out."
        )
    if not value_start.trunk.causal:
        raise PalateError(
            f"{value_start.source}: a value model that sees the future would give the answer away. "
            "Start it from a causal reward model."
        )
    if not start.tokenizer.same_words(value_start.tokenizer):
        raise PalateError(
            f"{value_start.source}: its tokenizer is not the policy's, so it cannot read the policy's "
            "tokens. Start the value from a reward model trained on the policy's base."
        )


def trained_parameters(seat: Seat) -> dict[str, nn.Parameter]:
    """The trunk's or adapter's parameters that train when this seat does, by path; the head is not among them."""
    named = seat.trunk.model.named_parameters()
    here = f".adapters.{seat.adapter}." if seat.adapter else None
    return {path: p for path, p in named if p.requires_grad and (here in path if here else ".adapters." not in path)}
