"""Ten thousand damaged data files through every reader; see fuzzing.py for what is done to them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from palate.data.source import Data, load
from tests.data import fuzzing

COUNT = 10_000


@pytest.mark.slow
def test_no_damaged_file_gives_a_traceback_a_hang_or_an_error_without_a_place() -> None:
    """In a process of its own: a reader that crashes in C must not take the suite with it."""
    words = [sys.executable, fuzzing.__file__, str(COUNT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode in (0, 1), f"the reader crashed: {done.stderr[-2000:]}"
    figures = json.loads(done.stdout)
    assert not figures["failures"], "\n".join(figures["failures"][:20])
    assert figures["files"] == COUNT
    assert figures["accepted"] > COUNT // 10, "the damage leaves some files readable"
    assert figures["refused"] > COUNT // 3, "the damage is seen"
    print(json.dumps(figures))


def test_undamaged_every_file_is_read(tmp_path: Path) -> None:
    """What the fuzzer starts from is right, so that a refusal is the damage's doing."""
    for kind in dict.fromkeys(fuzzing.KINDS):
        folder = tmp_path / kind
        folder.mkdir()
        for number, row in enumerate(fuzzing.ROWS):
            inner = folder / str(number)
            inner.mkdir()
            assert load(Data(path=str(fuzzing.write_seed(inner, kind, [row]))), 0), (kind, row)
