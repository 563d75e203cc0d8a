"""bfloat16 beside float32 weights against float32: an SFT step and a rollout, in processor time of one thread.

    python -m bench.half small|mid

One process, the ways in turn, the least of some rounds: other work on the machine hardly counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from bench.rig import Bench, Shape, examples, ids, model
from palate.batches import Examples
from palate.cast import Layout
from palate.engines.engine import Sampling
from palate.models import linear

SHAPES = {"small": Shape(), "mid": Shape(6, 512, 8, 16000, 512)}
WAYS: dict[str, tuple[torch.dtype | None, linear.Backend]] = {
    "float32, plain": (None, "plain"),
    "float32, oneDNN": (None, "onednn"),
    "bfloat16": (torch.bfloat16, "onednn"),
}
ROUNDS = 3


def seconds(bench: Bench, work: Callable[[], object]) -> dict[str, float]:
    """The least processor time of `work` by each way, after a round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS + 1):
        for name, (compute, backend) in WAYS.items():
            bench.cast.trunks[0].compute = compute
            linear.use(backend)
            start = time.process_time()
            work()
            found[name].append(time.process_time() - start)
    return {name: min(times[1:]) for name, times in found.items()}


def ragged(shape: Shape) -> Examples:
    """16 rows of 128 to 256 tokens."""
    rows = examples(shape, 16, 256)
    length_B = torch.randint(128, 257, (16,), generator=torch.Generator().manual_seed(0))
    real_BT = torch.arange(256) < length_B[:, None]
    return Examples(rows.tokens_BT, real_BT, rows.action_BT & real_BT)


def main(name: str) -> None:
    """Print both measurements."""
    torch.set_num_threads(1)
    shape = SHAPES[name]
    bench = Bench(model(shape), {"kind": "sft"}, Layout(), Sampling(max_new_tokens=32, min_new_tokens=32))
    rows, prompts = ragged(shape), ids(shape, 64, 32, "prompts").tolist()
    for title, work in (
        ("SFT step, 16 rows of 128 to 256 tokens", lambda: bench.learn(rows)),
        ("rollout, 64 prompts of 32 tokens, 32 new ones", lambda: bench.answers(prompts, 1)),
    ):
        found = seconds(bench, work)
        said = "  ".join(f"{way} {time:.2f} s" for way, time in found.items())
        print(f"{name}, {title}: {said}  ({found['float32, oneDNN'] / found['bfloat16']:.2f}x)")


if __name__ == "__main__":
    main(sys.argv[1])
