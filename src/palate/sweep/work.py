"""The runs of a sweep at work: so many processes at once, each run in its own, whose end ends no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from palate.live import Display, duration
from palate.run import held
from palate.settings import PalateError, Resumable, Stopped
from palate.sweep.sharing import take_over, waits_for
from palate.sweep.sweep import Run, Sweep

LOG, FAILED = "log.txt", "FAILED"
_PAUSE = 0.1
_PATIENCE = 120.0
"""Seconds given to a run that an earlier sweep left behind, for its last checkpoint."""


@dataclass
class _AtWork:
    """A run and its process; the log is older runs' up to `said`."""

    run: Run
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    said: int
    began: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        """The process has ended: let its pipe and its log go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.log.close()


def work(sweep: Sweep, jobs: int, display: Display, finished: Callable[[Run], str]) -> dict[str, str]:
    """Make every run that is not done, `jobs` at a time; returns why each failed one did, by name.

    `finished` is called with each run that ended well, and says in a few words what came of it. When the sweep itself
    is stopped, or `finished` raises, the runs at work are stopped first, each behind a checkpoint.
    """
    done = [run for run in sweep.runs if run.is_done()]
    for run in done:
        (run.folder / FAILED).unlink(missing_ok=True)
    waiting = [run for run in sweep.runs if run not in done]
    if done:
        display.say(f"{len(done)} of {len(sweep.runs)} runs were done before")
        finished(done[0])
    crew = _Crew(sweep, jobs, display, finished, waiting)
    with _heard():
        try:
            while crew.waiting or crew.busy:
                crew.start_what_can()
                crew.collect()
                time.sleep(_PAUSE)
        finally:
            crew.stop()
    return crew.failed


class _Crew:
    """The processes of a sweep and what they still have to do."""

    def __init__(
        self, sweep: Sweep, jobs: int, display: Display, finished: Callable[[Run], str], waiting: Sequence[Run]
    ) -> None:
        self.sweep, self.jobs, self.display, self.finished = sweep, jobs, display, finished
        self.waiting, self.busy, self.failed = list(waiting), list[_AtWork](), dict[str, str]()
        self.total, self._times = len(waiting), list[float]()
        self._locked_since: dict[str, float] = {}

    def start_what_can(self) -> None:
        """Start runs while there is room, but none that needs a stage another is just making."""
        for run in list(self.waiting):
            if len(self.busy) >= self.jobs:
                return
            if not waits_for(run, [at.run for at in self.busy]) and self._make_ready(run):
                self.waiting.remove(run)
                self.busy.append(self._start(run))

    def _make_ready(self, run: Run) -> bool:
        """Take over stages that others finished; False while a process of an earlier sweep holds the folder."""
        try:
            with held(run.folder):
                taken = take_over(run, self.sweep.runs)
        except PalateError as fault:
            if time.monotonic() - self._locked_since.setdefault(run.name, time.monotonic()) > _PATIENCE:
                self.waiting.remove(run)
                self._fail(run, str(fault))
            return False
        if taken:
            self.display.say(f"{run.name}: {', '.join(taken)} taken over from a run with the same settings")
        return True

    def _start(self, run: Run) -> _AtWork:
        (run.folder / FAILED).unlink(missing_ok=True)
        command = [sys.executable, "-m", "palate.sweep.child", str(self.sweep.stored_recipe)]
        command += [str(self.sweep.recipe.parent), *run.assignments]
        log = (run.folder / LOG).open("ab")
        said = log.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(self.jobs, os.environ),
            start_new_session=True,  # Ctrl-C is for the sweep, which then stops its runs itself
        )
        return _AtWork(run, process, log, said)

    def collect(self) -> None:
        """See which processes have ended, and how."""
        for at in [a for a in self.busy if a.process.poll() is not None]:
            self.busy.remove(at)
            at.close()
            if at.process.returncode:
                self._fail(at.run, _reason(at.process.returncode, at.run.folder / LOG, at.said))
            else:
                self._times.append(time.monotonic() - at.began)
                self._tell(at.run, f"done in {duration(self._times[-1])}  {self.finished(at.run)}".rstrip())

    def _fail(self, run: Run, why: str) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / FAILED).write_text(f"{why}\n", encoding="utf-8", errors="replace")
        self.failed[run.name] = why
        self._tell(run, f"failed: {why}")

    def _tell(self, run: Run, what: str) -> None:
        left = len(self.waiting) + len(self.busy)
        mean = sum(self._times) / len(self._times) if self._times else 0.0
        rest = f"  ({duration(mean * left / self.jobs)} left)" if left and mean else ""
        self.display.say(f"[{self.total - left}/{self.total}] {run.name}: {what}{rest}")

    def stop(self) -> None:
        """Stop the runs at work and wait for their checkpoints."""
        for at in self.busy:
            at.process.send_signal(signal.SIGTERM)
        for at in self.busy:
            at.process.wait()
            at.close()


def environment(jobs: int, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a run: the threads that one process would use, divided among `jobs`."""
    text = given.get("OMP_NUM_THREADS", "")
    threads = int(text) if text.isdigit() and int(text) else os.cpu_count() or 1
    if jobs == 1 and not text:
        return dict(given)
    return {**given, "OMP_NUM_THREADS": str(max(1, threads // jobs))}


def _reason(code: int, log: Path, said: int) -> str:
    """Why a process ended, in a line: its own last words, or the signal that ended it."""
    if code < 0:
        return f"ended by signal {signal.Signals(-code).name}; see {log}"
    if code in (Stopped.exit_code, Resumable.exit_code, 130):
        return "stopped before its end; the same command goes on"
    text = log.read_bytes()[said:].decode("utf-8", "replace")
    words = [line for line in text.splitlines() if line.strip()]
    return words[-1].strip().removeprefix("palate: ") if words else f"exit code {code}"


@contextmanager
def _heard() -> Generator[None]:
    """SIGTERM stops a sweep as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
