"""A stage stopped in its middle and started again, beside the same stage gone through at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from palate.cast import Cast
from palate.settings import Choice, Stopped
from tests.stages import tiny_runs as tiny


def goes_on(folder: Path, algorithm: type[Choice], stage: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The metrics of a stage that was stopped behind optimiser step `step`; fails where it ends otherwise than whole.

    Weights and metrics have to be the same bit for bit.
    """
    whole = tiny.run(folder, stage, name="whole")
    with pytest.MonkeyPatch.context() as patch:
        after = algorithm.after  # type: ignore[attr-defined]

        def stopping(self: Any, cast: Cast, number: int) -> None:
            after(self, cast, number)
            if number == step:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(algorithm, "after", stopping)
        with pytest.raises(Stopped):
            tiny.run(folder, stage, name="stopped")
    again = tiny.run(folder, stage, name="stopped")
    place = f"1-{stage['name']}"
    rows = tiny.timeless(tiny.lines(whole / place / "metrics.jsonl"))
    assert step < len(rows)
    assert tiny.timeless(tiny.lines(again / place / "metrics.jsonl")) == rows
    assert tiny.equal(tiny.weights(again / place), tiny.weights(whole / place))
    return rows
