"""One run of a sweep in a process of its own: `python -m palate.sweep.child RECIPE CODE_FOLDER key=value ...`.

Its standard input is a pipe that the sweep holds: when the sweep is gone, however it ended, the pipe closes and the
run stops behind a checkpoint, as it does on SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from palate import catalogue
from palate.diagnosis import report
from palate.live import Display
from palate.run import execute, plan_file
from palate.settings import PalateError, Stopped


def main(words: Sequence[str]) -> int:
    """Make the run and its report; returns the exit code, whose meanings are those of `palate run`."""
    recipe, code, *assignments = words
    catalogue.find_own_code(Path(code))
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    display = Display()
    try:
        outcome = execute(plan_file(Path(recipe), assignments), display, ["palate", "run", recipe, *assignments])
    except PalateError as fault:
        print(f"palate: {fault}", file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt as stop:
        return stop.exit_code if isinstance(stop, Stopped) else 130
    try:
        report.write(outcome.folder)
    except Exception as fault:  # the run is done and safe; a page about it is not worth an exit code
        display.warn(f"the report could not be written: {fault}")
    return 0


def _stop_with_the_sweep() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold while Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
