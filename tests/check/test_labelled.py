"""`palate check` on thumbs, corrections, ratings and steps: the rows are shown with what was said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.check.conftest import Check, sft, write_rows

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "kto": ({"kind": "kto"}, {"completion": " yes", "label": True}, "thumb"),
    "ddpo": ({"kind": "ddpo"}, {"original": " no no", "corrected": " yes"}, "changed by the correction"),
    "ratings": ({"kind": "reward", "loss_type": "regression"}, {"completion": " yes", "rating": 2}, "rated"),
    "steps": ({"kind": "reward", "loss_type": "binary"}, {"completions": ["a", "b"], "labels": [True, True]}, "thumb"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_shown_and_measured(name: str, checked: Check, model: Path, tmp_path: Path) -> None:
    algorithm, row, shown = ROWS[name]
    other = {**row, "label": False, "rating": 1, "labels": [False, False]}
    rows = [{"prompt": f"say {n}:", **{k: (row, other)[n % 2][k] for k in row}} for n in range(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = checked(sft(str(model), str(data), algorithm=algorithm, microbatch_size=1), measure=True)
    (stage,) = found.stages
    assert not stage.seen.faults
    said = " ".join(f"{one.title} {' '.join(one.notes)}" for one in stage.seen.examples)
    assert shown in said


def test_what_cannot_be_learnt_from_is_a_fault_and_uneven_thumbs_a_warning(
    checked: Check, model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"say {n}:", "completion": " yes", "label": n < 1} for n in range(8)]
    uneven = write_rows(tmp_path / "uneven.jsonl", rows)
    alike = write_rows(tmp_path / "alike.jsonl", [{**row, "label": True} for row in rows])
    first, second = (
        checked(sft(str(model), str(path), algorithm={"kind": "kto"})).stages[0].seen for path in (uneven, alike)
    )
    assert not first.faults
    assert any("weigh 0.143 times the 7 with a thumb down" in text for text in first.warnings)
    assert any("all 8 answers have a thumb up" in text for text in second.faults)
