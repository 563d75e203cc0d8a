"""How long one waits: for help, and for the first optimiser step of a tiny SFT run.

    python -m bench.startup                       PALATE_PEERS=FOLDER adds TRL from FOLDER/venv; writes bench/startup.md

Each row is a process from its start to its end, or until its first step has left a file behind; the rows take turns.
One turn is not counted, so that all files have been read once.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

PAGE = Path(__file__).with_suffix(".md")
TRL = Path(__file__).with_name("startup_trl.py")
RECIPE = """
name: first
stages:
  - kind: train
    name: sft
    model: {architecture: gpt2, hidden_size: 64, layers: 2, heads: 4, vocabulary: 400, context: 128}
    data: {path: world:tasting_room/demonstrations, rows: 64}
    algorithm: {kind: sft}
    batch_size: 8
    max_steps: 1
    logging_steps: 1
"""
PATIENCE = 300.0
"""Seconds after which a process is given up."""


@dataclass(frozen=True)
class Row:
    """A command, made anew for each turn in an empty folder; `mark` is the file that ends the waiting, if any."""

    command: Callable[[Path], Sequence[str]]
    mark: str = ""


def rows(peers: Path | None) -> dict[str, Row]:
    """What is measured; peers only where their environment is."""
    beside = Path(sys.executable).parent
    palate, python = str(beside / "palate"), sys.executable

    def first(folder: Path) -> Sequence[str]:
        (folder / "first.yaml").write_text(RECIPE, encoding="utf-8")
        return palate, "run", str(folder / "first.yaml"), f"output_dir={folder / 'run'}"

    found = {
        "python, nothing": Row(lambda _: (python, "-c", "pass")),
        "palate --help": Row(lambda _: (palate, "--help")),
        "palate sft --help": Row(lambda _: (palate, "sft", "--help")),
        "import torch": Row(lambda _: (python, "-c", "import torch")),
        "palate run, first SFT step": Row(first, "run/first/1-sft/metrics.jsonl"),
    }
    if peers is None:
        return found
    trl, other = str(peers / "venv/bin/trl"), str(peers / "venv/bin/python")
    return found | {
        "trl --help": Row(lambda _: (trl, "--help")),
        "trl sft --help": Row(lambda _: (trl, "sft", "--help")),
        "trl dpo --help": Row(lambda _: (trl, "dpo", "--help")),
        "TRL, first SFT step": Row(lambda folder: (other, str(TRL), str(folder)), "stepped"),
    }


def wait(row: Row, folder: Path) -> float:
    """Seconds from the start of the process to its mark or its end. RuntimeError where it fails or is too slow."""
    command = list(row.command(folder))
    mark = folder / row.mark if row.mark else None
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began, marked = time.perf_counter(), 0.0
    with (folder / "said").open("w", encoding="utf-8") as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, **quiet}, cwd=folder)
        while child.poll() is None:
            if mark is not None and not marked and mark.exists() and mark.stat().st_size:
                marked = time.perf_counter() - began
            if time.perf_counter() - began > PATIENCE:
                child.kill()
            time.sleep(0.002)
    ended = time.perf_counter() - began
    if child.returncode or (mark is not None and not mark.exists()):
        text = (folder / "said").read_text(encoding="utf-8")[-500:]
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}: {text}")
    return marked or ended


def measure(asked: Mapping[str, Row], turns: int) -> dict[str, list[float]]:
    """Seconds of every row in every counted turn."""
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    for turn in range(turns + 1):
        for name, row in asked.items():
            with tempfile.TemporaryDirectory() as folder:
                spent = wait(row, Path(folder))
            if turn:
                seconds[name].append(spent)
    return seconds


def page(seconds: Mapping[str, Sequence[float]], turns: int) -> str:
    """bench/startup.md."""
    peer = any("trl" in name.lower() for name in seconds)
    told = "" if peer else " TRL was not at hand (PALATE_PEERS)."
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    lines = [
        "# Start-up",
        "",
        f"`python -m bench.startup` · {machine}, {os.cpu_count()} cores; medians of {turns} turns.{told}",
        "",
        "| | median | least – most |",
        "|---|---|---|",
    ]
    for name, spent in seconds.items():
        lines.append(f"| {name} | {median(spent):.2f} s | {min(spent):.2f} – {max(spent):.2f} s |")
    return "\n".join([*lines, "", NOTE])


NOTE = """Help loads neither torch nor pydantic: settings are read from the source. *First SFT step* is from the
start of the process until the step's metrics are on disk (palate) or the trainer has called its callback (TRL): a GPT-2
of two blocks of width 64 that is made from nothing, 8 rows. Palate also makes its data and trains its tokenizer in that
time; TRL is given token ids. *import torch* is what neither can do without.
"""


def main(words: Sequence[str]) -> int:
    """Measure and write the page; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.startup")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(words)
    peers = os.environ.get("PALATE_PEERS")
    text = page(measure(rows(Path(peers) if peers else None), asked.turns), asked.turns)
    asked.page.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
