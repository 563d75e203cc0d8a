"""Algorithms that break at chosen rows: a token in a prompt is the cue, so that a run replays the same way."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from palate.algorithms import ppo, sft
from palate.batches import Examples, Experience, Loss, Scored, Tokens
from palate.cast import Cast


def ring(bell: str) -> None:
    """The file holds a signal's number and how often to wait for it: at the last time this process is sent it."""
    if not bell or not Path(bell).exists():
        return
    number, times = map(int, Path(bell).read_text().split())
    if times > 1:
        Path(bell).write_text(f"{number} {times - 1}")
        return
    Path(bell).unlink()
    os.kill(os.getpid(), number)


def has(batch: Tokens, token: int) -> Tensor:
    """Which rows hold a token in their prompt; a policy may say it by chance."""
    return ((batch.tokens_BT == token) & ~batch.action_BT).any(-1)


def spoilt(loss: Loss) -> Loss:
    """The same loss times infinity."""
    return replace(loss, terms={name: replace(t, total=t.total * float("inf")) for name, t in loss.terms.items()})


class Poisoned(sft.Algorithm):
    """SFT whose loss is infinite on rows with the poison, and wherever the weights have moved too far."""

    kind: str = "tests.stages.tricks:Poisoned"
    """SFT with accidents."""
    poison: int = -1
    """A token that makes the loss infinite."""
    cue: int = -1
    """A token that rings the bell."""
    bell: str = ""
    """A file with the number of the signal."""
    furthest: float = 1e9
    """How far the last norm's weights may move from 1 before the loss becomes infinite."""

    appetite: int = 0
    """Megabytes that the loss asks for beside its own, for each row."""

    def prepare(self, cast: Cast, raw: Examples) -> Examples:
        if bool(has(raw, self.cue).any()):
            ring(self.bell)
        return raw

    def loss(self, cast: Cast, batch: Examples) -> Loss:
        torch.ones(batch.size, self.appetite << 18)
        said = super().loss(cast, batch)
        norm = cast.seat("policy").trunk.model.get_submodule("model.norm").weight
        moved = float((torch.as_tensor(norm).detach() - 1.0).abs().mean())
        return spoilt(said) if moved > self.furthest or bool(has(batch, self.poison).any()) else said


class PoisonedPPO(ppo.Algorithm):
    """PPO whose loss, or whose advantages, are not finite on rows with the poison."""

    kind: str = "tests.stages.tricks:PoisonedPPO"
    """PPO with accidents."""
    poison: int = -1
    """A token that breaks the loss of a minibatch."""
    nan: int = -1
    """A token that makes the advantages of its row nan in `prepare`."""
    cue: int = -1
    """A token that rings the bell from inside the loss."""
    bell: str = ""
    """A file with the number of the signal."""

    def prepare(self, cast: Cast, scored: Scored) -> Experience:
        done = super().prepare(cast, scored)
        broken_B1 = has(done, self.nan)[:, None]
        return replace(done, advantage_BT=done.advantage_BT.masked_fill(broken_B1, float("nan")))

    def loss(self, cast: Cast, batch: Experience) -> Loss:
        said = super().loss(cast, batch)
        if bool(has(batch, self.cue).any()):
            ring(self.bell)
        return spoilt(said) if bool(has(batch, self.poison).any()) else said


class ScaledOld(ppo.Algorithm):
    """PPO that mistakes its old log-probabilities for those of another temperature."""

    kind: str = "tests.stages.tricks:ScaledOld"
    """PPO with a fault."""
    scale: float = 1.1
    """What old log-probabilities are multiplied by."""

    def prepare(self, cast: Cast, scored: Scored) -> Experience:
        done = super().prepare(cast, scored)
        return replace(done, logp_BT=done.logp_BT * self.scale)


class OwnReference(ppo.Algorithm):
    """PPO whose reference is not the model that it starts from."""

    kind: str = "tests.stages.tricks:OwnReference"
    """PPO with a fault."""

    def prepare(self, cast: Cast, scored: Scored) -> Experience:
        with torch.no_grad():
            for weight in cast.seat("reference").trunk.parameters():
                weight.mul_(1.05)
        return super().prepare(cast, scored)
