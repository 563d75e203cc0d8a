"""The shapes of learning curves: each statement holds on curves of that shape and fails when one curve is bent."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from bench.curves import PANELS, Rows, draw, locked_from, mean_shape, shape, statements, table

TARGET = 6.0
STEPS = 100
BENT = {
    "KL ends within 10 % of its target": ("objective/kl", lambda t: 9.0),
    "score rises": ("objective/scores", lambda t: -t),
    "entropy falls": ("objective/entropy", lambda t: 40 + t),
    "clip fraction of the last tenth is below a third of the first third's": ("policy/clipfrac_avg", lambda t: 0.01),
    "approxkl of the last tenth is below a third of the first third's": ("policy/approxkl_avg", lambda t: 0.01),
}


def published_shape(index: int) -> dict[str, float]:
    t = index / (STEPS - 1)
    return {
        "episode": 64.0 * (index + 1),
        "objective/kl": min(20 * t, TARGET),
        "objective/scores": -0.4 + 2 * t,
        "objective/entropy": 53 - 10 * t,
        "objective/kl_coef": 0.15 + 0.1 * t,
        "policy/clipfrac_avg": 0.0016 * (1 - t),
        "policy/approxkl_avg": 4.5e-4 * (1 - t) ** 2,
    }


ROWS: Rows = [published_shape(i) for i in range(STEPS)]


def test_the_published_shape_makes_every_statement_true() -> None:
    assert set(statements(shape(ROWS, TARGET), TARGET)) == set(BENT)
    assert all(statements(shape(ROWS, TARGET), TARGET).values())


@pytest.mark.parametrize("statement", BENT)
def test_one_bent_curve_makes_one_statement_false(statement: str) -> None:
    metric, curve = BENT[statement]
    bent = [{**row, metric: curve(i / (STEPS - 1))} for i, row in enumerate(ROWS)]
    assert [s for s, holds in statements(shape(bent, TARGET), TARGET).items() if not holds] == [statement]


def test_starts_are_of_the_first_fiftieth_and_ends_of_the_last_tenth() -> None:
    found = shape(ROWS, TARGET)
    assert found.score_start == pytest.approx(-0.4 + 2 * (0 + 1) / 2 / 99)  # two of a hundred rows
    assert found.score_end == pytest.approx(-0.4 + 2 * (90 + 99) / 2 / 99)
    assert found.beta_least == 0.15
    assert found.kl_end == found.kl_peak == TARGET


def test_a_kl_is_locked_from_where_its_average_stays_near_the_target() -> None:
    assert locked_from([6.0] * 50, TARGET) == 0.0
    assert locked_from([9.0] * 50, TARGET) == 1.0
    # An average of ten with k values of 4 in it is 6 − k/5, within 15 % of 6 for k ≤ 4: from value 26 on.
    assert locked_from([4.0] * 30 + [6.0] * 70, TARGET) == pytest.approx(0.26)
    assert locked_from([6.0] * 50 + [9.0] * 10 + [6.0] * 40, TARGET) > 0.5  # leaving again counts


def test_the_mean_over_seeds_and_the_table() -> None:
    other = [{**row, "objective/kl": 9.0} for row in ROWS]
    shapes = {1: shape(ROWS, TARGET), 2: shape(other, TARGET)}
    assert mean_shape(list(shapes.values())).kl_end == pytest.approx(7.5)
    page = table(shapes, TARGET)
    assert "| KL, last tenth | 6.00 | 9.00 | 7.50 |" in page
    assert "- KL ends within 10 % of its target: seeds 1 of 1, 2" in page


def test_the_picture_is_one_wellformed_svg_with_a_thick_line_and_a_thin_one_for_each_seed() -> None:
    root = ElementTree.fromstring(draw([ROWS, ROWS, ROWS], TARGET))
    paths = [node.get("class") for node in root.iter() if node.tag.endswith("path")]
    for _, _, style in PANELS:
        panels = sum(1 for panel in PANELS if panel[2] == style)
        assert paths.count(f"line seed {style}") == 3 * panels
        assert paths.count(f"line {style}") == panels
    assert paths.count("line target") == 1
    assert "nan" not in draw([ROWS], TARGET)
