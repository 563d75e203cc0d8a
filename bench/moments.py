"""Exact moments at which a process ends itself: at a call of a function, or at a step it takes on the disk.

Nothing in palate knows of this. The process that is to die arms a moment before it starts the command line: a named
function is wrapped, or Python's audit events are listened to, and at the nth time the process sends itself a signal.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ON_DISK = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


@dataclass(frozen=True)
class Call:
    """Before (or after) the nth call of `function`, counted once the file `once` is in the run directory."""

    name: str
    function: str
    """`module:name` or `module:Class.name`."""
    nth: int = 1
    after: bool = False
    once: str = "run.yaml"
    signal: int = signal.SIGKILL

    def arm(self, run: Path) -> None:
        """Wrap the function, in this process."""
        module, _, path = self.function.partition(":")
        *owners, name = path.split(".")
        owner = functools.reduce(getattr, owners, import_module(module))
        function = getattr(owner, name)
        strike = _Countdown(self.nth, self.signal)

        @functools.wraps(function)
        def wrapped(*args: Any, **more: Any) -> Any:
            counts = (run / self.once).exists()
            if counts and not self.after:
                strike()
            result = function(*args, **more)
            if counts and self.after:
                strike()
            return result

        setattr(owner, name, wrapped)


@dataclass(frozen=True)
class OnDisk:
    """Before the nth step on the disk of this kind whose path matches, counted once `once` is in the run directory."""

    name: str
    event: str
    """One of `ON_DISK`."""
    path: str
    """A regular expression that is searched for in the first path of the event."""
    nth: int = 1
    once: str = "run.yaml"
    signal: int = signal.SIGKILL

    def arm(self, run: Path) -> None:
        """Listen, in this process, for the rest of its life."""
        strike, pattern = _Countdown(self.nth, self.signal), re.compile(self.path)

        def heard(event: str, path: str) -> None:
            if event == self.event and pattern.search(path) and os.path.exists(run / self.once):
                strike()

        listen(run, heard)


@dataclass(frozen=True)
class NthOnDisk:
    """Before the nth step of any kind that changes the run directory."""

    nth: int
    signal: int = signal.SIGKILL

    @property
    def name(self) -> str:
        """What it is called."""
        return f"before step {self.nth} on the disk"

    def arm(self, run: Path) -> None:
        """Listen, in this process, for the rest of its life."""
        strike = _Countdown(self.nth, self.signal)
        listen(run, lambda event, path: strike())


@dataclass(frozen=True)
class Both:
    """Two moments; the process ends at the second."""

    name: str
    first: Call | OnDisk
    second: Call | OnDisk

    @property
    def signal(self) -> int:
        """What ends the process."""
        return self.second.signal

    def arm(self, run: Path) -> None:
        """Both of them, in this process."""
        self.first.arm(run)
        self.second.arm(run)


Moment = Call | OnDisk | NthOnDisk | Both


class _Countdown:
    """Sends this process a signal at the nth call, once."""

    def __init__(self, nth: int, number: int) -> None:
        self.left, self.signal = nth, number

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signal)


def listen(run: Path, heard: Callable[[str, str], object]) -> None:
    """Call `heard(event, path)` before every step of this process that changes something in the run directory.

    Names without a folder are those of a tree that is being removed; palate removes no other trees.
    """
    inside = f"{run}{os.sep}"

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in ON_DISK or not isinstance(args[0], str | os.PathLike):
            return
        path = os.fspath(args[0])
        changes = event != "open" or bool(args[2] & WRITES)
        if changes and isinstance(path, str) and (path.startswith(inside) or os.sep not in path):
            heard(event, path)

    sys.addaudithook(hook)
