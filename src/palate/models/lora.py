"""Low-rank adapters that are worn, not installed: which adapter speaks is part of the graph, never a mode.

Hu et al. 2021, "LoRA", eq. 3: h = W x + (α / r) · B A x, with W frozen. Several adapters live side by side on one
trunk; the context variable that `wear` sets decides which of them is heard.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from palate import randomness
from palate.parallel import whole
from palate.settings import PalateError, nearest

ALL_LINEAR = "all-linear"
PLACE = "adapters"
"""The name under which an adapted layer keeps its adapters."""

_worn: ContextVar[str | None] = ContextVar("palate_worn_adapter", default=None)


@contextmanager
def wear(name: str | None) -> Generator[None]:
    """Within this context every adapted layer adds the low-rank term of `name`; None is the bare trunk."""
    token = _worn.set(name)
    try:
        yield
    finally:
        _worn.reset(token)


def worn() -> str | None:
    """The adapter that is worn here."""
    return _worn.get()


class LowRank(nn.Module):
    """The term (α / r) · B A x of one adapter on one layer: A is r × in, B is out × r, both float32."""

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """… × in → … × out, in float32; under autocast in its format."""
        return functional.linear(functional.linear(x.float(), self.a), self.b) * self.scale


def _speak(layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Forward hook of an adapted layer: add the worn adapter's term, if this layer has it."""
    name = _worn.get()
    here = cast(nn.ModuleDict, getattr(layer, PLACE))
    if name is None or name not in here:
        return output
    return output + here[name](given[0]).to(output.dtype)


def add_adapter(
    model: PreTrainedModel, name: str, rank: int, alpha: float, targets: str | tuple[str, ...], key: int
) -> None:
    """Give `model` an adapter and freeze everything that is not one.

    `targets` is "all-linear" (every linear layer but the language-model head) or layer names as PEFT takes them
    (`q_proj`, or a longer tail of the path). A starts uniform in ±1/√in from the counter key, B at zero, as in
    PEFT: a new adapter changes nothing. Raises PalateError for unknown targets and names already taken.
    """
    if name in adapter_names(model):
        raise PalateError(f"adapter {name!r}: the model already has one of that name. Choose another.")
    freeze_trunk(model)
    for path in target_paths(model, targets):
        low_rank = attach(model, path, name, rank, alpha / rank)
        bound = low_rank.a.shape[1] ** -0.5
        draw = randomness.generator(key, "adapter", name, path).uniform(-bound, bound, tuple(low_rank.a.shape))
        low_rank.a.data.copy_(torch.from_numpy(draw))


def freeze_trunk(model: nn.Module) -> None:
    """Nothing but adapters trains."""
    for path, parameter in model.named_parameters():
        if f".{PLACE}." not in path:
            parameter.requires_grad_(False)


def attach(model: nn.Module, path: str, name: str, rank: int, scale: float) -> LowRank:
    """An all-zero adapter on the layer at `path`, on the layer's own device."""
    layer = model.get_submodule(path)
    outputs, inputs = weight_shape(layer)
    if not hasattr(layer, PLACE):
        layer.add_module(PLACE, nn.ModuleDict())
        layer.register_forward_hook(_speak)
    low_rank = LowRank(inputs, outputs, rank, scale).to(next(layer.parameters()).device)
    cast(nn.ModuleDict, getattr(layer, PLACE))[name] = low_rank
    return low_rank


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer; GPT-2's Conv1D stores its weight the other way round."""
    first, second = cast(Tensor, layer.weight).shape
    return (second, first) if isinstance(layer, Conv1D) else (first, second)


def target_paths(model: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    """The linear layers that `targets` names, in the model's order."""
    head = model.get_output_embeddings()
    linear = [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    if targets == ALL_LINEAR:
        return linear
    wanted = (targets,) if isinstance(targets, str) else targets
    for target in wanted:
        if not any(_named(path, target) for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise PalateError(
                f"adapter targets: no linear layer is called {target!r}.{nearest(target, known)} "
                f"Known: {', '.join(known)}, or {ALL_LINEAR}."
            )
    return [path for path in linear if any(_named(path, target) for target in wanted)]


def _named(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def adapted(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, LowRank]]:
    """(path, layer, term) of every layer that has the adapter."""
    for path, layer in model.named_modules():
        here = cast("nn.ModuleDict | None", getattr(layer, PLACE, None))
        if isinstance(here, nn.ModuleDict) and name in here:
            yield path, layer, cast(LowRank, here[name])


def adapter_names(model: nn.Module) -> set[str]:
    """The adapters that the model has."""
    places = (getattr(layer, PLACE, None) for layer in model.modules())
    return {name for place in places if isinstance(place, nn.ModuleDict) for name in place}


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's own parameters by their path in the model."""
    inside = f".{PLACE}.{name}."
    return {path: p for path, p in model.named_parameters() if inside in path}


def bare_state(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The model's weights under transformers' own names, with `adapter` folded in and no adapter beside them.

    Sharded weights come whole, so every rank has to ask. Tied names hold one tensor.
    """
    once: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for path, tensor in model.state_dict(keep_vars=True).items():
        if f".{PLACE}." not in path:
            state[path] = once.setdefault(id(tensor), whole(tensor).detach())
    if adapter is not None:
        for path, layer, low_rank in adapted(model, adapter):
            state[f"{path}.weight"] = _merged(state[f"{path}.weight"], low_rank, isinstance(layer, Conv1D))
    return state


@torch.no_grad()
def merge(model: nn.Module, name: str) -> None:
    """Fold the adapter into the weights, in place, and take it off: the bare model now speaks as it did."""
    for _, layer, low_rank in list(adapted(model, name)):
        weight = cast(Tensor, layer.weight)
        weight.copy_(_merged(weight, low_rank, isinstance(layer, Conv1D)))
        del cast(nn.ModuleDict, getattr(layer, PLACE))[name]


@torch.no_grad()
def _merged(weight: Tensor, low_rank: LowRank, turned: bool) -> Tensor:
    delta = whole(low_rank.b) @ whole(low_rank.a) * low_rank.scale
    return (weight.float() + (delta.T if turned else delta)).to(weight.dtype)
