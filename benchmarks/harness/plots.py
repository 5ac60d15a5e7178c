"""Growth, drawn as SVG without any library: both axes logarithmic, one line for each contestant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .contestants import CONTESTANTS
from .results import Table

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 28, 40, 56
COLOURS = {"diffusers": "#7a869a", "diffusers-best": "#3f51b5", "russet": "#b7410e", "russet-best": "#d9912b"}


@dataclass(frozen=True)
class Line:
    """A contestant's points (x, y), both above 0."""

    name: str
    points: Sequence[tuple[float, float]]


def drawn(table: Table) -> dict[str, str]:
    """Name of a plot → SVG, for whatever growth the run measured."""
    found = {}
    for of, across in (("side", "pixels"), ("batch", "pictures in a call")):
        for what, key, unit, scale in (
            ("time", "step", "seconds a step", 1.0),
            ("memory", "peak", "peak GiB", 2.0**-30),
        ):
            lines = [
                Line(name, points)
                for name in table.contestants(f"growth by {of}")
                if len(points := curve(table, of, name, key, scale)) > 1
            ]
            if lines:
                found[f"{what}-by-{of}"] = svg(lines, across, unit, sides=of == "side")
    return found


def curve(table: Table, of: str, name: str, key: str, scale: float) -> list[tuple[float, float]]:
    rows = [row for row in table.of(f"growth by {of}", contestant=name) if row.get(key, 0) > 0]
    return [(float(row[of] ** 2 if of == "side" else row[of]), row[key] * scale) for row in rows]


def svg(lines: Sequence[Line], across: str, up: str, *, sides: bool) -> str:
    """A plot. Ticks of the horizontal axis are the measured values: sides of squares where ``sides``, else numbers."""
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    low, high = (low, high) if high > low else (low / 10, high)

    def across_at(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log(x / xs[0]) / math.log(xs[-1] / xs[0]))

    def up_at(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log(y / low) / math.log(high / low))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for y in ticks(low, high):
        parts += [rule(LEFT, up_at(y), WIDTH - RIGHT, up_at(y)), text(LEFT - 6, up_at(y) + 4, f"{y:g}", "end")]
    for x in xs:
        tick = f"{math.isqrt(round(x))}²" if sides else f"{x:g}"
        parts.append(rule(across_at(x), TOP, across_at(x), HEIGHT - BOTTOM))
        parts.append(text(across_at(x), HEIGHT - BOTTOM + 18, tick, "middle"))
    parts += [text(WIDTH / 2, HEIGHT - 14, across, "middle"), text(LEFT, TOP - 22, up, "middle")]
    parts += [path(line, across_at, up_at) for line in lines]
    parts += legend([line.name for line in lines])
    return "\n".join([*parts, "</svg>\n"])


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every power of ten in between."""
    powers = range(round(math.log10(low)), round(math.log10(high)) + 1)
    found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return [value for value in found if low <= value <= high * 1.0001]


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e3e6ea"/>'


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333333">{escape(words)}</text>'


def path(line: Line, across_at: Callable[[float], float], up_at: Callable[[float], float]) -> str:
    at = [(across_at(x), up_at(y)) for x, y in line.points]
    colour = COLOURS.get(line.name, "#333333")
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at)
    return f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'


def legend(names: Sequence[str]) -> list[str]:
    found, x = [], LEFT + 80.0
    for name in names:
        found.append(f'<rect x="{x}" y="{TOP - 31}" width="14" height="4" fill="{COLOURS.get(name, "#333333")}"/>')
        found.append(text(x + 20, TOP - 24, CONTESTANTS[name].label, "start"))
        x += 200
    return found
