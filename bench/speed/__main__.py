"""palate beside its peers on the same work.

    python -m bench.speed                                   every row, five rounds; about 40 minutes
    python -m bench.speed --rows dpo-small,ppo-small        these; the others stay as they were measured
    python -m bench.speed --page                            the page and the picture alone, from results.json
    python -m bench.speed --gpu                             the rows for a GPU, in bfloat16, to bench/gpu.md

Peers are found through PALATE_PEERS (docs/bench.md); without it palate's rows are measured alone. Writes
bench/results.json, bench/results.md and docs/img/speed.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.speed import machine, page, picture, results, systems
from bench.speed.runner import Worker, WorkerError, rounds
from bench.speed.workloads import EVERY, GPU_ROWS, ROWS, Row

RAW, PAGE, PICTURE = (
    systems.ROOT / "bench" / "results.json",
    systems.ROOT / "bench" / "results.md",
    systems.ROOT / "docs" / "img" / "speed.svg",
)
GPU_RAW = RAW.with_name("gpu.json")
MATERIAL = systems.ROOT / "runs" / "speed"


def in_own_process(*code: str) -> str:
    """What a command in palate's environment prints; a process of its own, so that this one stays small and idle."""
    command = [sys.executable, *code]
    environment = systems.OURS.environment(os.environ)
    return subprocess.run(
        command, cwd=systems.ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def material(folder: Path, row: Row) -> Path:
    """The row's file, made with all it names where that is missing."""
    make = "import sys; from pathlib import Path; from bench.speed import material as m, workloads as w; "
    make += "print(m.work(Path(sys.argv[1]), w.EVERY[sys.argv[2]]))"
    return Path(in_own_process("-c", make, str(folder), row.name).strip().splitlines()[-1])


def limit(row: Row, patience: float, tries: int = 3) -> dict[str, Any]:
    """The machine's limit at the shapes of a row's model now, measured again where others disturbed it; the highest."""
    found: list[dict[str, dict[str, float]]] = []
    for _ in range(tries):
        machine.wait_for_quiet(patience)
        watch, before = machine.Watch.start(), os.times()
        asked = ("-m", "bench.speed.limit", row.model, row.device, row.precision)
        found.append(json.loads(in_own_process(*asked)))
        now = os.times()
        spent = now.children_user + now.children_system - before.children_user - before.children_system
        if watch.others(spent) <= machine.LIMIT:
            break
    return {kind: {way: max(one[kind][way] for one in found) for way in found[0][kind]} for kind in found[0]}


def has_gpu() -> bool:
    """Whether palate's torch can use a GPU of this machine."""
    return in_own_process("-c", "import torch; print(torch.cuda.is_available())").strip() == "True"


def gpu(row: Row) -> dict[str, str]:
    """The GPU's name, for rows that ran on one."""
    ask = "import torch; print(torch.cuda.get_device_name())"
    return {"GPU": in_own_process("-c", ask).strip()} if row.device == "cuda" else {}


def measure(row: Row, count: int, folder: Path, peers: Path | None, patience: float) -> results.Record:
    """One row, both systems in turn."""
    path, found = material(folder, row), limit(row, patience)
    other = systems.peer(row.peer, peers)
    chosen = [systems.OURS, *([other] if other else [])]
    workers: list[Worker] = []
    try:
        workers += (Worker(system, path) for system in chosen)
        taken = rounds(workers, count, patience)
    finally:
        for worker in workers:
            worker.close()
    sides = [results.measured(row, t, count, w.facts) for t, w in zip(taken, workers, strict=True)]
    record = {"palate": sides[0], "peer": sides[1] if other else None, "limit": found, "date": results.stamp()}
    return record | {"peer_name": other.name if other else None, "machine": machine.facts() | gpu(row)}


def asked(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__, formatter_class=_Plain)
    parser.add_argument("--rows", default="", help="names with commas between; all without")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each system that count, at least")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--material", type=Path, default=MATERIAL, help="where models and data are kept")
    parser.add_argument("--page", action="store_true", help="write page and picture, measure nothing")
    parser.add_argument("--gpu", action="store_true", help="the rows for a GPU instead")
    parser.add_argument("--raw", type=Path, help="where results are kept; the page and the picture go beside them")
    found = parser.parse_args(argv)
    known = GPU_ROWS if found.gpu else ROWS
    found.raw = found.raw or (GPU_RAW if found.gpu else RAW)
    found.names = [name for name in found.rows.split(",") if name] or list(known)
    unknown = [name for name in found.names if name not in known]
    if unknown:
        parser.error(f"there is no row {unknown[0]!r}. Known: {', '.join(known)}.")
    return found


class _Plain(argparse.RawDescriptionHelpFormatter):
    """The text above as it stands."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, write down what is known. 1 where a row could not be measured."""
    given, peers, failed = asked(argv), systems.peers_folder(), 0
    if given.gpu and not given.page and not has_gpu():
        print("--gpu: torch finds no GPU here; these rows are measured on a machine that has one.", file=sys.stderr)
        return 2
    if peers is None and not given.page:
        print(
            f"{systems.PEERS} is not set: palate's rows are measured alone. docs/bench.md says how to have the peers."
        )
    for name in [] if given.page else given.names:
        try:
            record = measure(EVERY[name], given.rounds, given.material.resolve(), peers, given.patience)
        except WorkerError as fault:
            print(f"{name}: {fault}", file=sys.stderr)
            failed = 1
            continue
        known = results.read(given.raw)
        known["rows"][name] = record
        results.write(given.raw, known)
        publish(given.raw)
        print(page.line(EVERY[name], record), flush=True)
    if given.page:
        publish(given.raw)
    return failed


def publish(raw: Path) -> None:
    """Page and picture of what is known; beside the raw results where these are not at their usual place."""
    known, usual = results.read(raw)["rows"], raw == RAW
    (PAGE if usual else raw.with_suffix(".md")).write_text(page.page(known), encoding="utf-8")
    (PICTURE if usual else raw.with_suffix(".svg")).write_text(picture.picture(known), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
