"""A scatter plot as one SVG file that stands alone: numbered points, and their names beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b6e4f", "#b3541e", "#3b5ba5", "#8e3b8a", "#7a6a00", "#a11d33", "#4d4d4d", "#157a8c")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND, ROW = 560, 400, 58, 40, 46, 320, 19  # LEGEND: a column of names


@dataclass(frozen=True)
class Point:
    """One mark. group: what shares its colour."""

    x: float
    y: float
    name: str
    group: str


def scatter(points: Sequence[Point], title: str, x_label: str, y_label: str) -> str:
    """The SVG. The horizontal axis is logarithmic where its values span more than a factor 10.

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
    rows = (HEIGHT + BOTTOM) // ROW  # names in a column
    for number, point in enumerate(points, 1):
        x, y, colour = across.at(point.x), up.at(point.y), colours[point.group]
        told = f"<title>{escape(point.name)}: {point.x:.4g}, {point.y:.4g}</title>"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="{colour}" fill-opacity="0.85">{told}</circle>'
        )
        parts.append(_text(x, y + 3.5, str(number), "middle", size=9, colour="#ffffff"))
        column, place = divmod(number - 1, rows)
        side, line = LEFT + WIDTH + 24 + LEGEND * column, TOP + ROW * (place + 0.5)
        parts.append(f'<circle cx="{side}" cy="{line:.1f}" r="8" fill="{colour}"/>')
        parts.append(_text(side, line + 3.5, str(number), "middle", size=9, colour="#ffffff"))
        parts.append(_text(side + 14, line + 4, point.name))
    width, height = LEFT + WIDTH + LEGEND * math.ceil(len(points) / rows), TOP + HEIGHT + BOTTOM
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif">'
    )
    return f'{head}<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(parts)}</svg>\n'


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
