"""Kill real runs at random and at exact moments, give the same command again, and compare the end bit by bit.

    python -m bench.chaos --kills 200 --seed 1       with one and with two threads; exit code 1 if a promise is broken
    python -m bench.chaos --page bench/chaos.md      write the figures there as well

The run is bench/chaos.yaml. A kill is SIGKILL: by the clock, before a random step on the disk, or at one of the exact
moments of bench/chain.py. After one kill in four the newest checkpoint is damaged. Nothing is repaired by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Found = Mapping[str, Any]
"""What one worker reports, see `bench.chaos_worker.Record`."""


def work(folder: Path, threads: Sequence[int], kills: int, seed: int) -> list[Found]:
    """One worker for each number of threads, side by side; the kills are shared out among them."""
    workers: list[tuple[subprocess.Popen[bytes], Path]] = []
    for index, count in enumerate(threads):
        share = kills // len(threads) + (index < kills % len(threads))
        home = folder / f"threads-{count}"
        words = [sys.executable, "-m", "bench.chaos_worker", str(home), str(share), f"{seed}/{count}"]
        # OpenBLAS would start threads when numpy is imported, and a process with threads cannot be forked safely.
        # Threads that wait asleep leave the other workers their cores.
        plain = {"OMP_NUM_THREADS": str(count), "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        workers.append((subprocess.Popen(words, env={**os.environ, **plain}), home / "found.json"))
    for process, _ in workers:
        if process.wait() != 0:
            raise SystemExit(f"a worker ended with exit code {process.returncode}")
    return [json.loads(path.read_text(encoding="utf-8")) for _, path in workers]


def broken(found: Sequence[Found]) -> list[str]:
    """Every promise that did not hold, in a line each."""
    lines = [f"ended astray: {text}" for one in found for text in one["astray"]]
    lines += [f"unequal end: {text}" for one in found for text in one["unequal"]]
    return lines + [f"never met: {text}" for one in found for text in one["missed"]]


def page(found: Sequence[Found], seed: int) -> str:
    """Markdown: what was killed where, and how it went on."""
    kills = [kill for one in found for kill in one["kills"]]
    restarts = [k["restart"] for k in kills if k["restart"] is not None]
    damaged = sum(1 for k in kills if k["damage"])
    lines = [
        f"{len(kills)} kills and stops of {sum(one['runs'] for one in found)} runs, seed {seed}: "
        + ", ".join(f"{count} {way}" for way, count in Counter(k["way"] for k in kills).most_common()),
        "",
        "| | |",
        "|---|---|",
        f"| starts that failed, or needed a hand | {sum(len(one['astray']) for one in found)} |",
        f"| ends that differ from the run never killed | {sum(len(one['unequal']) for one in found)} |",
        f"| exact moments met | {sum(1 for k in kills if k['name'])} of {sum(one['named'] for one in found)} |",
        f"| newest checkpoint damaged before the restart | {damaged} |",
        f"| mean time from restart to the next logged step | {fmean(restarts):.2f} s after imports |",
        f"| imports of a process of its own | {fmean(one['imports'] for one in found):.1f} s |",
        f"| the whole run, never killed | {fmean(one['whole'] for one in found):.1f} s |",
        "",
        "| what was going on, by the folder | kills |",
        "|---|---|",
    ]
    where = Counter(k["where"] for k in kills)
    lines += [f"| {name} | {where[name]} |" for name in sorted(where)]
    return "\n".join([*lines, *(f"\n**{line}**" for line in broken(found))]) + "\n"


def main(words: Sequence[str]) -> int:
    """The exit code: 0 when every promise held."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="random kills, beside one at every exact moment")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch threads, a worker for each")
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder otherwise")
    parser.add_argument("--page", type=Path, help="write the figures here as well")
    parser.add_argument("--json", type=Path, help="write what each worker found")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as temporary:
        found = work((asked.folder or Path(temporary)).resolve(), asked.threads, asked.kills, asked.seed)
    text = page(found, asked.seed)
    print(text)
    if asked.page:
        command = f"python -m bench.chaos --kills {asked.kills} --seed {asked.seed}"
        asked.page.write_text(f"# Kills\n\n`{command}`\n\n{text}", encoding="utf-8")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if broken(found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
