"""How the runner talks to a worker: a line of JSON each way per turn, over pipes. Standard library only.

A worker does nothing but wait between its turns, so that two systems can stay in memory and take turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Report = dict[str, Any]


def peak_mb() -> float:
    """The most memory this process had resident since its program began, in MiB."""
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_seconds() -> float:
    """Processor time of this process, all threads, and of its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Link:
    """A worker's end. What libraries print goes to stderr, so that stdout carries the protocol alone.

    `settle` waits for a device that computes on its own, before a clock is read; `peak` is the most memory so far.
    """

    settle: Callable[[], object] = staticmethod(lambda: None)
    peak: Callable[[], float] = staticmethod(peak_mb)

    def __init__(self, asked: TextIO | None = None, told: TextIO | None = None) -> None:
        if told is None:
            told = os.fdopen(os.dup(1), "w", encoding="utf-8")
            os.dup2(2, 1)
        self._asked, self._told = asked or sys.stdin, told
        self._began, self._spent = 0.0, 0.0
        self.turn = -1
        """The turn being taken, from 0."""

    def ready(self, **facts: Any) -> None:
        """Everything is loaded; `facts` are versions and the like."""
        self._say({"ready": True, **facts})

    def wait(self) -> bool:
        """Wait for the next turn and start its clock; False when there will be none."""
        if not self._asked.readline().strip():
            return False
        self.turn += 1
        self.settle()
        self._began, self._spent = time.perf_counter(), cpu_seconds()
        return True

    def done(self, **report: Any) -> None:
        """The turn is over: stop its clock and tell what it was."""
        self.settle()
        seconds, spent = time.perf_counter() - self._began, cpu_seconds() - self._spent
        self._say({"seconds": seconds, "cpu": spent, "peak_mb": self.peak(), **report})

    def leave(self) -> None:
        """End this process from inside a library's loop, which would otherwise go on."""
        self._told.flush()
        os._exit(0)

    def _say(self, report: Mapping[str, Any]) -> None:
        self._told.write(json.dumps(report) + "\n")
        self._told.flush()


def serve(link: Link, turn: Callable[[int], Report]) -> None:
    """Take turns until the runner has had enough."""
    while link.wait():
        link.done(**turn(link.turn))
