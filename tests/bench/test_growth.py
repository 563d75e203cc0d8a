"""A power law is found again with its error, every series runs by the calls of a stage, and the page shows it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as Xml

import pytest

from bench import growth, growth_page, rig

TINY = rig.Shape(1, 16, 2, 300, 64)


def test_an_exact_power_law_has_no_error() -> None:
    found = growth.fit([1, 2, 4, 8, 16], [3 * x**1.5 for x in (1, 2, 4, 8, 16)])
    assert found.exponent == pytest.approx(1.5)
    assert found.factor == pytest.approx(3.0)
    assert found.error == pytest.approx(0.0, abs=1e-9)


def test_the_error_is_the_textbook_one() -> None:
    # log2 of x is 0, 1, 2; log2 of y is 0, 2, 1: slope 1/2, residuals −1/2, 1, −1/2, so s² = 3/2 over one degree
    found = growth.fit([1, 2, 4], [1, 4, 2])
    assert found.exponent == pytest.approx(0.5)
    assert found.error == pytest.approx(math.sqrt(1.5 / 2))


def test_every_series_has_five_sizes_that_grow() -> None:
    for one in growth.series():
        sizes = [one.cost(size) for size in one.sizes]
        assert len(sizes) == 5
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("number", range(7))
def test_every_series_can_be_measured(number: int) -> None:
    one = growth.series(TINY, 16)[number]
    seconds = growth.measure(one, 1)
    assert list(seconds) == [one.cost(size) for size in one.sizes]
    assert all(len(spent) == 1 and spent[0] > 0 for spent in seconds.values())


def test_page_and_picture_show_what_was_found() -> None:
    points = tuple((x, x * 1e-3, x * 0.9e-3, x * 1.2e-3) for x in (4, 8, 16, 32, 64))
    found = {"rows & all": growth_page.Found("rows", points, 1.0, 0.01, 1e-3, "1")}
    text = growth_page.page(found, "here")
    assert "| rows & all | 4 – 64 | 1.00 ± 0.01 | 1.00 | 1 |" in text
    assert "| least – most | 3.6 ms – 4.8 ms |" in text
    drawn = Xml.fromstring(growth_page.picture(found))
    assert len(drawn.findall(".//{*}circle")) == 5
