"""Every method against the exact optimum: 4 prompts, 1,555 answers each, π* known by enumeration.

    python -m bench.optimum                            # every row that has not been measured, then the page
    python -m bench.optimum rloo "dr grpo, k3 loss"    # these rows alone
    python -m bench.optimum --beta .1 --world 2 --seeds 1

A row is a real palate stage on a model folder of 26,176 weights; what it left is scored over all answers. Rows are kept
in bench/optimum.json as they end, so that the command may be stopped and given again.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import click
import torch
from torch import Tensor

from bench import optimum_page
from bench.optimum_fixed import LAWS, ends
from bench.optimum_page import end_of, name_of
from bench.optimum_rows import ROWS, Row, stage
from palate.live import Display
from palate.models.load import load
from palate.run import execute, plan
from palate.worlds import enumerable
from palate.worlds.enumerable import Score

KEPT, PAGE, PICTURE = Path("bench/optimum.json"), Path("bench/optimum.md"), Path("docs/img/optimum.svg")
BETAS, SEEDS, WORLDS = (0.5, 0.1), (1, 2), (1, 2)


def kept() -> dict[str, dict[str, float]]:
    """All measurements so far."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def keep(name: str, found: dict[str, float]) -> None:
    """Add one measurement to the file, whole or not at all."""
    text = json.dumps({**kept(), name: found}, indent=1, sort_keys=True, ensure_ascii=False)
    fresh = KEPT.with_suffix(".new")
    fresh.write_text(text + "\n", encoding="utf-8")
    os.replace(fresh, KEPT)


def train(row: Row, world: int, beta: float, seed: int, home: Path, part: float = 1.0) -> Path:
    """Run one row as a palate stage, or with a part of its budget; the model folder it left."""
    reference = home / f"reference-{world}"
    if not reference.exists():
        enumerable.write_reference(reference, world)
    settings = stage(row, beta, reference, world, part)
    stages = {"name": "optimum", "output_dir": str(home), "seed": seed, "stages": [settings]}
    return execute(plan(stages), Display(quiet=True)).folder / "1-o" / "model"


def judge(model: Path, world: int, beta: float) -> Score:
    """A model folder against the exact optimum."""
    trunk = load(model).trunk

    def next_logp(tokens_RT: Tensor) -> Tensor:
        hidden_RTD = trunk.hidden(tokens_RT, torch.ones_like(tokens_RT, dtype=torch.bool))
        return trunk.logits(hidden_RTD).log_softmax(-1)

    return enumerable.world(world).score_network(next_logp, beta)


def measure(row: str, world: int, beta: float, seed: int) -> dict[str, float]:
    """Train and judge one row."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time(), time.perf_counter()
        model = train(ROWS[row], world, beta, seed, Path(folder))
        seconds = time.process_time() - started[0], time.perf_counter() - started[1]
        found = judge(model, world, beta)
    return {
        "share": round(found.share, 5),
        "kl_from_best": round(found.kl_from_best, 5),
        "kl_from_reference": round(found.kl_from_reference, 5),
        "reward": round(found.reward, 5),
        "cpu_seconds": round(seconds[0], 1),
        "seconds": round(seconds[1], 1),
    }


@click.command(help=__doc__)
@click.argument("rows", nargs=-1)
@click.option("--world", "worlds", multiple=True, type=int, default=WORLDS)
@click.option("--beta", "betas", multiple=True, type=float, default=BETAS)
@click.option("--seeds", default=len(SEEDS), help="How many seeds.")
@click.option("--again", is_flag=True, help="Measure rows that have been measured, too.")
@click.option("--page", is_flag=True, help="Measure nothing, write the page.")
def main(
    rows: tuple[str, ...], worlds: tuple[int, ...], betas: tuple[float, ...], seeds: int, again: bool, page: bool
) -> None:
    """Measure what is missing and write the page."""
    torch.set_num_threads(1)
    chosen = rows or tuple(ROWS)
    unknown = [row for row in chosen if row not in ROWS]
    if unknown:
        raise click.UsageError(f"no row is called {unknown[0]!r}. Known: {', '.join(ROWS)}.")
    every = [(row, w, b, s) for w in worlds for b in betas for s in range(1, seeds + 1) for row in chosen]
    known = kept()
    for one in [] if page else [one for one in every if again or name_of(*one) not in known]:
        found = measure(*one)
        keep(name_of(*one), found)
        click.echo(f"{name_of(*one)}: {found['share']:.4f}  KL(π*‖π) {found['kl_from_best']:.3f}  {found['seconds']} s")
    write_page()


def write_page() -> None:
    """Compute the ends that are not known yet; write page and picture."""
    for world in WORLDS:
        for beta in BETAS:
            for row in LAWS:
                name = end_of(row, world, beta)
                if name not in kept():
                    share = ends(row, enumerable.world(world), beta)
                    assert share is not None
                    keep(name, {"share": round(share, 5)})
    known = kept()
    PAGE.write_text(optimum_page.page(known, BETAS, WORLDS, SEEDS), encoding="utf-8")
    panels = {f"world {w}, β = {BETAS[0]:g}": optimum_page.lines(known, w, BETAS[0], SEEDS) for w in WORLDS}
    PICTURE.write_text(optimum_page.picture(panels), encoding="utf-8")


if __name__ == "__main__":
    main()
