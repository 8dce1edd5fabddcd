"""Charts as SVG: every point within its axes, every number in a table, and nothing that a name could break."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from tensorway.cli.charts import Chart, Series
from tensorway.cli.pages import _factors, _Picture, _steps, charted, figure, number, page

VALUES = [(0.0,), (1.0, 1.0), (1e-9, 1e9), (-3.0, 4.0), (0.4, 0.9, 0.95), tuple(float(at) for at in range(200))]


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("width", [720, 344])
def test_points_are_within_the_axes(values, width):
    picture = _Picture(Chart("t", "x", (Series("a name", values),)), width, 300, labels=width > 500)
    for at, value in enumerate(values):
        assert picture.left <= picture.x(at) <= picture.right
        assert 0 < picture.y(value) < 300
    assert 2 <= len(picture.ticks) <= 8


@pytest.mark.parametrize("values", [(1.0,), (0.001, 4.0), (3.0, 3.5), (1e-9, 1e9)])
def test_equal_steps_of_a_log_scale_are_equal_factors(values):
    picture = _Picture(Chart("t", "x", (Series("a", values),), log=True), 720, 300, labels=True)
    low, high = picture.chart.range
    assert low < min(values) and max(values) < high
    ticks = picture.ticks
    assert 1 <= len(ticks) <= 7 and all(low <= tick <= high for tick in ticks)
    middle = picture.y(math.sqrt(low * high))
    assert middle == pytest.approx((picture.y(low) + picture.y(high)) / 2)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.3, 0.31), (-5.0, 1e6)])
def test_ticks_are_round_and_within(low, high):
    found = _steps(low, high)
    assert found == sorted(found) and 2 <= len(found) <= 8
    assert all(low - 1e-6 <= tick <= high + 1e-6 for tick in found)
    assert _factors(1.0, 1000.0) == [1.0, 10.0, 100.0, 1000.0]


def test_a_share_is_drawn_from_zero_and_a_span_cuts_nothing():
    chart = Chart("t", "x", (Series("a", (0.4, 1.2)),), span=(0, 1))
    assert (0, 1.2) == chart.range


def test_names_at_the_ends_of_lines_do_not_touch():
    series = tuple(Series(f"line {at}", (1.0, 1.0 + at / 1000)) for at in range(8))
    text = figure(Chart("t", "x", series), 0)
    places = [float(y) for y in re.findall(r'<text class="c\d" x="[\d.]+" y="([\d.-]+)"', text)]
    assert 8 == len(places)
    assert all(later - earlier >= 14.9 for earlier, later in itertools.pairwise(places))


def test_what_is_aside_is_gray_and_each_in_its_own_dashes():
    series = (Series("a", (1.0,)), Series("b", (1.0,), aside=True), Series("c", (2.0,), aside=True))
    classes = re.findall(r'<polyline class="line ([^"]+)"', figure(Chart("t", "x", series), 0))
    assert ["c0", "c8 dashed", "c8 dotted"] * 2 == classes
    assert "<polyline" not in figure(Chart("t", "x", series, joined=False), 0)


def test_a_name_is_only_a_name():
    chart = Chart("<b>", "<em>", (Series("<script>", (1.0,)),), ("<u>",), up="<s>")
    text = charted("<title>", [chart])
    assert not {"<b>", "<em>", "<script>", "<u>", "<s>", "<h1><title>"} & set(re.findall(r"<[^>]+>", text))


def test_a_page_has_one_name_for_each_of_its_parts():
    chart = Chart("t", "x", (Series("a", (1.0, 2.0)),))
    names = re.findall(r'id="([^"]+)"', charted("t", [chart, chart]))
    assert 8 == len(names) == len(set(names))
    for name in re.findall(r'aria-labelledby="([^"]+)"', charted("t", [chart])):
        assert set(name.split()) <= set(names)


def test_numbers_are_as_people_write_them():
    shown = ["0", "0.1235", "12.35", "1234", "12,346", "-12,346", "1e-09"]
    assert shown == [number(value) for value in (0, 0.12345, 12.345, 1234.0, 12345.6, -12345.6, 1e-9)]


def test_colors_can_be_read_on_their_paper():
    for paper, ink in _colors():
        assert 4.5 <= _contrast(paper, ink), (paper, ink)


def _colors():
    """Each color with each paper that it is on."""
    for rules in re.findall(r":root \{([^}]*)\}", page("t", [])):
        named = dict(re.findall(r"--(\w+): (#\w+)", rules))
        named = {
            name: color if len(color) == 7 else "#" + "".join(2 * c for c in color[1:]) for name, color in named.items()
        }
        inks = [color for name, color in named.items() if name not in ("paper", "card", "faint")]
        assert 10 == len(inks)
        yield from ((named[paper], ink) for paper in ("paper", "card") for ink in inks)


def _contrast(one, two):
    def light(color):
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((light(one), light(two)))
    return (high + 0.05) / (low + 0.05)
