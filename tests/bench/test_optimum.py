"""The table of the exact optimum without its training: rows, ends, page, picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import optimum_page
from bench.optimum_fixed import ends
from bench.optimum_page import end_of, name_of
from bench.optimum_rows import ROWS, stage
from palate.settings import build
from palate.worlds import enumerable


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_a_stage(row: str, tmp_path: Path):
    for beta in (0.5, 0.1):
        found = build("stages", stage(ROWS[row], beta, tmp_path, 2), "stages.0")
        assert found.model_dump()["encoding"]["max_length"] == 5
        assert ROWS[row].bands[beta][0] < ROWS[row].bands[beta][1]


def test_ends_are_the_published_ones():
    """What an independent prototype computed for world 1."""
    published = {
        ("ipo, sum", 0.5): 0.423,
        ("ipo, sum", 0.1): 0.749,
        ("best of n", 0.5): 0.872,
        ("best of n", 0.1): 0.964,
    }
    published |= {("online dpo, argmax labels", 0.5): -1.695, ("dpo", 0.5): 1.0}
    for (row, beta), share in published.items():
        assert ends(row, enumerable.world(1), beta) == pytest.approx(share, abs=1e-3)
    assert ends("kto", enumerable.world(1), 0.5) is None
    assert 0.89 < (ends("dr grpo, k3 loss", enumerable.world(1), 0.5) or 0) < 0.913  # 8 answers: a little lower


def test_the_page_marks_what_is_outside_its_band():
    run = {"share": 0.99, "kl_from_best": 0.01, "kl_from_reference": 0.8, "cpu_seconds": 9.0, "seconds": 10.0}
    known = {name_of(row, 1, 0.5, 1): run for row in ("rloo", "dr grpo, k3 loss")}
    known[end_of("dr grpo, k3 loss", 1, 0.5)] = {"share": 0.905}
    good, wrong = optimum_page.table(optimum_page.lines(known, 1, 0.5, (1, 2)))[2:]
    assert "0.9900 |" in good
    assert "✗" not in good
    assert "0.9900 ✗" in wrong
    assert "0.905" in wrong
    picture = optimum_page.picture({"world 1": optimum_page.lines(known, 1, 0.5, (1, 2))})
    assert picture.count("<circle") == 2
    assert picture.count('class="end"') == 1


def test_bands_of_another_world_lie_around_its_own_ends():
    assert optimum_page.band("ipo, sum", 2, 0.5, 0.332) == (0.289, 0.375)
    assert optimum_page.band("rloo", 2, 0.5, 1.0) == ROWS["rloo"].bands[0.5]
    assert optimum_page.band("dpo", 2, 0.5, 1.0) is None, "20,000 pairs cover another world otherwise"
    assert optimum_page.band("simpo 2, .5", 2, 0.5, None) is None
