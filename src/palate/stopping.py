"""Stopping on purpose: SIGTERM and SIGINT end a run at a place from which it goes on, with exit code 75."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from palate.parallel import World
from palate.settings import Stopped

_SECOND_THOUGHT = 2.0
"""Seconds after which another signal means "now": launchers send two in one breath."""


class Stopper:
    """Hears the signals. Alone, a run stops at once, unless it is in a `held` block; then at the block's end.

    Ranks of one run must stop at the same place: they only ever stop at the end of a `held` block, where they agree.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._asked_at: float | None = None
        self._held = False

    @contextmanager
    def listening(self) -> Generator[None]:
        """Take the signals over for the length of a run; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Generator[None]:
        """A block that is gone through to its end. Raises Stopped behind it when a stop was asked for.

        Inside another held block nothing is raised: the end of that one is the place to stop at.
        """
        outer, self._held = self._held, True
        try:
            yield
        finally:
            self._held = outer
        if not outer and self.world.any(self._asked_at is not None):
            raise Stopped

    @contextmanager
    def spared(self) -> Generator[None]:
        """A block that is gone through to its end and raises nothing behind it: the last save of a stopping run."""
        outer, self._held = self._held, True
        try:
            yield
        finally:
            self._held = outer

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > _SECOND_THOUGHT:
                raise KeyboardInterrupt
            return
        self._asked_at = now
        if self.world.size == 1 and not self._held:
            raise Stopped
