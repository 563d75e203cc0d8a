"""Two workers take turns: one warm-up turn each, then round by round, palate first. Turns that others disturbed are
taken again."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.speed.machine import LIMIT, Watch, wait_for_quiet
from bench.speed.systems import ROOT, System

PATIENCE = 900.0
"""Seconds a worker may take to load, or for one turn."""
AGAIN = 2
"""How often a disturbed turn is taken again at most, on average over the rounds."""


class WorkerError(RuntimeError):
    """A worker ended or fell silent; the text ends with what it had printed last."""


@dataclass(frozen=True)
class Turn:
    """One turn as it is kept: the worker's report, and the share of the machine that others used meanwhile."""

    report: Mapping[str, Any]
    others: float

    @property
    def clean(self) -> bool:
        """Whether it counts."""
        return self.others <= LIMIT


class Takes(Protocol):
    """What the runner asks of a worker."""

    def take(self) -> Mapping[str, Any]:
        """Take a turn; its report."""
        ...


class Worker:
    """A process of one system, from its start to the end of its row."""

    def __init__(self, system: System, row: Path) -> None:
        self.system = system
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [*system.command, str(row)],
            cwd=ROOT,
            env=system.environment(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.facts = self._read()

    def take(self) -> Mapping[str, Any]:
        """Take a turn; its report."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words("ended")) from None
        return self._read()

    def close(self) -> None:
        """No more turns."""
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            if not ready.select(PATIENCE):
                raise WorkerError(self._last_words(f"said nothing for {PATIENCE:.0f} s"))
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words("ended"))
        return json.loads(line)

    def _last_words(self, what: str) -> str:
        self._errors.seek(0)
        said = self._errors.read()[-2000:].decode(errors="replace").strip()
        return f"{self.system.name}: its worker {what}.\n{said}"


@dataclass
class Taken:
    """The turns of one system: the warm-up, and all others in their order."""

    warm_up: Turn
    turns: list[Turn] = field(default_factory=list[Turn])

    @property
    def clean(self) -> int:
        """How many count."""
        return sum(turn.clean for turn in self.turns)


def take(worker: Takes, patience: float) -> Turn:
    """One turn, when the machine is quiet, or `patience` seconds later."""
    wait_for_quiet(patience)
    watch = Watch.start()
    report = worker.take()
    return Turn(report, watch.others(report["cpu"]))


def rounds(workers: Sequence[Takes], count: int, patience: float = 60.0) -> list[Taken]:
    """Turns in turn until each worker has `count` that count, or has been asked as often as is sensible."""
    found = [Taken(take(worker, patience)) for worker in workers]
    for _ in range(count * (1 + AGAIN)):
        for worker, taken in zip(workers, found, strict=True):
            if taken.clean < count:
                taken.turns.append(take(worker, patience))
        if all(taken.clean >= count for taken in found):
            break
    return found
