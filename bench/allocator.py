"""What glibc's allocator costs a step: processor time and page faults with its own settings, and with memory kept.

    python -m bench.allocator sft|ppo own|kept

`kept` lets no block come from mmap and gives nothing back (mallopt M_MMAP_MAX 0, M_TRIM_THRESHOLD 2 GiB). One thread;
the small model.
"""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

from bench.rig import SMALL, Bench, examples, ids, model
from palate.cast import Layout
from palate.engines.engine import Sampling
from palate.models import linear

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
ROUNDS = {"sft": 8, "ppo": 3}


def used() -> tuple[float, float, int]:
    """(processor seconds, those in the system, page faults) of this process."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime + now.ru_stime, now.ru_stime, now.ru_minflt


def main(kind: str, way: str) -> None:
    """Print what each step used, the least first; the first step does not count."""
    torch.set_num_threads(1)
    linear.use("onednn")
    if way == "kept":
        libc = ctypes.CDLL(None)
        assert libc.mallopt(M_MMAP_MAX, 0)
        assert libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    bench = Bench(model(SMALL), {"kind": kind}, Layout(), Sampling(max_new_tokens=53, min_new_tokens=53))
    rows, prompts = examples(SMALL, 16, 256), ids(SMALL, 64, 24, "prompts").tolist()
    found: list[tuple[float, float, int]] = []
    for number in range(ROUNDS[kind] + 1):
        before = used()
        if kind == "sft":
            bench.learn(rows)
        else:
            bench.iteration(prompts, number)
        found.append(tuple(b - a for a, b in zip(before, used(), strict=True)))  # pyright: ignore[reportArgumentType]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    steps = "  ".join(
        f"{total:.2f} s ({system:.2f} in the system, {faults:,} faults)" for total, system, faults in sorted(found[1:])
    )
    print(f"{kind}, {way}: {steps}; {peak:,} MiB at most")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
