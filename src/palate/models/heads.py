"""Heads: a hidden state becomes a reward, a value, or a number for each token that may come next."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from palate import randomness
from palate.models.words import Shape, Words, words

HeadKind = Literal["linear", "mlp"]
HeadInit = Literal["reference", "zero", "coati"]


class ScalarHead(nn.Module):
    """gain · f(hidden) + bias, in float32; f is linear, or trlX's D → 2D → ReLU → 1.

    `gain` and `bias` put the numbers on a scale (details 20 to 22 of docs/ppo_details.md); they start at 1 and 0
    and are frozen unless an algorithm asks to train them. `trained` travels to disk: a head that was never trained
    is not a reward model.
    """

    def __init__(self, width: int, kind: HeadKind = "linear") -> None:
        super().__init__()
        self.kind: HeadKind = kind
        self.width = width
        self.layers: nn.Module = (
            nn.Linear(width, 1)
            if kind == "linear"
            else nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))
        )
        self.gain = nn.Parameter(torch.ones(()), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.trained = False

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """… × D → …, float32 whatever the trunk's dtype."""
        return self.layers(hidden_ND.float())[..., 0] * self.gain + self.bias

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the number."""
        return [m for m in self.layers.modules() if isinstance(m, nn.Linear)][-1]


class ActionHead(nn.Module):
    """What each of V tokens is worth after a hidden state: D → 2D → ReLU → V in float32, as trlX's Q heads."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.width, self.tokens = width, tokens
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, tokens))

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """… × D → … × V, float32 whatever the trunk's dtype."""
        return self.layers(hidden_ND.float())

    def taken(self, hidden_ND: Tensor, token_N: Tensor) -> Words:
        """What one token of each row is worth, and log Σ exp over all V, without ever holding N×V numbers."""
        *before, last = self.layers
        inner_ND = nn.Sequential(*before)(hidden_ND.float())
        return words(last, inner_ND, token_N, self.tokens, Shape())


Head = ScalarHead | ActionHead


def head_std(width: int, init: HeadInit) -> float:
    """Standard deviation of a fresh head's weights.

    `reference`: 1/√(d+1) (lm-human-preferences and the TL;DR work, detail 19). `coati`: 1/(d+1), ColossalChat's.
    `zero`: a value head that starts by promising nothing (detail 28).
    """
    return {"reference": (width + 1) ** -0.5, "coati": 1 / (width + 1), "zero": 0.0}[init]


@torch.no_grad()
def fresh_head(width: int, init: HeadInit, key: int, kind: HeadKind = "linear") -> ScalarHead:
    """A head with normal weights drawn from the counter key and biases 0.

    An MLP's first layer is always drawn with 1/√(d+1), since a zero there would never train; `init` rules its last.
    """
    head = ScalarHead(width, kind)
    for number, layer in enumerate(m for m in head.layers.modules() if isinstance(m, nn.Linear)):
        rule = init if layer is head.last else "reference"
        draw = randomness.generator(key, "head", number).normal(0.0, 1.0, tuple(layer.weight.shape))
        layer.weight.copy_(torch.from_numpy(draw) * head_std(layer.in_features, rule))
        layer.bias.zero_()
    return head


@torch.no_grad()
def fresh_action_head(width: int, tokens: int, key: int, role: str) -> ActionHead:
    """A head with weights and biases uniform in ±1/√(inputs of the layer), torch's own rule, from the counter key."""
    head = ActionHead(width, tokens)
    for number, layer in enumerate(m for m in head.modules() if isinstance(m, nn.Linear)):
        for parameter in (layer.weight, layer.bias):
            numbers = randomness.generator(key, role, number, parameter.dim())
            draw = numbers.uniform(-1.0, 1.0, tuple(parameter.shape)) * layer.in_features**-0.5
            parameter.copy_(torch.from_numpy(draw))
    return head
