"""Which library multiplies float32 matrices on the CPU in a run: measured once, recorded, and kept when it goes on.

Two libraries round differently. So a run that was stopped goes on with the one that it began with, whatever a new
measurement would say, and only another processor makes it measure again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from palate.models import linear
from palate.provenance import processor
from palate.settings import PalateError

Asked = Literal["auto", "plain", "writing", "onednn"]


@dataclass(frozen=True)
class Choice:
    """The back end of a run, as provenance.json keeps it.

    `gain` is how many times as fast as torch's own products oneDNN's were in a step that learns, `writing` while
    answers are written; None where a setting decided.
    """

    asked: Asked
    backend: linear.Backend
    gain: float | None
    writing: float | None
    processor: str
    moved: bool = False
    """Whether the run began on another processor."""

    @property
    def record(self) -> dict[str, Any]:
        """What provenance.json holds of it."""
        return {key: value for key, value in asdict(self).items() if key != "moved"}

    @property
    def line(self) -> str:
        """The choice in a line for people."""
        if self.gain is None:
            why = "as asked"
        elif not self.gain:
            why = "this torch has no oneDNN products in float32"
        else:
            why = (
                f"oneDNN is {self.gain:.2f}x as fast as torch's own, {self.writing or 0:.2f}x while answers are written"
            )
        again = "; measured again, as the run began on another processor" if self.moved else ""
        return f"matrix products on the CPU: {self.backend} ({why}{again})"


def choose(asked: Asked, earlier: Mapping[str, Any]) -> Choice:
    """The back end that was asked for, or the one that an earlier session of the run measured, or the faster one.

    `earlier` is that session's record, empty where there is none. Raises PalateError when oneDNN is asked for and
    missing.
    """
    here = processor()
    if asked != "auto":
        if linear.use(asked) != asked:
            raise PalateError(
                "linear: oneDNN was asked for, but this torch cannot multiply float32 matrices by it. "
                "Write linear: auto or plain."
            )
        return Choice(asked, asked, None, None, here)
    known = earlier.get("asked") == "auto" and earlier.get("backend") in get_args(linear.Backend)
    if known and earlier.get("processor") == here:
        gain, writing = (float(earlier.get(name) or 0) for name in ("gain", "writing"))
        return Choice(asked, cast(linear.Backend, earlier["backend"]), gain, writing, here)
    gains = linear.gains()
    return Choice(asked, gains.best, round(gains.learning, 2), round(gains.writing, 2), here, moved=known)
