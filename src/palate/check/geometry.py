"""The batch-geometry law on a user's own recipe: one update, cut in several ways, has one gradient.

python -m palate.check.geometry RECIPE FOLDER [key=value ...]     one of two ranks; started by `check_geometry`
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from palate.check import answering, training
from palate.check.rehearsal import Rehearsal
from palate.check.update import Update
from palate.cutting import Microbatch, cut, lengths
from palate.parallel import World, joined
from palate.run import Plan, plan_file
from palate.settings import PalateError
from palate.stages import online, train

BOUNDS: Mapping[torch.dtype, float] = {
    torch.float32: 1e-6,
    torch.float64: 1e-6,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""How far two gradients of one update may lie apart, relative to their size, by the number format of the products.

In half precision a sum over other parts rounds otherwise at every layer; float32 is where the law is held to 1e-6."""
_RANKS = 2
_LONGEST = 3600


@dataclass(frozen=True)
class Cut:
    """One way to cut the update, and the relative distance of its gradient from that of all rows at once."""

    how: str
    distance: float


@dataclass(frozen=True)
class Geometry:
    """A stage's first update under every cut."""

    stage: str
    rows: int
    parameters: int
    bound: float
    cuts: tuple[Cut, ...]

    @property
    def holds(self) -> bool:
        """Whether every cut has the same gradient, up to rounding."""
        return all(cut.distance <= self.bound for cut in self.cuts)

    @property
    def fault(self) -> str:
        """Which cut changes the gradient, and what that means; empty where none does."""
        wrong = max(self.cuts, key=lambda cut: cut.distance)
        if self.holds:
            return ""
        return (
            f"{self.stage}: the gradient changes by {wrong.distance:.2g} of its size when its {self.rows:,} rows are "
            f"cut into {wrong.how} ({self.bound:g} would be rounding). A loss must be a sum over rows: look for a "
            "mean, or for a statistic of the batch, inside the algorithm's loss."
        )


def check_geometry(path: Path, words: Sequence[str], say: Callable[[str], None]) -> tuple[Geometry, ...]:
    """The first update of every stage that trains, cut into micro-batches, into rows, and over two ranks."""
    with tempfile.TemporaryDirectory(prefix="palate-geometry-") as scratch:
        found = [_alone(update, Path(scratch), say) for update in _updates(plan_file(path, words), Path(scratch))]
        if not found:
            raise PalateError(f"{path}: no stage of this recipe trains, so there is no update to cut.")
        say(f"on {_RANKS} ranks")
        ranks = _on_ranks(path, words, Path(scratch))
    how = f"shares of {_RANKS} ranks"
    return tuple(Geometry(g.stage, g.rows, g.parameters, g.bound, (*g.cuts, Cut(how, ranks[g.stage]))) for g in found)


def _updates(plan: Plan, scratch: Path) -> Iterator[Update]:
    """One stage's update at a time; models that are not trained yet are stood in for."""
    rehearsal = Rehearsal(plan, scratch / f"rehearsal-{os.getpid()}")
    for index, stage in enumerate(plan.stages):
        if isinstance(stage, train.Stage):
            yield training.first_update(stage, index, rehearsal)
        elif isinstance(stage, online.Stage):
            yield answering.first_update(stage, index, rehearsal)


def _alone(update: Update, scratch: Path, say: Callable[[str], None]) -> Geometry:
    say(f"{update.stage}: one update, cut")
    rows, world = update.batch.size, World()
    whole = update.gradient(Microbatch(rows=rows), world)
    save_file(
        {name: gradient.cpu().contiguous() for name, gradient in whole.items()}, scratch / f"{update.stage}.whole"
    )
    few = max(part.size for part in cut(update.batch, update.microbatch, world))
    few = few if few < rows else max(1, rows // 2)
    halves = Microbatch(tokens=max(1, sum(lengths(update.batch)) // 2))
    cuts = [
        Cut(f"micro-batches of {few:,}", distance(whole, update.gradient(Microbatch(rows=few), world))),
        Cut(f"micro-batches of {halves.said()}", distance(whole, update.gradient(halves, world))),
    ]
    if few > 1:
        cuts.append(Cut("single rows, accumulated", distance(whole, update.gradient(Microbatch(rows=1), world))))
    count = sum(gradient.numel() for gradient in whole.values())
    return Geometry(update.stage, rows, count, BOUNDS[update.dtype], tuple(cuts))


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Relative distance of two gradients as one long vector each; infinite where they are of other weights."""
    if a.keys() != b.keys():
        return float("inf")
    gap = sum(float((a[name].cpu().double() - b[name].cpu().double()).square().sum()) for name in a) ** 0.5
    size = sum(float(gradient.double().square().sum()) for gradient in a.values()) ** 0.5
    return gap / size if size else gap


def _on_ranks(path: Path, words: Sequence[str], scratch: Path) -> dict[str, float]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    place = {**os.environ, "WORLD_SIZE": str(_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "palate.check.geometry", str(path), str(scratch), *words]
    started = [
        subprocess.Popen(
            command, env={**place, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True
        )
        for r in range(_RANKS)
    ]
    said = [process.communicate(timeout=_LONGEST)[1] for process in started]
    if any(process.returncode for process in started):
        last = next((text.strip().splitlines()[-1] for text in said if text.strip()), "it was ended")
        raise PalateError(f"{path}: the update could not be taken on {_RANKS} ranks: {last}")
    return json.loads((scratch / "ranks.json").read_text(encoding="utf-8"))


def main(recipe: str, folder: str, *words: str) -> None:
    """One rank's share of the update of every stage; rank 0 leaves the distances."""
    scratch, plan = Path(folder), plan_file(Path(recipe), words)
    found: dict[str, float] = {}
    updates = list(_updates(plan, scratch))  # before the ranks join: transformers lets only the first of them save
    with joined(plan.experiment.strategy, plan.experiment.offload) as world:
        for update in updates:
            update.cast.world = world
            update.cast.spread()
            mine: Any = update.gradient(update.microbatch, world)
            found[update.stage] = distance(load_file(scratch / f"{update.stage}.whole"), mine)
        if world.is_main:
            (scratch / "ranks.json").write_text(json.dumps(found), encoding="utf-8")
        world.barrier()


if __name__ == "__main__":
    from palate.catalogue import find_own_code

    find_own_code(Path(sys.argv[1]).parent)
    main(*sys.argv[1:])
