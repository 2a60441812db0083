"""Small multiples of bar and line charts as one SVG, written by hand: a plot needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 340  # of a panel, in pixels
HEIGHT: Final = 240
LEFT: Final = 52
RIGHT: Final = 12
TOP: Final = 48
BOTTOM: Final = 44
HEAD: Final = 64
MARGIN: Final = 20

INK: Final = "#1f2933"
FAINT: Final = "#7b8794"
GRID: Final = "#e4e7eb"
# Shades of one hue for percentiles, hues for different things.
SHADES: Final = ("#1d4e89", "#5b8fc7", "#b3cde8")
HUES: Final = ("#1d4e89", "#e07a1f", "#2f855a", "#a23b72", "#6b7280")

STYLE: Final = (
    "text{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;font-size:11px;fill:#1f2933}"
    ".title{font-size:17px;font-weight:600}.panel{font-size:13px;font-weight:600}.faint{fill:#7b8794}"
    ".value{font-size:10px}"
)


@dataclass(frozen=True, slots=True)
class Series:
    """Values under one name; None leaves a gap."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart. `x` holds words (bars) or numbers (lines) that the values of each series belong to."""

    title: str
    unit: str
    x_label: str
    x: Sequence[str] | Sequence[float]
    series: Sequence[Series]
    colors: Sequence[str] = HUES


def figure(title: str, subtitle: str, rows: Sequence[Sequence[Panel]]) -> str:
    """The panels, row by row, under a title."""
    width = MARGIN * 2 + WIDTH * max(len(row) for row in rows)
    height = HEAD + MARGIN + HEIGHT * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">',
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#ffffff"/>',
        _label(MARGIN, 30, title, "title"),
        _label(MARGIN, 50, subtitle, "faint"),
    ]
    for at_row, row in enumerate(rows):
        for at, panel in enumerate(row):
            x, y = MARGIN + at * WIDTH, HEAD + at_row * HEIGHT
            parts.append(f'<g transform="translate({x},{y})">{_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def ticks(top: float, count: int = 4) -> list[float]:
    """About `count` round steps from 0 to `top` or just above it."""
    if not top > 0:
        return [0.0, 1.0]
    rough = top / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    return [step * at for at in range(math.ceil(top / step - 1e-9) + 1)]


def number(value: float) -> str:
    """Three significant digits, and no more."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{min(digits, 4)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _panel(panel: Panel) -> str:
    values = [value for series in panel.series for value in series.values if value is not None]
    steps = ticks(max(values, default=0.0) * 1.08)
    scale = (HEIGHT - TOP - BOTTOM) / steps[-1]
    floor = HEIGHT - BOTTOM
    parts = [_label(LEFT - 40, 14, panel.title, "panel"), _label(LEFT - 40, 30, panel.unit, "faint")]
    for step in steps:
        y = floor - step * scale
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="{GRID}"/>')
        parts.append(_label(LEFT - 6, y + 4, number(step), "faint", "end"))
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, panel.x_label, "faint", "middle"))
    if len(panel.series) > 1:
        parts.append(_legend(panel))
    words = [x for x in panel.x if isinstance(x, str)]
    if len(words) == len(panel.x):
        parts += _bars(panel, words, scale, floor)
    else:
        parts += _lines(panel, [float(x) for x in panel.x], scale, floor)
    return "".join(parts)


def _bars(panel: Panel, words: Sequence[str], scale: float, floor: float) -> list[str]:
    place = (WIDTH - LEFT - RIGHT) / len(words)
    width = min(place * 0.72 / len(panel.series), 44)
    parts = []
    for at, word in enumerate(words):
        middle = LEFT + place * (at + 0.5)
        parts.append(_label(middle, floor + 16, word, "", "middle"))
        left = middle - width * len(panel.series) / 2
        for nth, series in enumerate(panel.series):
            value = series.values[at]
            if value is None:
                continue
            x, height = left + nth * width, value * scale
            color = panel.colors[nth % len(panel.colors)]
            rect = f'x="{x + 1:.1f}" y="{floor - height:.1f}" width="{width - 2:.1f}" height="{height:.1f}"'
            parts.append(f'<rect {rect} rx="1.5" fill="{color}"/>')
            if width >= 20:
                parts.append(_label(x + width / 2, floor - height - 4, number(value), "value", "middle"))
    return parts


def _lines(panel: Panel, xs: Sequence[float], scale: float, floor: float) -> list[str]:
    low, high = min(xs), max(xs)
    across = (WIDTH - LEFT - RIGHT - 16) / (high - low or 1)

    def place(x: float) -> float:
        return LEFT + 8 + (x - low) * across

    shown = xs if len(xs) <= 10 else [tick for tick in ticks(high, 6) if low <= tick <= high]
    parts = [_label(place(x), floor + 16, number(x), "", "middle") for x in shown]
    for nth, series in reversed(list(enumerate(panel.series))):
        color = panel.colors[nth % len(panel.colors)]
        points = [(place(x), floor - y * scale) for x, y in zip(xs, series.values, strict=True) if y is not None]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.8"/>')
        if len(points) <= 12:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    return parts


def _legend(panel: Panel) -> str:
    parts = []
    right = WIDTH - RIGHT
    for nth, series in reversed(list(enumerate(panel.series))):
        right -= 7 * len(series.name)
        parts.append(_label(right, 30, series.name, "faint"))
        right -= 13
        color = panel.colors[nth % len(panel.colors)]
        parts.append(f'<rect x="{right}" y="21" width="9" height="9" rx="1.5" fill="{color}"/>')
        right -= 10
    return "".join(parts)


def _label(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(text)}</text>'
