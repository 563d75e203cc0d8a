"""One attempt at a run: a real process that works until it ends, is killed by the clock, or ends itself at a moment.

Most attempts are forked from a process that has imported everything, which saves seconds each; the fork happens before
torch has started a thread, so a child is as good as a process of its own. Some attempts are processes of their own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.moments import Moment
from palate import cli
from palate.workspace import Workspace

LIMIT = 300.0
"""Seconds after which an attempt hangs."""
ASKED_TO_STOP = 75


@dataclass(frozen=True)
class Attempt:
    """What is tried: `run` on a recipe, in one run directory. Files beside that directory belong to the harness."""

    recipe: Path
    run: Path
    words: Sequence[str] = ()

    @property
    def arguments(self) -> list[str]:
        """The words of the command line behind `palate`."""
        return ["run", str(self.recipe), f"output_dir={self.run.parent}", f"name={self.run.name}", *self.words]

    @property
    def log(self) -> Path:
        """What the process said."""
        return self.run.parent / f"{self.run.name}.log"

    @property
    def first_step(self) -> Path:
        """When a forked process logged its first metrics, by the monotonic clock."""
        return self.run.parent / f"{self.run.name}.first_step"


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: its exit code, or minus the signal that ended it."""

    code: int
    began: float
    """Seconds of the wall clock since the epoch: files that are newer were written by it."""
    seconds: float
    to_first_step: float | None
    """Seconds from its start to the first metrics it logged; only forked attempts know."""
    said: str
    """The end of what it said."""


def fork(attempt: Attempt, moment: Moment | None = None, kill_after: float | None = None) -> Ended:
    """Run in a child of this process, which must not have started a thread."""
    attempt.run.parent.mkdir(parents=True, exist_ok=True)
    attempt.first_step.unlink(missing_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _be_the_command(attempt, moment)
    return _wait(attempt, pid, began, kill_after)


def spawn(attempt: Attempt, environment: Mapping[str, str], kill_after: float | None = None) -> Ended:
    """Run `python -m palate` in a process of its own. A kill counts from where it opens the run directory."""
    attempt.run.parent.mkdir(parents=True, exist_ok=True)
    attempt.first_step.unlink(missing_ok=True)
    began = time.monotonic()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    output = [(os.POSIX_SPAWN_OPEN, 1, str(attempt.log), flags, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
    words = [sys.executable, "-m", "palate", *attempt.arguments]
    pid = os.posix_spawn(sys.executable, words, environment, file_actions=output)
    lock = attempt.run / ".lock"
    while kill_after is not None and not lock.exists() and time.monotonic() - began < LIMIT:
        time.sleep(0.002)
    opened = time.monotonic() - began
    return _wait(attempt, pid, began, None if kill_after is None else opened + kill_after)


def _be_the_command(attempt: Attempt, moment: Moment | None) -> None:
    """The child's life; it never comes back."""
    code = 1
    try:
        output = os.open(attempt.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["palate", *attempt.arguments]
        _note_first_step(attempt.first_step)
        if moment is not None:
            moment.arm(attempt.run)
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the child must not return into its parent's code, whatever happened
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _note_first_step(path: Path) -> None:
    log = Workspace.log

    def noting(self: Workspace, step: int, metrics: Mapping[str, float]) -> None:
        if not path.exists():
            path.write_text(repr(time.monotonic()), encoding="utf-8")
        log(self, step, metrics)

    Workspace.log = noting  # this process is a copy that lives for one attempt


def _wait(attempt: Attempt, pid: int, began: float, kill_after: float | None) -> Ended:
    """Wait for the end of a process; it is killed `kill_after` seconds after it began."""
    wall = time.time() - (time.monotonic() - began)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        passed = time.monotonic() - began
        if passed > (LIMIT if kill_after is None else kill_after):
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    seconds = time.monotonic() - began
    if kill_after is None and seconds > LIMIT:
        raise TimeoutError(f"{' '.join(attempt.arguments)} did not end in {LIMIT:.0f} s; see {attempt.log}")
    noted = attempt.first_step
    first = float(noted.read_text(encoding="utf-8")) - began if noted.exists() else None
    said = attempt.log.read_text(encoding="utf-8", errors="replace")[-2000:] if attempt.log.exists() else ""
    return Ended(os.waitstatus_to_exitcode(status), wall, seconds, first, said)
