"""What a worker needs to know of a GPU: when it is done, and how much of its memory was taken."""

from __future__ import annotations

import torch

from bench.speed.protocol import Link
from bench.speed.workloads import Row


def watch(link: Link, row: Row) -> None:
    """Where the row is for a GPU, clocks wait for it and the peak is of its memory; SystemExit where there is none."""
    if row.device == "cpu":
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"{row.name} is for a GPU, and torch finds none here.")
    link.settle = torch.cuda.synchronize
    link.peak = lambda: torch.cuda.max_memory_allocated() / 2**20
