"""Pairs for the methods that learn from them: the golden ones behind a scripted cast, and random ones for a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palate.batches import Loss, Pairs, Tokens
from palate.cast import Cast
from tests.laws import test_microbatch_law as law
from tests.losses.golden import part_of

LENGTHS = (5, 14, 9, 4, 11, 7, 8, 10, 6, 12, 5, 9)
WIDTH = 6


class Scripted:
    """A cast that says given log-probabilities: the first token of a row is its number in `said[role]` (R×T)."""

    def __init__(self, **said: Tensor) -> None:
        self.said = said

    def seat(self, role: str) -> str:
        return role

    def logp(self, role: str, batch: Tokens) -> Tensor:
        return self.said[role][batch.tokens_BT[:, 0]][:, : batch.tokens_BT.shape[1]]

    def chunked(self, batch: Tokens, speak: Callable[[Tokens], Tensor]) -> Tensor:
        return torch.cat([speak(part) for part in batch.split(64)])


def golden(**changes: Any) -> tuple[Scripted, Pairs, dict[str, Any]]:
    """The three pairs of `preference_losses`: who says them, the batch, and what is expected."""
    case = part_of("preference_losses")

    def said(who: str) -> Tensor:
        both = [torch.tensor(case[f"{who}_{side}_tok"], dtype=torch.float64) for side in ("chosen", "rejected")]
        return torch.stack(both, 1).flatten(0, 1)

    mask_BKT = torch.stack([torch.tensor(case["mask_chosen"]), torch.tensor(case["mask_rejected"])], 1).bool()
    return Scripted(policy=said("policy").requires_grad_(), reference=said("ref")), numbered(mask_BKT, **changes), case


def numbered(mask_BKT: Tensor, **changes: Any) -> Pairs:
    """Pairs whose rows a `Scripted` cast knows, with the answer tokens that the mask names."""
    rows = mask_BKT.shape[0]
    tokens_BKT = torch.zeros(mask_BKT.shape, dtype=torch.long)
    tokens_BKT[..., 0] = torch.arange(2 * rows).reshape(rows, 2)
    plain = {"probability_B": torch.ones(rows, dtype=torch.float64), "margin_B": torch.zeros(rows, dtype=torch.float64)}
    return Pairs(tokens_BKT, mask_BKT, mask_BKT, **{**plain, "corrected_BKT": torch.zeros_like(mask_BKT), **changes})


def random_said(rows: int, seed: int = 0) -> tuple[Scripted, Pairs]:
    """Random log-probabilities of answers of 1 to 6 tokens, with garbage where there is no token."""
    draw = torch.Generator().manual_seed(seed)
    lengths_R = torch.randint(1, WIDTH + 1, (2 * rows, 1), generator=draw)
    mask_RT = torch.arange(WIDTH) < lengths_R
    said = [-2 * torch.rand(2 * rows, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2)]
    policy, reference = (x.masked_fill(~mask_RT, -77.0) for x in said)
    return Scripted(policy=policy.requires_grad_(), reference=reference), numbered(mask_RT.unflatten(0, (rows, 2)))


def value(loss: Loss, batch: Pairs) -> Tensor:
    """The loss as the step averages it."""
    counts = batch.counts()
    return torch.stack([t.total * t.weight / counts[t.per] for t in loss.terms.values()]).sum()


def seen(loss: Loss) -> dict[str, float]:
    return {name: float(mean.total) / mean.count for name, mean in loss.metrics.items()}


def ready(algorithm: Any, cast: Any, raw: Pairs) -> Any:
    with torch.no_grad():
        return algorithm.prepare(cast, raw)


def total(algorithm: Any, cast: Any, raw: Pairs, rows: int | None = None) -> Tensor:
    """The loss of a batch that is gone through `rows` pairs at a time."""
    batch = ready(algorithm, cast, raw)
    parts = [algorithm.loss(cast, part.trimmed()) for part in batch.split(rows or batch.size)]
    counts = batch.counts()
    return sum((t.total * t.weight / counts[t.per] for p in parts for t in p.terms.values()), torch.tensor(0.0))


def amount(algorithm: Any, cast: Any, raw: Pairs, rows: int | None = None) -> float:
    """The same as a number."""
    return float(total(algorithm, cast, raw, rows).detach())


def tiny_pairs(columns: int = 14) -> Pairs:
    """Six pairs for the models of the laws."""
    tokens, real, action = (x.unflatten(0, (6, 2)) for x in law.rows(*LENGTHS, width=columns))
    return Pairs(tokens, real, action, torch.ones(6), torch.zeros(6), torch.zeros_like(action))


def moved(layout: str = "separate", roles: tuple[str, ...] = ("policy", "reference")) -> Cast:
    """A policy that has left its reference."""
    cast = law.cast_for(roles, layout)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in cast.parameters(("policy",)).values():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return cast


def left_padded(batch: Pairs) -> Pairs:
    """The same answers with the padding before them, other tokens under it, and three more columns."""
    columns = batch.tokens_BKT.shape[-1] + 3
    found = {}
    for name in ("tokens_BKT", "real_BKT", "action_BKT"):
        old = getattr(batch, name)
        new = torch.full((*old.shape[:2], columns), 17 if name == "tokens_BKT" else 0, dtype=old.dtype)
        for b in range(old.shape[0]):
            for k in range(2):
                inside = batch.real_BKT[b, k]
                new[b, k, columns - int(inside.sum()) :] = old[b, k][inside]
        found[name] = new
    wide = torch.zeros_like(found["real_BKT"])
    return Pairs(**found, probability_B=batch.probability_B, margin_B=batch.margin_B, corrected_BKT=wide)


def write_pairs(path: Path, count: int = 16) -> Path:
    """Pairs as users write them: the chosen answer counts right."""
    rows = [
        {"prompt": f"After {n} comes", "chosen": f" {n + 1}, as all know", "rejected": " no" * (n % 3 + 1)}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stage(model: Path | str, data: Any, **changes: Any) -> dict[str, Any]:
    """Eight steps of four pairs."""
    data = str(data) if isinstance(data, Path) else data
    algorithm = {"kind": "dpo", **changes.pop("algorithm", {})}
    found = {"kind": "train", "name": "pairs", "model": str(model), "data": data, "algorithm": algorithm}
    sizes = {"batch_size": 4, "microbatch_size": 2, "logging_steps": 1, "num_train_epochs": 2, "save_steps": 3}
    return {**found, **sizes, "optimiser": {"learning_rate": 1e-3, "schedule": "constant"}, **changes}
