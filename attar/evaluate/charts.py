"""The report's charts as inline SVG. Colours come from the page's style sheet, so both themes work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from markupsafe import Markup, escape

from attar.evaluate.report_data import AttentionMass, BlockError, Selection, TimestepError

_WIDTH = 760  # of the drawing, in its own units; the page scales it


def selection_map(selection: Selection) -> Markup:
    """Heat map prompts × steps of the score, chosen samples marked, their counts along both edges."""
    prompts, steps = len(selection.scores), len(selection.scores[0])
    left, right, top, bottom = 196, 64, 52, 40
    cell = (_WIDTH - left - right) / steps
    row = max(14.0, min(24.0, 240 / prompts))
    highest = max(max(scores) for scores in selection.scores)
    lowest = min(0.0, min(min(scores) for scores in selection.scores))
    span = (highest - lowest) or 1.0
    chosen = {(sample.prompt, sample.step) for sample in selection.chosen}
    parts = []
    for p, scores in enumerate(selection.scores):
        y = top + p * row
        parts.append(_text(left - 8, y + row / 2, _shorten(selection.prompts[p], 26), "end", middle=True))
        for t, score in enumerate(scores):
            mark = ", chosen" if (p, t) in chosen else ""
            title = f"<title>{escape(selection.prompts[p])} · step {t} · score {score:.3g}{mark}</title>"
            opacity = 0.05 + 0.95 * (score - lowest) / span
            x = left + t * cell
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" height="{row - 1:.1f}" rx="1.5" '
                f'class="heat" fill-opacity="{opacity:.3f}">{title}</rect>'
            )
            if mark:
                cx, cy, radius = x + (cell - 1) / 2, y + (row - 1) / 2, min(cell, row) * 0.26
                parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:.1f}" class="mark"/>')
    by_step, by_prompt = Counter(t for _, t in chosen), Counter(p for p, _ in chosen)
    most = max(by_step.values(), default=1)
    for t, count in by_step.items():
        height = 30 * count / most
        parts.append(
            f'<rect x="{left + t * cell:.1f}" y="{top - 6 - height:.1f}" width="{cell - 1:.1f}" '
            f'height="{height:.1f}" class="count"><title>{count} chosen at step {t}</title></rect>'
        )
    parts.append(_text(left - 8, top - 12, "chosen per step", "end", muted=True))
    most = max(by_prompt.values(), default=1)
    edge = _WIDTH - right + 6
    for p, count in by_prompt.items():
        y, width = top + p * row, 34 * count / most
        parts.append(
            f'<rect x="{edge}" y="{y:.1f}" width="{width:.1f}" height="{row - 1:.1f}" class="count"/>'
        )
        parts.append(_text(edge + width + 4, y + row / 2, str(count), "start", middle=True, muted=True))
    base = top + prompts * row
    for t in _positions(steps, 11):
        parts.append(_text(left + (t + 0.5) * cell, base + 15, str(t), "middle", muted=True))
    parts.append(
        _text((left + _WIDTH - right) / 2, base + 34, "denoising step (0 is the noisiest)", "middle")
    )
    label = f"Selection score of {prompts} prompts by {steps} steps; {len(chosen)} samples chosen"
    return _svg(parts, base + bottom, label)


def block_errors(rows: Sequence[BlockError]) -> Markup:
    """Error of each block before and after reconstruction, joined by a line."""
    values = [value for row in rows for value in (row.before, row.after)]
    frame = _Frame(values, height=260, label="relative output error")
    step = frame.inner / len(rows)
    parts = frame.grid()
    for index, row in enumerate(rows):
        x, before, after = frame.left + (index + 0.5) * step, frame.y(row.before), frame.y(row.after)
        title = f"<title>{escape(row.block)}: {row.before:.3g} → {row.after:.3g}</title>"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{before:.1f}" y2="{after:.1f}" class="join"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{before:.1f}" r="5" class="before">{title}</circle>')
        parts.append(f'<circle cx="{x:.1f}" cy="{after:.1f}" r="5" class="after">{title}</circle>')
    for index in _positions(len(rows), 16):
        name = rows[index].block.rpartition(".")[2]
        parts.append(_text(frame.left + (index + 0.5) * step, frame.base + 17, name, "middle", muted=True))
    parts.append(_text(frame.left + frame.inner / 2, frame.base + 36, "block", "middle"))
    return _svg(parts, frame.base + 44, f"Output error of {len(rows)} blocks before and after reconstruction")


def timestep_errors(rows: Sequence[TimestepError]) -> Markup:
    """Relative error of the denoiser's output along the trajectory."""
    rows = sorted(rows, key=lambda row: row.step)
    frame = _Frame([row.error for row in rows], height=240, label="relative error")
    first, last = rows[0].step, rows[-1].step
    step = frame.inner / ((last - first) or 1)
    points = [(frame.left + (row.step - first) * step, frame.y(row.error)) for row in rows]
    parts = [*frame.grid(), _polyline(points, "after-line")]
    for (x, y), row in zip(points, rows, strict=True):
        title = f"step {row.step}, timestep {row.timestep:g}: {row.error:.3g}"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" class="after"><title>{title}</title></circle>'
        )
    for index in _positions(len(rows), 11):
        parts.append(_text(points[index][0], frame.base + 17, str(rows[index].step), "middle", muted=True))
    parts.append(
        _text(frame.left + frame.inner / 2, frame.base + 36, "denoising step (0 is the noisiest)", "middle")
    )
    return _svg(parts, frame.base + 44, f"Relative error of the denoiser's output over {len(rows)} steps")


def mass_curves(rows: Sequence[AttentionMass]) -> Markup:
    """Share of the attention mass held by the most attended tokens, one curve for each block."""
    rows = [row for row in rows if len(row.curve) > 1]
    left, top, width, height = 46, 12, 330, 250
    parts = []
    for tick in (0, 25, 50, 75, 100):
        x, y = left + width * tick / 100, top + height * (1 - tick / 100)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(left - 7, y, f"{tick} %", "end", middle=True, muted=True))
        parts.append(_text(x, top + height + 17, f"{tick} %", "middle", muted=True))
    parts.append(_polyline([(left, top + height), (left + width, top)], "even-line"))
    for index, row in enumerate(rows):
        share = 1 / (len(row.curve) - 1)
        points = [
            (left + width * k * share, top + height * (1 - min(max(value, 0.0), 1.0)))
            for k, value in enumerate(row.curve)
        ]
        opacity = 0.25 + 0.75 * (index + 1) / len(rows)
        parts.append(_polyline(points, "after-line", f"{escape(row.block)}", opacity))
    parts.append(_text(left + width / 2, top + height + 36, "most attended tokens", "middle"))
    label = f"Cumulative attention mass over sorted tokens of {len(rows)} blocks"
    return _svg(parts, top + height + 44, label, left + width + 18)


def weight_ranges(rows: Sequence[AttentionMass]) -> Markup:
    """Percentiles of the token weight λ in each block: whiskers, a box, the median as a dot."""
    rows = [row for row in rows if row.weights]
    left, top, width, height = 46, 12, 330, 250
    values = [value for row in rows for value in row.weights.values()]
    low, high = math.floor(min(values) * 10) / 10, max(math.ceil(max(values) * 10) / 10, min(values) + 0.1)

    def at(value: float) -> float:
        return top + height * (1 - (value - low) / (high - low))

    parts = []
    for tick in _nice_ticks(low, high, 6):
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{at(tick):.1f}" y2="{at(tick):.1f}" class="grid"/>'
        )
        parts.append(_text(left - 7, at(tick), f"{tick:g}", "end", middle=True, muted=True))
    step = width / len(rows)
    box = min(16.0, step * 0.5)
    for index, row in enumerate(rows):
        x, levels = left + (index + 0.5) * step, sorted(row.weights)
        y = {level: at(row.weights[level]) for level in levels}
        title = escape(
            f"{row.block}: " + ", ".join(f"{level} %: {row.weights[level]:.3g}" for level in levels)
        )
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y[levels[0]]:.1f}" y2="{y[levels[-1]]:.1f}" class="join"/>'
        )
        if 25 in y and 75 in y:
            upper, lower = y[75], y[25]
            parts.append(
                f'<rect x="{x - box / 2:.1f}" y="{upper:.1f}" width="{box:.1f}" rx="2" class="box" '
                f'height="{max(lower - upper, 1):.1f}"><title>{title}</title></rect>'
            )
        middle = 50 if 50 in y else levels[len(levels) // 2]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y[middle]:.1f}" r="4" class="after"><title>{title}</title></circle>'
        )
    for index in _positions(len(rows), 12):
        name = rows[index].block.rpartition(".")[2]
        parts.append(_text(left + (index + 0.5) * step, top + height + 17, name, "middle", muted=True))
    parts.append(_text(left + width / 2, top + height + 36, "block", "middle"))
    return _svg(
        parts, top + height + 44, f"Percentiles of the token weights of {len(rows)} blocks", left + width + 18
    )


class _Frame:
    """The vertical axis of the wide charts. Logarithmic where positive values span more than a factor 20."""

    left, top = 62, 14

    def __init__(self, values: Sequence[float], height: float, label: str) -> None:
        self.height, self.label = height, label
        self.inner, self.base = _WIDTH - self.left - 16, self.top + height
        low, high = min(values), max(values) or 1.0
        self.logarithmic = low > 0 and high / low > 20
        if self.logarithmic:
            self.low, self.high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
            exponents = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            self.ticks = [10.0**exponent for exponent in exponents]
        else:
            self.ticks = _nice_ticks(0.0, high, 5)
            self.low, self.high = 0.0, self.ticks[-1]

    def y(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return self.base - self.height * share

    def grid(self) -> list[str]:
        parts = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(
                f'<line x1="{self.left}" x2="{_WIDTH - 16}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            )
            parts.append(_text(self.left - 8, y, f"{tick:g}", "end", middle=True, muted=True))
        x, y = 14, self.top + self.height / 2
        label = self.label + (", logarithmic" if self.logarithmic else "")
        parts.append(
            f'<text x="{x}" y="{y}" text-anchor="middle" transform="rotate(-90 {x} {y})">{label}</text>'
        )
        return parts


def _nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that cover [low, high]."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _positions(count: int, most: int) -> list[int]:
    """At most `most` evenly spaced indices below `count`, from the first on."""
    step = math.ceil(count / most)
    round_step = next((s for s in (1, 2, 5, 10, 20, 25, 50, 100) if s >= step), step)
    return list(range(0, count, round_step))


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _text(x: float, y: float, text: str, anchor: str, middle: bool = False, muted: bool = False) -> str:
    baseline = ' dominant-baseline="central"' if middle else ""
    style = ' class="muted"' if muted else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{baseline}{style}>{escape(text)}</text>'


def _polyline(
    points: Sequence[tuple[float, float]], style: str, title: str = "", opacity: float = 1.0
) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    inner = f"<title>{title}</title>" if title else ""
    return f'<polyline points="{path}" class="{style}" stroke-opacity="{opacity:.2f}">{inner}</polyline>'


def _svg(parts: Sequence[str], height: float, label: str, width: float = _WIDTH) -> Markup:
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return Markup(head + "".join(parts) + "</svg>")
