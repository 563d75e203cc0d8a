"""A real SFT stage in a process whose memory is limited to what half of its micro-batch needs.

`python -m tests.stages.short_of_memory FOLDER` forks a process for each run and prints, as JSON, how far each grew.
It wants MALLOC_ARENA_MAX=1 and a fixed MALLOC_MMAP_THRESHOLD_, so that what is freed goes back to the system.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from palate.models.make import Make, make
from palate.models.save import Card, save
from palate.settings import PalateError, Stopped
from tests.stages import tiny_runs

ROWS, LENGTH = 32, 480
TRICK = "tests.stages.tricks:Poisoned"


def kilobytes(field: str) -> int:
    """A size of this process as the kernel tells it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:"))


def forked(work: Callable[[], None]) -> dict[str, Any]:
    """What became of `work` in a process of its own: how far it grew, and how it ended."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        before, fault = kilobytes("VmSize"), ""
        try:
            work()
        except (PalateError, RuntimeError, MemoryError, Stopped) as met:
            fault = f"{type(met).__name__}: {met}"
        os.write(write, json.dumps({"grew": kilobytes("VmPeak") - before, "fault": fault}).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


def stage(folder: Path, microbatch: int, algorithm: dict[str, Any]) -> dict[str, Any]:
    data = {"path": str(folder / "rows.jsonl"), "shuffle": False}
    sizes = {"batch_size": ROWS, "microbatch_size": microbatch, "num_train_epochs": 3, "save_steps": 1}
    return tiny_runs.sft(folder / "model", data, **sizes, algorithm=algorithm)


def limit(room: int) -> None:
    """From now on this process may grow by so many kilobytes."""
    most = (kilobytes("VmSize") + room) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    shape = Make(hidden_size=64, layers=2, heads=2, vocabulary=280, context=512)
    made = make(shape, tiny_runs.PROMPTS, 11)
    save(folder / "model", made.trunk, made.tokenizer, Card("tiny", "nothing"))
    long = "".join(str(n % 10) for n in range(LENGTH))
    rows = [{"prompt": f"{n}:", "completion": long} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, microbatch: int = ROWS, room: int | None = None, **algorithm: Any) -> None:
        if room is not None:
            limit(room)
        tiny_runs.run(folder, stage(folder, microbatch, {"kind": TRICK, **algorithm}), name=name)

    found = {str(rows): forked(lambda rows=rows: run(f"free-{rows}", rows)) for rows in (ROWS, ROWS // 2)}
    room = (found[str(ROWS)]["grew"] + found[str(ROWS // 2)]["grew"]) // 2
    bell = folder / "bell"
    bell.write_text(f"{int(signal.SIGTERM)} 2")  # inside the second step
    cue = made.tokenizer.encode(":")[0]
    for name in ("stopped", "gone on"):
        found[name] = forked(lambda: run("short", ROWS, room, cue=cue, bell=str(bell)))
    found["greedy"] = forked(lambda: run("greedy", ROWS, room, appetite=room // 1024))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
