"""Where the numbers of a run go: JSON lines always, other trackers when asked for and only while they work."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from palate.settings import PalateError, nearest

Warn = Callable[[str], None]
_TEXT: Any = {"encoding": "utf-8", "errors": "replace"}  # byte-level models can say half a character


class JsonLines:
    """A file of JSON objects, one a line, each with its `step`; steps never go back, so a curve never forks.

    The first append after opening cuts away what an earlier process had written at or after that step, as
    does `cut`. A line torn by a kill is dropped the same way. Numbers that are not finite are written as
    null. A file that cannot be written (a full disk) raises PalateError and is left with the lines it had.
    """

    def __init__(self, path: Path, keep: bool = False) -> None:
        """`keep`: the first append cuts nothing away; what earlier processes said stays true."""
        self.path = path
        self._keep = keep
        self._opened = False

    def append(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows of one step."""
        if not self._opened:
            self.cut(math.inf if self._keep else step - 1)
        lines = [json.dumps({"step": step, **_finite(dict(row))}, ensure_ascii=False) + "\n" for row in rows]
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", **_TEXT) as file:
                file.write("".join(lines))
        except OSError as fault:
            with contextlib.suppress(OSError):  # half a line would spoil the next one
                os.truncate(self.path, before)
            raise self._unwritten(fault) from fault

    def cut(self, step: float) -> None:
        """Keep only what was said up to and including `step`."""
        self._opened = True
        if not self.path.exists():
            return
        kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.read() if row["step"] <= step]
        shorter = self.path.with_name(f".{self.path.name}.shorter")
        try:
            shorter.write_text("".join(kept), **_TEXT)
            os.replace(shorter, self.path)
        except OSError as fault:
            with contextlib.suppress(OSError):
                shorter.unlink()
            raise self._unwritten(fault) from fault

    def _unwritten(self, fault: OSError) -> PalateError:
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else fault.strerror or str(fault)
        move = "Make room" if full else "Mend that"
        return PalateError(f"{self.path}: cannot be written: {what}. {move} and run the same command again.")

    def read(self) -> list[dict[str, Any]]:
        """Every whole line of the file, in order."""
        rows: list[dict[str, Any]] = []
        if self.path.exists():
            for line in self.path.read_bytes().splitlines():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue  # the process was killed in the middle of this line
                if isinstance(row, dict) and isinstance(cast(dict[str, Any], row).get("step"), int | float):
                    rows.append(cast(dict[str, Any], row))
        return rows


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in cast(dict[str, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in cast(Sequence[Any], value)]
    return value


class Tracker(Protocol):
    """Something outside palate that draws curves."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of one step."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class _TensorBoard:
    """Curves in RUN/tensorboard/STAGE; see them with `tensorboard --logdir RUN/tensorboard`."""

    def __init__(self, run: Path, stage: str, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard" / stage), purge_step=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    """One Trackio run per stage, in a project called like the palate run."""

    def __init__(self, run: Path, stage: str, settings: Mapping[str, Any], step: int) -> None:
        trackio: Any = import_module("trackio")
        self._run: Any = trackio.init(project=run.name, name=stage, config=dict(settings), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _WandB:
    """One W&B run per stage, grouped under the palate run. W&B's own environment variables say where it goes."""

    def __init__(self, run: Path, stage: str, settings: Mapping[str, Any], step: int) -> None:
        wandb: Any = import_module("wandb")
        self._run: Any = wandb.init(
            project="palate", group=run.name, name=f"{run.name}/{stage}", dir=str(run), config=dict(settings)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


Opener = Callable[[Path, str, Mapping[str, Any], int], Tracker]
TRACKERS: Mapping[str, Opener] = {"tensorboard": _TensorBoard, "trackio": _Trackio, "wandb": _WandB}


def require_known(names: Iterable[str]) -> None:
    """Refuse a `report_to` that names a tracker palate does not know."""
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise PalateError(f"report_to: no tracker is called {name!r}.{nearest(name, TRACKERS)} Known: {known}.")


class Trackers:
    """The trackers of one stage. One that fails is told about once and then left alone; training goes on."""

    def __init__(
        self, openers: Mapping[str, Opener], run: Path, stage: str, settings: Mapping[str, Any], warn: Warn
    ) -> None:
        self._closed = dict(openers)
        self._open: dict[str, Tracker] = {}
        self._where = (run, stage, settings)
        self._warn = warn

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of one step everywhere. A tracker is opened by the first step it is shown."""
        for name, opener in list(self._closed.items()):
            del self._closed[name]
            self._try(name, lambda opener=opener, name=name: self._open.update({name: opener(*self._where, step)}))
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, metrics))

    def close(self) -> None:
        """Finish every tracker that still works."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as fault:  # whatever a tracker raises, it is not worth a run
            self._open.pop(name, None)
            self._warn(
                f"{name} is switched off for this stage: {type(fault).__name__}: {fault}. Training goes on; "
                "metrics.jsonl has every number."
            )
