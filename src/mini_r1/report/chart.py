"""Curves -> one SVG: a small chart of the report's page, or a figure that stands alone in a file.

Only geometry and words are here. The markup is in the templates, which escape all they are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from statistics import fmean

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mini_r1 import visible

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    # Before it is escaped; what is markup already has been through this.
    finalize=lambda value: value if isinstance(value, Markup) else visible(str(value)),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
MAX_POINTS = 80  # of a line
# In the units of the SVG.
CHART_WIDTH, CHART_HEIGHT = 340, 170
FIGURE_WIDTH, FIGURE_HEIGHT, LEGEND_ROW = 720, 400, 20
LONG_NAME = 44  # letters; two such names do not fit beside each other in a legend

Point = tuple[float, ...]  # a step, and one or more values


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        points: (step, value), joined by the line.
        held_out: points with a 95 % interval: (step, value, low, high).
        marks: points without a line: (step, value).
        band: what is shaded around the line: (step, low, high).
        reference: whether it is there to compare with only.
    """

    name: str
    points: Sequence[Point] = ()
    held_out: Sequence[Point] = ()
    marks: Sequence[Point] = ()
    band: Sequence[Point] = ()
    reference: bool = False


@dataclass(frozen=True)
class Frame:
    """Where values lie: the edges of the plot in the units of the SVG, and the values at them."""

    left: float
    right: float
    top: float
    bottom: float
    last: float  # step at the right edge; 0 is at the left one
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(self.left + step / self.last * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def line(self, points: Sequence[Point]) -> str:
        """The corners of a line."""
        return self._corners(binned(points))

    def area(self, band: Sequence[Point]) -> str:
        """The corners of a band: there along its low end, back along its high one."""
        band = binned(band)
        back = [(step, high) for step, _, high in reversed(band)]
        return self._corners([(step, low) for step, low, _ in band] + back)

    def _corners(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in points)


def line_chart(title: str, curves: Sequence[Curve]) -> Markup:
    """A chart in the style of the page, without a caption; nothing if there are no points."""
    if not _all_points(curves):
        return Markup()
    last, low, high = limits(curves)
    frame = Frame(50, CHART_WIDTH - 8, 10, CHART_HEIGHT - 20, last, low, high)
    chart = TEMPLATES.get_template("chart.svg.jinja").render(
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
        label=label(title, curves),
        frame=frame,
        ticks=(low, (low + high) / 2, high),
        curves=with_classes(curves),
    )
    return Markup(chart)  # the template has escaped it


def figure(title: str, curves: Sequence[Curve], x_title: str, y_title: str) -> str:
    """An SVG file with title, legend, axes and a style of its own, light on any background."""
    last, low, high = limits(curves)
    ticks = round_ticks(low, high, 5)
    columns = 1 if any(len(curve.name) > LONG_NAME for curve in curves) else 2
    top = 52 + LEGEND_ROW * ceil(len(curves) / columns)
    frame = Frame(64, FIGURE_WIDTH - 24, top, FIGURE_HEIGHT - 52, last, ticks[0], ticks[-1])
    return TEMPLATES.get_template("figure.svg.jinja").render(
        width=FIGURE_WIDTH,
        height=FIGURE_HEIGHT,
        label=label(title, curves),
        frame=frame,
        ticks=ticks,
        curves=with_classes(curves),
        title=title,
        x_title=x_title,
        y_title=y_title,
        x_ticks=[tick for tick in round_ticks(0, last, 8) if tick <= last],
        columns=columns,
        row=LEGEND_ROW,
    )


def with_classes(curves: Sequence[Curve]) -> list[tuple[str, Curve]]:
    """Each curve with the CSS class that gives it its colour."""
    return [("ref" if each.reference else f"c{index}", each) for index, each in enumerate(curves)]


def limits(curves: Sequence[Curve]) -> tuple[float, float, float]:
    """The last step, the lowest and the highest value of the axes; 0 is always on them."""
    points = _all_points(curves)
    values = [value for _, *values in points for value in values]
    low, high = min(0.0, *values), max(0.0, *values)
    if low == 0 and (high > 0.5 or high == 0):
        high = max(1.0, high)  # a share, all of it
    return max(step for step, *_ in points) or 1, low, high


def round_ticks(low: float, high: float, steps: int) -> list[float]:
    """From `low` or below to `high` or above, in about so many steps of 1, 2 or 5 times 10^n."""
    least = (high - low) / steps
    unit = 10.0 ** floor(log10(least))
    size = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= least)
    ends = floor(round(low / size, 9)), ceil(round(high / size, 9))
    return [round(size * index, 9) for index in range(ends[0], ends[1] + 1)]


def binned(points: Sequence[Point]) -> list[Point]:
    """Means of neighbours, at most MAX_POINTS: steps that share a batch do not make it a comb."""
    size = max(1, ceil(len(points) / MAX_POINTS))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(map(fmean, zip(*group, strict=True))) for group in groups]


def label(title: str, curves: Sequence[Curve]) -> str:
    """The chart in words, for those who do not see it."""
    return f"{title}. {'; '.join(part for curve in curves for part in _words(curve))}."


def _words(curve: Curve) -> list[str]:
    words = []
    if curve.points:
        values = [value for _, value in curve.points]
        ends = f"from {values[0]:.3g} to {values[-1]:.3g}"
        words.append(f"{curve.name}: {ends}, between {min(values):.3g} and {max(values):.3g}")
    for step, value, *_ in curve.held_out:
        words.append(f"{curve.name} held-out at step {step}: {value:.3g}")
    words += [f"{curve.name} at step {step}: {value:.3g}" for step, value in curve.marks]
    return words


def _all_points(curves: Sequence[Curve]) -> list[Point]:
    parts = ((*each.points, *each.held_out, *each.marks, *each.band) for each in curves)
    return [point for points in parts for point in points]
