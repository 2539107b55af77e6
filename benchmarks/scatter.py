"""A scatter plot as one SVG file that stands alone: points, their Pareto frontier, and names beside it.

Of many points those on the frontier alone have numbers and names; the others are small and grey, and say what they are
under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b6e4f", "#b3541e", "#3b5ba5", "#8e3b8a", "#7a6a00", "#a11d33", "#4d4d4d", "#157a8c")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND, ROW = 560, 400, 58, 40, 46, 320, 19  # LEGEND: a column of names
MANY, GREY, STEP = 30, "#b9b9b9", "#222222"
FRONTIER = "Pareto frontier: no point lies left of and above it"


@dataclass(frozen=True)
class Point:
    """One mark. group: what shares its colour."""

    x: float
    y: float
    name: str
    group: str


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other dominates, by rising x: none has as small an x and a larger y, or a smaller x and the same y.

    Points at the same place are all there or not.
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not kept or point.y > kept[-1].y or (point.x, point.y) == (kept[-1].x, kept[-1].y):
            kept.append(point)
    return kept


def scatter(points: Sequence[Point], title: str, x_label: str, y_label: str) -> str:
    """The SVG. The horizontal axis is logarithmic where its values span more than a factor 10. Less of x and more of y
    are better.

    Raises ValueError for no points, and for values that are not finite.
    """
    if not points or not all(math.isfinite(p.x) and math.isfinite(p.y) for p in points):
        raise ValueError("a plot needs points with finite values")
    xs, ys = [p.x for p in points], [p.y for p in points]
    logarithmic = min(xs) > 0 and max(xs) / min(xs) > 10
    across = _Axis(xs, LEFT, LEFT + WIDTH, logarithmic)
    up = _Axis(ys, TOP + HEIGHT, TOP, False)
    colours = {
        group: COLOURS[k % len(COLOURS)] for k, group in enumerate(dict.fromkeys(p.group for p in points))
    }
    parts = [_text(LEFT, 22, title, size=15, weight="bold")]
    for value in across.ticks:
        x = across.at(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + HEIGHT}" stroke="#e4e4e4"/>')
        parts.append(_text(x, TOP + HEIGHT + 17, f"{value:g}", "middle"))
    for value in up.ticks:
        y = up.at(value)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{value:g}", "end"))
    scale = ", logarithmic" if logarithmic else ""
    parts.append(_text(LEFT + WIDTH / 2, TOP + HEIGHT + 36, x_label + scale, "middle"))
    middle = TOP + HEIGHT / 2
    turned = _text(14, middle, y_label, "middle")
    parts.append(turned.replace("<text ", f'<text transform="rotate(-90 14 {middle:.0f})" ', 1))
    best = frontier(points)
    many = len(points) > MANY
    named = best if many else list(points)
    places = [(across.at(p.x), up.at(p.y)) for p in best]
    parts.append(f'<path d="{_steps(places, LEFT + WIDTH)}" fill="none" stroke="{STEP}" stroke-width="1.5"/>')
    for point in (p for p in points if p not in named):
        parts.append(_mark(across.at(point.x), up.at(point.y), 4.5, GREY, _told(point)))
    rows = (HEIGHT + BOTTOM) // ROW - 2  # names in a column
    for number, point in enumerate(named, 1):
        x, y, colour, ringed = across.at(point.x), up.at(point.y), colours[point.group], point in best
        parts.append(_mark(x, y, 8, colour, _told(point), ringed))
        parts.append(_text(x, y + 3.5, str(number), "middle", size=9, colour="#ffffff"))
        column, place = divmod(number - 1, rows)
        side, line = LEFT + WIDTH + 24 + LEGEND * column, TOP + ROW * (place + 2.5)
        parts.append(_mark(side, line, 8, colour, ringed=ringed))
        parts.append(_text(side, line + 3.5, str(number), "middle", size=9, colour="#ffffff"))
        parts.append(
            _text(side + 14, line + 4, point.name, weight="bold" if ringed and not many else "normal")
        )
    side = LEFT + WIDTH + 16
    parts.append(f'<path d="M{side} {TOP + 5} h16" stroke="{STEP}" stroke-width="1.5"/>')
    parts.append(_text(side + 22, TOP + 9, FRONTIER))
    if many:
        parts.append(_mark(side + 8, TOP + ROW + 5, 4.5, GREY))
        parts.append(_text(side + 22, TOP + ROW + 9, "all others, named under the pointer and in the tables"))
    columns = max(1, math.ceil(len(named) / rows))
    width, height = LEFT + WIDTH + 60 + LEGEND * columns, TOP + HEIGHT + BOTTOM
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif">'
    )
    return f'{head}<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'


def _steps(places: Sequence[tuple[float, float]], end: float) -> str:
    """A path along the frontier: level until the next point, then up to it, and level to the end."""
    (x, y), *others = places
    steps = "".join(f" H{x:.1f} V{y:.1f}" for x, y in others)
    return f"M{x:.1f} {y:.1f}{steps} H{end:.1f}"


def _told(point: Point) -> str:
    return f"<title>{escape(point.name)}: {point.x:.4g}, {point.y:.4g}</title>"


def _mark(x: float, y: float, radius: float, colour: str, told: str = "", ringed: bool = False) -> str:
    ring = f' stroke="{STEP}" stroke-width="2"' if ringed else ""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.9"{ring}>{told}</circle>'


class _Axis:
    """From values to places between `start` and `end`, with some room on both sides."""

    def __init__(self, values: Sequence[float], start: float, end: float, logarithmic: bool) -> None:
        self.start, self.end, self.logarithmic = start, end, logarithmic
        low, high = (self._unit(v) for v in (min(values), max(values)))
        room = 0.06 * (high - low) or 0.5
        self.low, self.high = low - room, high + room
        self.ticks = self._ticks()

    def _unit(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def at(self, value: float) -> float:
        share = (self._unit(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def _ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [factor * 10.0**k for k in decades for factor in (1, 2, 5)]
            return [v for v in found if self.low <= math.log10(v) <= self.high]
        raw = (self.high - self.low) / 6
        unit = 10 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(k * step, 12) for k in range(first, last + 1)]


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    size: int = 12,
    weight: str = "normal",
    colour: str = "#222222",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
