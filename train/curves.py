"""Curves as inline SVG: axes, ticks, a legend, and what a curve says at a step when a pointer rests on it.

Nothing here runs in the page: the readouts are shown by style sheets alone. Colours are the page's variables, so one
drawing serves light, dark and paper.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from xml.etree import ElementTree

from markupsafe import Markup

WIDTH, HEIGHT = 480, 264
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 30, 40
_MOST_POINTS = 400  # along a curve; a screen shows no more
_MOST_STOPS = 90  # places where a pointer reads values
SPREAD = 300.0  # ratio of largest to smallest value from which a logarithmic axis shows more


@dataclasses.dataclass(frozen=True)
class Series:
    """One curve. steps: rising. values: of the same length; those that are not finite are marked at the upper edge.

    faint: drawn thin behind the others, as raw values are behind smoothed ones.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    faint: bool = False


def smoothed(values: Sequence[float], over: float) -> list[float]:
    """The exponential moving average of `values` over about `over` of them; what is not finite is passed over.

    The start is not biased: weights are divided by their sum, as in Adam (arXiv:1412.6980, section 3).
    """
    keep = 1.0 - 1.0 / max(1.0, over)
    total, weight, made = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        made.append(total / weight if weight else math.nan)
    return made


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high` inclusive, at most `most`, in steps of 1, 2 or 5 times a power of ten."""
    if not low < high:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50, 100):
        step = factor * 10.0**exponent
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
    raise AssertionError("unreachable: the last step is 100 times the first guess")


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high` inclusive, with 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    made = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [value for value in made if low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)]


def number(value: float) -> str:
    """A value to be read: `0.9167`, `1.5e-5`, `12,345`."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if 10_000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def short(value: float) -> str:
    """A value at an axis: `250k`, `1.5M`, `0.002`."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if limit <= abs(value) < 1e13:
            return f"{value / (1e3 if letter == 'k' else limit):.6g}{letter}"
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


class Scale:
    """Values to places along one axis; `log` for a logarithmic one."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False):
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        # Halves first: the distance of the ends may be more than a float can be.
        share = (value / 2 - low / 2) / (high / 2 - low / 2)
        return round(self._start + share * (self._end - self._start), 2)

    def ticks(self) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high) if math.isfinite(self.high - self.low) else [self.low, self.high]
        marks = decades(self.low, self.high)
        return marks if len(marks) > 1 else [self.low, self.high]


def chart(title: str, series: Sequence[Series]) -> Markup:
    """An `<svg>` of the curves over the steps; "" if there is no value at all. title: read out in its place."""
    steps = [step for one in series for step in one.steps]
    if not steps:
        return Markup("")
    finite = [value for one in series for value in one.values if math.isfinite(value)] or [0.0]
    x = Scale(*widened(min(steps), max(steps)), LEFT, WIDTH - RIGHT)
    log = min(finite) > 0 and max(finite) / min(finite) > SPREAD
    low, high = (min(finite), max(finite)) if log else widened(min(finite), max(finite), 0.04)
    y = Scale(low, high, HEIGHT - BOTTOM, TOP, log=log)

    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title})
    _axes(svg, x, y, "steps" + (" (values on a logarithmic scale)" if log else ""))
    named = [one for one in series if not one.faint]
    for one in sorted(series, key=lambda one: not one.faint):
        _curve(svg, one, x, y, 0 if one.faint else named.index(one))
    _legend(svg, series, named)
    _readouts(svg, series, named, x, y)
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def widened(low: float, high: float, share: float = 0.0) -> tuple[float, float]:
    """The range with some air; one of hardly more than a value gets a width, so that its ticks can be told apart."""
    if high / 2 - low / 2 <= 1e-5 * max(abs(low), abs(high)):
        air = abs(low / 2) or 1.0
        return (0.0 if low >= 0 else low - air), high + air
    air = (high / 2 - low / 2) * 2 * share
    wide = (0.0 if 0 <= low <= air else low - air), high + air
    return wide if all(map(math.isfinite, wide)) else (low, high)


def add(parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: object) -> ElementTree.Element:
    """A new element in `parent`; `class_` is the attribute `class`, and `text_anchor` is `text-anchor`."""
    names = {name.rstrip("_").replace("_", "-"): str(value) for name, value in attributes.items()}
    made = ElementTree.SubElement(parent, tag, names)
    made.text = text
    return made


def _axes(svg: ElementTree.Element, x: Scale, y: Scale, below: str) -> None:
    grid = add(svg, "g", class_="axes")
    for value in y.ticks():
        add(grid, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value))
        add(grid, "text", short(value), x=LEFT - 8, y=round(y(value) + 4, 2), text_anchor="end")
    for value in x.ticks():
        if value.is_integer() and x.low <= value <= x.high:
            add(grid, "line", x1=x(value), x2=x(value), y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="tick")
            add(grid, "text", short(value), x=x(value), y=HEIGHT - BOTTOM + 18, text_anchor="middle")
    add(grid, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="base")
    add(grid, "text", below, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="what")


def _curve(svg: ElementTree.Element, one: Series, x: Scale, y: Scale, index: int) -> None:
    kind = "faint" if one.faint else f"c{index % 4}"
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in _thinned(one):
        if math.isfinite(value):
            runs[-1].append((x(step), y(value)))
        else:
            runs.append([])
            mark = add(svg, "text", "×", x=x(step), y=TOP + 4, text_anchor="middle", class_="broken")  # noqa: RUF001
            add(mark, "title", f"step {step:,.0f}: {number(value)}")
    for run in filter(None, runs):
        if len(run) > 1:
            add(svg, "polyline", points=" ".join(f"{a:g},{b:g}" for a, b in run), class_=f"line {kind}")
    dots = [point for run in runs for point in run]
    if not one.faint and len(dots) <= 24:
        for a, b in dots:
            add(svg, "circle", cx=a, cy=b, r=3, class_=f"dot {kind}")


def _thinned(one: Series) -> list[tuple[float, float]]:
    """The curve's points; of many, the lowest and highest of each stretch and what is not finite."""
    points = list(zip(one.steps, one.values, strict=True))
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        broken = [point for point in stretch if not math.isfinite(point[1])][:1]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        kept += sorted([*ends, *broken])
    return kept


def _legend(svg: ElementTree.Element, series: Sequence[Series], named: Sequence[Series]) -> None:
    entries = [(one.name, f"c{index % 4}") for index, one in enumerate(named)]
    entries += [(one.name, "faint") for one in series if one.faint]
    if len(entries) < 2:
        return
    at, legend = float(LEFT), add(svg, "g", class_="legend")
    for name, kind in entries:
        shown = name if len(name) <= 28 else f"{name[:27]}…"
        add(legend, "line", x1=at, x2=at + 18, y1=12, y2=12, class_=f"line {kind}")
        add(legend, "text", shown, x=at + 24, y=16)
        at += 24 + 7.2 * len(shown) + 18


def _readouts(svg: ElementTree.Element, series: Sequence[Series], named: Sequence[Series], x: Scale, y: Scale) -> None:
    """At each stop a strip that a pointer can rest on, and what is then shown."""
    steps = sorted({step for one in series for step in one.steps})
    stops = (
        steps
        if len(steps) <= _MOST_STOPS
        else [steps[round(i * (len(steps) - 1) / (_MOST_STOPS - 1))] for i in range(_MOST_STOPS)]
    )
    edges = [float(LEFT), *((x(a) + x(b)) / 2 for a, b in itertools.pairwise(stops)), float(WIDTH - RIGHT)]
    tables = [(one, dict(zip(one.steps, one.values, strict=True))) for one in series]
    for stop, (start, end) in zip(stops, itertools.pairwise(edges), strict=True):
        group = add(svg, "g", class_="stop")
        add(group, "rect", x=start, y=TOP, width=round(max(0.5, end - start), 2), height=HEIGHT - TOP - BOTTOM)
        tip = add(group, "g", class_="tip")
        add(tip, "line", x1=x(stop), x2=x(stop), y1=TOP, y2=HEIGHT - BOTTOM)
        lines = [f"step {stop:,.0f}"]
        for one, table in tables:
            if stop in table:
                value = table[stop]
                lines.append(f"{one.name[:40]} {number(value)}")
                if math.isfinite(value) and not one.faint:
                    add(tip, "circle", cx=x(stop), cy=y(value), r=4, class_=f"dot c{named.index(one) % 4}")
        wide = 7.2 * max(map(len, lines)) + 16
        left = min(x(stop) + 8, WIDTH - 2 - wide) if x(stop) < WIDTH / 2 else max(2, x(stop) - 8 - wide)
        add(tip, "rect", x=round(left, 2), y=TOP + 4, width=round(wide, 2), height=16 * len(lines) + 8, rx=4)
        for row, line in enumerate(lines):
            add(tip, "text", line, x=round(left + 8, 2), y=TOP + 20 + 16 * row)
