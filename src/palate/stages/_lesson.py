"""One rollout being learnt from: what it holds, what was seen of it, and how far the steps on it are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from palate.batches import Learnt

_PREFIX = "lesson/"


@dataclass
class Lesson:
    """Experience of one rollout with the position inside it, so that a stop between two steps loses nothing.

    `seen` are the metrics known before the first step; `totals` add up those of the steps; `first` is how far the
    first step's ratio was from 1. `samples` and `tokens` are rows for people, written when the lesson ends. `drawn`
    counts the batches of prompts that the stage had drawn when this rollout was whole.
    """

    number: int
    experience: Learnt
    seen: dict[str, float]
    samples: list[dict[str, Any]]
    tokens: list[dict[str, Any]]
    seconds: float
    drawn: int = 0
    position: int = 0
    taken: int = 0
    first: float = 0.0
    totals: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, seen: Mapping[str, float] | None) -> None:
        """One more step is behind us; None when it was skipped."""
        self.position += 1
        if seen is None:
            return
        if self.taken == 0:
            self.first = abs(seen.get("val/ratio", 1.0) - 1.0)
        self.taken += 1
        for name, value in seen.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def metrics(self) -> dict[str, float]:
        """What was seen before the steps, and the means over the steps that were taken."""
        means = {name: total / self.taken for name, total in self.totals.items()}
        ratio = {"first_minibatch/ratio_error": self.first} if "val/ratio" in self.totals else {}
        return {**self.seen, **means, **ratio}

    def tensors(self) -> dict[str, Tensor]:
        """The experience's tensors, for a checkpoint."""
        named = {f.name: getattr(self.experience, f.name) for f in fields(self.experience)}
        return {f"{_PREFIX}{name}": x for name, x in named.items() if isinstance(x, Tensor)}

    def state(self) -> dict[str, Any]:
        """Everything else, as JSON."""
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "experience"}
        learnt = self.experience
        return {
            **rest,
            "temperature": learnt.temperature,
            "memory": dict(learnt.memory),
            "metrics": dict(learnt.metrics),
        }

    @classmethod
    def restored(
        cls, learns: type[Learnt], tensors: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device
    ) -> Lesson:
        """What `tensors` and `state` gave; `learns` is the kind of batch the algorithm learns from."""
        mine = {name.removeprefix(_PREFIX): x.to(device) for name, x in tensors.items() if name.startswith(_PREFIX)}
        rest = dict(state)
        learnt = {name: rest.pop(name) for name in ("temperature", "memory", "metrics")}
        return cls(experience=learns(**mine, **learnt), **rest)
