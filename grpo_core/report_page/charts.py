"""Curves as inline SVG: a line, a band around it, and readable axes, without scripts.

Owns scales, ticks and thinning. Colours are the page's (CSS classes), so that it can be dark or printed. Invariant:
only numbers and the caller's own titles reach the SVG, at most `MAX_POINTS` of them a line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Final

MAX_POINTS: Final = 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 22

Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One chart: a value by step, perhaps with a band, perhaps with a second line."""

    title: str
    steps: Sequence[float]
    values: Sequence[float | None]
    band: Sequence[tuple[float, float] | None] = ()
    other: Sequence[float | None] = ()
    """The second line, in grey; the note says what it is."""
    least: float | None = None
    """The axis includes at least this value."""
    most: float | None = None
    note: str = ""
    marks: Sequence[int] = ()
    """Steps at which an audit warned."""


def svg(curve: Curve, *, width: int = 460, height: int = 170) -> str:
    """The chart; empty if there is no value."""
    points, other = thin(curve.steps, curve.values), thin(curve.steps, curve.other)
    if not points:
        return ""
    band = _thin_band(curve)
    everything = [y for _, y in (*points, *other)] + [y for _, low, high in band for y in (low, high)]
    bounds = [value for value in (curve.least, curve.most) if value is not None]
    y_ticks = ticks(min(*everything, *bounds, math.inf), max(*everything, *bounds, -math.inf))
    frame = _Frame(
        x=(float(curve.steps[0]), float(curve.steps[-1])), y=(y_ticks[0], y_ticks[-1]), width=width, height=height
    )
    parts = [*_axes(frame, y_ticks)]
    parts += [f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{height - BOTTOM}"/>' for x in _xs(frame, curve)]
    if band:
        edge = [frame.at(x, high) for x, _, high in band] + [frame.at(x, low) for x, low, _ in reversed(band)]
        parts.append(f'<polygon class="band" points="{" ".join(edge)}"/>')
    if other:
        parts.append(_line(frame, other, "other"))
    parts.append(_line(frame, points, "line"))
    label = escape(describe(curve), quote=True)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}" preserveAspectRatio="xMidYMid meet">'
        + "".join(parts)
        + "</svg>"
    )


def describe(curve: Curve) -> str:
    """The chart in a sentence, for screen readers."""
    known = _known(curve.steps, curve.values)
    (first, begin), (last, end) = known[0], known[-1]
    values = [value for _, value in known]
    return (
        f"{curve.title}: {number(begin)} at step {first:g}, {number(end)} at step {last:g}; "
        f"lowest {number(min(values))}, highest {number(max(values))}."
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent if possible."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def thin(steps: Sequence[float], values: Sequence[float | None]) -> list[Point]:
    """At most `MAX_POINTS` points: neighbours are averaged, so that none of them is chosen by luck."""
    known = _known(steps, values)
    if len(known) <= MAX_POINTS:
        return known
    cuts = [len(known) * i // MAX_POINTS for i in range(MAX_POINTS + 1)]
    parts = [known[low:high] for low, high in pairwise(cuts)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round values from below `low` to above `high`."""
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = min(low, 0.0), max(high, 0.0)
        high = high if high > low else 1.0
    rough = (high - low) / 4
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(size * magnitude for size in (1, 2, 2.5, 5, 10) if size * magnitude >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    x: tuple[float, float]
    y: tuple[float, float]
    width: int
    height: int

    def at(self, x: float, y: float) -> str:
        return f"{self.across(x)},{self.down(y)}"

    def across(self, x: float) -> float:
        low, high = self.x
        share = (x - low) / (high - low) if high > low else 0.5
        return round(LEFT + share * (self.width - LEFT - RIGHT), 1)

    def down(self, y: float) -> float:
        low, high = self.y
        return round(self.height - BOTTOM - (y - low) / (high - low) * (self.height - TOP - BOTTOM), 1)


def _axes(frame: _Frame, y_ticks: Sequence[float]) -> list[str]:
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    parts: list[str] = []
    for value in y_ticks:
        y = frame.down(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{number(value)}</text>')
    low, high = frame.x
    inner = [value for value in ticks(low, high) if low < value < high and high - value > (high - low) / 12]
    for value, anchor in ((low, "start"), *((value, "middle") for value in inner), (high, "end")):
        if value > low or anchor == "start":
            x = frame.across(value)
            parts.append(f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="{anchor}">{value:g}</text>')
    return parts


def _line(frame: _Frame, points: Sequence[Point], name: str) -> str:
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="{name} dot" cx="{frame.across(x)}" cy="{frame.down(y)}" r="3"/>'
    return f'<polyline class="{name}" points="{" ".join(frame.at(x, y) for x, y in points)}"/>'


def _known(steps: Sequence[float], values: Sequence[float | None]) -> list[Point]:
    return [(step, value) for step, value in zip(steps, values, strict=False) if value is not None]


def _thin_band(curve: Curve) -> list[tuple[float, float, float]]:
    lows = thin(curve.steps, [pair[0] if pair else None for pair in curve.band])
    highs = thin(curve.steps, [pair[1] if pair else None for pair in curve.band])
    return [(x, low, high) for (x, low), (_, high) in zip(lows, highs, strict=True)]


def _xs(frame: _Frame, curve: Curve) -> list[float]:
    return [frame.across(step) for step in curve.marks if curve.steps[0] <= step <= curve.steps[-1]]
