"""Charts: well-formed, to scale, escaped, and readable numbers."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.diagnosis import svg

NUMBERS = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False)


def parsed(text):
    return ElementTree.fromstring(text)


@given(st.lists(NUMBERS, min_size=1, max_size=6))
def test_a_scale_holds_every_value_and_has_few_round_ticks_inside(values):
    found = svg.scale(values, 0.0, 100.0)
    assert all(-1e-6 <= found(v) <= 100 + 1e-6 for v in values)
    assert 2 <= len(found.ticks) <= 8
    assert all(found.low - 1e-9 * abs(found.low) <= t <= found.high + 1e-9 * abs(found.high) for t in found.ticks)


@given(st.lists(NUMBERS, min_size=2, max_size=30))
def test_any_finite_series_draws_a_well_formed_chart_inside_its_frame(values):
    chart = parsed(svg.line_chart([svg.Line("a", list(enumerate(values)), "proxy")], "title"))
    for circle in chart.iter("circle"):
        assert 0 <= float(circle.get("cx")) <= 410
        assert 0 <= float(circle.get("cy")) <= 230


def test_higher_values_are_drawn_higher():
    chart = parsed(svg.line_chart([svg.Line("a", [(0, 1.0), (1, 5.0)], "proxy")], "title"))
    low, high = [float(c.get("cy")) for c in chart.iter("circle") if c.get("class") == "hover"]
    assert high < low


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (1, "1"), (-0.25, "−0.25"), (0.1234, "0.123"), (1234, "1234"), (12345, "12.3k"), (2.5e6, "2.5M"),
        (7e9, "7B"), (3e-4, "0.0003"), (1.2e-5, "1.2e−5"), (-2e15, "−2e15"), (999.6, "1000"), (999.4, "999"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, shown):
    assert svg.short(value) == shown


def test_words_of_others_are_escaped_wherever_they_enter():
    hostile = '"/><script>alert(1)</script>&'
    drawings = [
        svg.line_chart([svg.Line(hostile, [(0, 0), (1, 1)], "proxy")], hostile, hostile, hostile),
        svg.frontier([svg.Line(hostile, [(0, 0), (1, 1), (2, 0)], "gold")], hostile, hostile, hostile),
        svg.bars([svg.Bar(hostile, 0.5, "proxy", 0.4, 0.6)], hostile),
        svg.interval_bar(0.5, 0.4, 0.6, 0.5, hostile),
        svg.sparkline([(0, 1), (1, 2)], hostile),
        svg.calibration_chart([(0.6, 0.7, 1.0)], hostile),
    ]
    for drawing in drawings:
        assert not list(parsed(drawing).iter("script"))
        assert parsed(drawing).get("aria-label") == hostile
        assert parsed(drawing).find("title").text == hostile


def test_bars_are_as_long_as_their_shares():
    chart = parsed(svg.bars([svg.Bar("a", 0.25, "proxy"), svg.Bar("b", 0.5, "gold")], "title"))
    quarter, half = [float(r.get("width")) for r in chart.iter("rect") if "fill" in r.get("class")]
    assert half == pytest.approx(2 * quarter, abs=0.2)


def test_thinning_keeps_both_ends():
    points = [(i, i) for i in range(1000)]
    found = svg.thin(points, 60)
    assert len(found) <= 61
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert svg.thin(points[:5], 60) == points[:5]


def test_constant_series_still_get_a_scale_of_some_width():
    found = svg.scale([3.0, 3.0], 0.0, 100.0)
    assert found.low < 3 < found.high
    assert math.isfinite(found(3.0))
