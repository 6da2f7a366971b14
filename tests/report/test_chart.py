import re
from statistics import fmean
from xml.etree import ElementTree

import pytest

from mini_r1.report.chart import MAX_POINTS, Curve, binned, figure, limits, line_chart, round_ticks

# The edges of the plot in a chart of the page.
LEFT, RIGHT, TOP, BOTTOM = 50, 332, 10, 150
RISING = Curve("run", [(5, 0.25), (10, 0.5), (20, 1.0)])


def svg_of(curves, standalone=False):
    svg = figure("Title", curves, "step", "share") if standalone else line_chart("Title", curves)
    return ElementTree.fromstring(re.sub(' xmlns="[^"]+"', "", svg))


def corners(shape):
    return [tuple(map(float, pair.split(","))) for pair in shape.get("points").split()]


def line_of(svg, kind="c0"):
    """The last one: in a figure, the legend's comes first."""
    return corners(svg.findall(f"polyline[@class='{kind}']")[-1])


# ---- Where things are -----------------------------------------------------------------------


def test_a_known_value_is_at_its_known_place():
    # A step is as far from the left edge as it is from 0; a share from the lower one likewise.
    assert line_of(svg_of([RISING])) == [(120.5, 115.0), (191.0, 80.0), (332.0, 10.0)]


@pytest.mark.parametrize("standalone", [False, True])
def test_what_rises_goes_up_and_to_the_right(standalone):
    points = line_of(svg_of([Curve("run", [(step, step**2) for step in range(1, 9)])], standalone))
    assert len(points) == 8
    assert [x for x, _ in points] == sorted({x for x, _ in points})
    assert [y for _, y in points] == sorted({y for _, y in points}, reverse=True)


@pytest.mark.parametrize("standalone", [False, True])
def test_both_axes_start_at_0(standalone):
    svg = svg_of([Curve("run", [(0, 0.0), (100, 0.7), (200, 0.8)]), RISING], standalone)
    start, middle, end = line_of(svg)
    assert middle[0] == (start[0] + end[0]) / 2
    axis = svg.find(f"line[@class='axis'][@y1='{start[1]}']")
    assert [float(axis.get(name)) for name in ("x1", "x2")] == [start[0], end[0]]
    assert line_of(svg, "c1")[-1][0] == pytest.approx(start[0] + (end[0] - start[0]) / 10, abs=0.1)


@pytest.mark.parametrize("values", [[0.2, 0.9], [3.0, 90.0], [-0.4, 0.3], [-2.0, -1.0], [0.0, 0.0]])
def test_everything_is_inside_the_plot(values):
    points = list(enumerate(values, 1))
    curve = Curve("run", points, [(2, values[0], min(values) - 1, max(values) + 1)], points)
    svg = svg_of([curve])
    places = line_of(svg)
    places += [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.findall("circle")]
    bar = svg.find("line[@class='c0']")
    places += [(float(bar.get("x1")), float(bar.get(end))) for end in ("y1", "y2")]
    assert len(places) == 2 + 3 + 2
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in places)
    assert float(bar.get("y1")) > float(bar.get("y2"))  # from the low end to the high one


def test_the_ticks_say_what_is_at_their_height():
    svg = svg_of([Curve("run", [(1, -1.0), (8, 3.0)])])
    ticks = [(text.text, float(text.get("y"))) for text in svg.findall("text[@dy]")]
    assert ticks == [("-1", BOTTOM), ("1", (TOP + BOTTOM) / 2), ("3", TOP)]
    assert svg.find("text[@x='332']").text == "step 8"
    assert [y for _, y in line_of(svg)] == [BOTTOM, TOP]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.2, 0.6], (0, 1)),  # a share
        ([0.2, 0.3], (0, 0.3)),
        ([0.0], (0, 1)),
        ([7.0, 20.0], (0, 20)),
        ([-0.1, 0.7], (-0.1, 0.7)),
        ([-0.3, -0.1], (-0.3, 0)),
    ],
)
def test_limits(values, expected):
    last, *ends = limits([Curve("run", list(enumerate(values)))])
    assert last == (len(values) - 1 or 1)
    assert tuple(ends) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 0.49, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (0, 139, [0, 50, 100, 150]),
        (-0.3, 1.1, [-0.5, 0, 0.5, 1, 1.5]),
        (0, 0.0007, [0, 0.0002, 0.0004, 0.0006, 0.0008]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert round_ticks(low, high, 5) == expected


# ---- Many points ----------------------------------------------------------------------------


def test_few_points_stay_as_they_are():
    assert binned([]) == []
    points = [(step, step % 7) for step in range(MAX_POINTS)]
    assert binned(points) == points


def test_many_points_become_means_of_neighbours():
    points = [(step, (step * 37) % 101) for step in range(1, 1001)]
    means = binned(points)
    assert len(means) == 77  # 13 at a time
    assert means[0] == (7, fmean(value for _, value in points[:13]))
    assert means[1] == (20, fmean(value for _, value in points[13:26]))
    assert means[-1] == (994.5, fmean(value for _, value in points[988:]))
    line = line_of(svg_of([Curve("run", points)]))
    assert len(line) == 77
    assert line[0][0] == pytest.approx(LEFT + 7 / 1000 * (RIGHT - LEFT), abs=0.06)


# ---- Words, and what may not become markup --------------------------------------------------


def test_the_label_says_what_is_drawn():
    curves = [
        Curve("one", [(1, 0.5), (2, 0.125), (3, 0.75)], [(0, 0.25, 0.2, 0.3)]),
        Curve("other", marks=[(50, 453)], reference=True),
    ]
    assert svg_of(curves).get("aria-label") == (
        "Title. one: from 0.5 to 0.75, between 0.125 and 0.75; one held-out at step 0: 0.25; "
        "other at step 50: 453."
    )


def test_nothing_to_draw_is_no_chart():
    assert line_chart("Title", [Curve("run")]) == ""


@pytest.mark.parametrize("standalone", [False, True])
def test_a_name_is_only_text(standalone):
    name = "\"><script>alert('1')</script>&amp;"
    svg = svg_of([Curve(name, [(1, 0.5)])], standalone)
    assert svg.get("aria-label").startswith(f"Title. {name}: from")
    assert svg.find(".//script") is None
    assert (name in [text.text for text in svg.findall("text")]) == standalone


# ---- Files ----------------------------------------------------------------------------------


def test_a_figure_stands_alone():
    band = [(step, 0.1 * step, 0.1 * step + 0.05) for step in range(1, 9)]
    curves = [
        Curve("first", [(step, 0.1 * step + 0.02) for step in range(1, 9)], band=band),
        Curve("second", [(1, 0.9), (8, 0.1)]),
    ]
    text = figure("Title", curves, "step", "share")
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    svg = svg_of(curves, standalone=True)
    assert "polyline" in svg.find("style").text
    assert not re.search(r"url\(|@import|var\(", svg.find("style").text)
    words = {each.text for each in svg.findall("text")}
    assert {"Title", "first", "second", "step", "share", "0", "0.2", "1", "8"} <= words
    for kind in ("c0", "c1"):
        assert len(svg.findall(f"polyline[@class='{kind}']")) == 2  # in the legend and in the plot


def test_the_band_lies_around_the_line():
    points = [(step, (step * 37) % 101 / 101) for step in range(1, 1001)]
    band = [(step, value - 0.1, value + 0.1) for step, value in points]
    svg = svg_of([Curve("run", points, band=band)], standalone=True)
    line, area = line_of(svg), corners(svg.find("polygon"))
    lows, highs = area[: len(line)], area[len(line) :][::-1]
    assert len(lows) == len(highs) == len(line) == 77
    for (x, y), low, high in zip(line, lows, highs, strict=True):
        assert x == low[0] == high[0]
        assert low[1] - y == pytest.approx(y - high[1], abs=0.21)
        assert low[1] > y > high[1]
