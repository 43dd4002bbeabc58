"""The rate against the number of vCPUs, measured, predicted and published, as an SVG file.

Both axes are logarithmic: the published curves span two decades either way, and what matters of a
curve here is where it bends.  It is one plot with a few lines, so it is written directly rather
than by a plotting library, which would be the largest thing that the package needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from xml.sax.saxutils import escape

__all__ = ["Line", "svg"]

_WIDTH, _HEIGHT = 900, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 300, 40, 60
_COLOURS = ("#0b5394", "#cc4125", "#38761d", "#7f6000", "#674ea7", "#444444")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: ``points`` are (vCPUs, pages per second), ``dashed`` for what was not measured.

    ``spreads`` gives the least and the most of each point, if they are known.
    """

    name: str
    points: Sequence[tuple[int, float]]
    dashed: bool = False
    spreads: Sequence[tuple[float, float]] = ()


def svg(title: str, lines: Sequence[Line]) -> str:
    """The text of the file.  Raises :class:`ValueError` without a point."""
    points = [point for line in lines for point in line.points]
    if not points:
        raise ValueError("nothing to plot")
    axes = _Axes(
        max(n for n, _ in points),
        floor(log10(min(rate for _, rate in points))),
        ceil(log10(max(rate for _, rate in points))),
    )
    body = [*axes.grid(), _text(_WIDTH / 2 - 100, 22, title, "middle", 15)]
    for number, line in enumerate(lines):
        body += _curve(axes, line, _COLOURS[number % len(_COLOURS)], number)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}"'
        f' viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">'
    )
    white = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    return "\n".join([head, white, *body, "</svg>", ""])


class _Axes:
    """Where a number of vCPUs and a rate lie.  ``low`` and ``high`` are decades."""

    def __init__(self, most_vcpus: int, low: int, high: int) -> None:
        self.doublings = max(1, (most_vcpus - 1).bit_length())
        self.low, self.high = low, max(high, low + 1)

    def x(self, vcpus: float) -> float:
        width = _WIDTH - _LEFT - _RIGHT
        return _LEFT + width * log10(vcpus) / log10(2) / self.doublings

    def y(self, rate: float) -> float:
        height = _HEIGHT - _TOP - _BOTTOM
        return _HEIGHT - _BOTTOM - height * (log10(rate) - self.low) / (self.high - self.low)

    def grid(self) -> list[str]:
        parts = []
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for k in range(self.doublings + 1):
            x = self.x(2**k)
            parts.append(_rule(x, _TOP, x, bottom))
            parts.append(_text(x, bottom + 18, str(2**k), "middle"))
        for decade in range(self.low, self.high + 1):
            y = self.y(10**decade)
            parts.append(_rule(_LEFT, y, right, y))
            parts.append(_text(_LEFT - 8, y + 4, _number(10**decade), "end"))
        parts.append(_text((_LEFT + right) / 2, bottom + 42, "vCPUs", "middle"))
        parts.append(_text(_LEFT, _TOP - 8, "pages/s, whole VM", "middle"))
        return parts


def _curve(axes: _Axes, line: Line, colour: str, number: int) -> list[str]:
    places = [(axes.x(n), axes.y(rate)) for n, rate in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="6 4"' if line.dashed else ""
    stroke = f'stroke="{colour}" stroke-width="1.6"'
    parts = [f'<polyline points="{path}" fill="none" {stroke}{dash}/>']
    fill = "white" if line.dashed else colour
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" {stroke}/>' for x, y in places
    ]
    for (x, _), (least, most) in zip(places, line.spreads, strict=False):
        ends = f'y1="{axes.y(least):.1f}" y2="{axes.y(most):.1f}"'
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} {stroke}/>')
    x, y = _WIDTH - _RIGHT + 16, _TOP + 20 * number + 10
    parts.append(f'<line x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}" {stroke}{dash}/>')
    parts.append(_text(x + 32, y + 4, line.name, "start"))
    return parts


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place}>{escape(text)}</text>"


def _number(n: float) -> str:
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:g} {unit}"
    return f"{n:g}"
