"""Score against cost as inline SVG: a labelled point for each method, and the line of those that none beats in both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from xml.etree import ElementTree

from markupsafe import Markup

from train.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, add, number, short, widened

_LETTER = 6.4  # width of one in a label
_HIGH = 12  # of a label
_WIDE = 5.0  # ratio of largest to smallest cost from which a logarithmic axis shows more
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Point:
    """A method. cost: above 0, less is better. score: its mean; spread: on either side of it, 0 if not known."""

    name: str
    cost: float
    score: float
    spread: float = 0.0


def front(points: Sequence[Point], *, lower_is_better: bool = False) -> list[Point]:
    """Those that no other equals or beats in both cost and score and beats in one of them, by rising cost."""
    sign = -1 if lower_is_better else 1

    def beaten(one: Point) -> bool:
        return any(
            other.cost <= one.cost
            and sign * other.score >= sign * one.score
            and (other.cost, other.score) != (one.cost, one.score)
            for other in points
        )

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.cost)


def plot(title: str, below: str, points: Sequence[Point], *, lower_is_better: bool = False) -> Markup:
    """An `<svg>` of the points; "" if there are none. below: what the cost is."""
    points = [point for point in points if point.cost > 0 and math.isfinite(point.cost) and math.isfinite(point.score)]
    if not points:
        return Markup("")
    costs = [point.cost for point in points]
    log = max(costs) / min(costs) > _WIDE
    air = (max(costs) / min(costs)) ** 0.12
    least, most = (min(costs) / air, max(costs) * air) if log else widened(min(costs), max(costs), 0.12)
    x = Scale(least, most, LEFT, WIDTH - RIGHT, log=log)
    low, high = (sign([point.score + way * point.spread for point in points]) for sign, way in ((min, -1), (max, 1)))
    y = Scale(*widened(low, high, 0.08), HEIGHT - BOTTOM, TOP)

    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title})
    _axes(svg, x, y, f"{below} (logarithmic)" if log else below)
    best = front(points, lower_is_better=lower_is_better)
    if len(best) > 1:
        corners = " ".join(f"{x(point.cost):g},{y(point.score):g}" for point in best)
        add(svg, "polyline", points=corners, class_="line faint")
    taken: list[Box] = [(x(p.cost) - 5, y(p.score) - 5, x(p.cost) + 5, y(p.score) + 5) for p in points]
    for point in sorted(points, key=lambda point: point not in best):
        _draw(svg, point, x, y, taken, on_front=point in best)
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _axes(svg: ElementTree.Element, x: Scale, y: Scale, below: str) -> None:
    grid = add(svg, "g", class_="axes")
    for value in y.ticks():
        add(grid, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value))
        add(grid, "text", short(value), x=LEFT - 8, y=round(y(value) + 4, 2), text_anchor="end")
    for value in _thinned(x):
        add(grid, "line", x1=x(value), x2=x(value), y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="tick")
        add(grid, "text", short(value), x=x(value), y=HEIGHT - BOTTOM + 18, text_anchor="middle")
    add(grid, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="base")
    add(grid, "text", below, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="what")


def _thinned(x: Scale) -> list[float]:
    """The ticks that have room for their numbers."""
    kept: list[float] = []
    for value in x.ticks():
        if x.low <= value <= x.high and (not kept or x(value) - x(kept[-1]) > 40):
            kept.append(value)
    return kept


def _draw(svg: ElementTree.Element, point: Point, x: Scale, y: Scale, taken: list[Box], *, on_front: bool) -> None:
    at, height = x(point.cost), y(point.score)
    group = add(svg, "g", class_="method")
    spread = f" ± {number(point.spread)}" if point.spread else ""
    add(group, "title", f"{point.name}: {number(point.score)}{spread}, cost {number(point.cost)}")
    if point.spread:
        ends = y(point.score - point.spread), y(point.score + point.spread)
        add(group, "line", x1=at, x2=at, y1=ends[0], y2=ends[1], class_="spread")
    add(group, "circle", cx=at, cy=height, r=4, class_=f"dot {'c0' if on_front else 'beaten'}")
    left, base = _place(point.name, at, height, taken)
    add(group, "text", point.name, x=round(left, 2), y=round(base, 2), class_="name")


def _place(name: str, at: float, height: float, taken: list[Box]) -> tuple[float, float]:
    """Left end and base line of a label near its point: the first of several places that is free, else the first."""
    wide = _LETTER * len(name)
    sides = [(at + 8, 4.0), (at - 8 - wide, 4.0), (at - wide / 2, -9.0), (at - wide / 2, 17.0)]
    sides += [(left, shift) for shift in (-8.0, 16.0, -20.0, 28.0, -32.0, 40.0) for left in (at + 8, at - 8 - wide)]
    places = [(max(LEFT + 2.0, min(left, WIDTH - 2 - wide)), height + shift) for left, shift in sides]
    places = [place for place in places if TOP - 16 < place[1] < HEIGHT - BOTTOM] or places[:1]
    boxes = [(left, base - _HIGH + 2, left + wide, base + 2) for left, base in places]
    free = next((index for index, box in enumerate(boxes) if not any(_meet(box, other) for other in taken)), 0)
    taken.append(boxes[free])
    return places[free]


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
