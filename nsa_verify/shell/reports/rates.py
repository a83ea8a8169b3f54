"""The chart of cases a second over the time of a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

WIDTH, HEIGHT = 400, 170
"""Narrow, so that the letters can be read where a phone shows the whole width."""
LEFT, BOTTOM, TOP, RIGHT = 40, 30, 12, 14
MOST_STEPS: Final = 40
TICKS: Final = 4


def chart(points: Sequence[tuple[float, int]]) -> str:
    """SVG of ``points``, cases so far at some seconds; empty if there are too few to tell a rate."""
    ends = [(0.0, 0), *points]
    duration = ends[-1][0]
    steps = min(MOST_STEPS, len(points))
    if steps < 2 or not duration:
        return ""
    bounds = [duration * it / steps for it in range(steps + 1)]
    so_far = [_at(ends, it) for it in bounds]
    rates = [(so_far[it + 1] - so_far[it]) * steps / duration for it in range(steps)]
    top = _round_up(max(rates))
    unit, name = (3600.0, "hours") if duration > 7200 else (60.0, "minutes") if duration > 180 else (1.0, "seconds")
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    told = []
    for it in range(TICKS + 1):
        y = TOP + up * (1 - it / TICKS)
        told.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        told.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{top * it / TICKS:g}</text>')
    axis = _round_up(duration / unit) / TICKS
    for it in range(TICKS + 1):
        if axis * it * unit <= duration * 1.001:
            x = LEFT + across * axis * it * unit / duration
            told.append(f'<text x="{x:.1f}" y="{HEIGHT - 15}" text-anchor="middle">{axis * it:g}</text>')
    told.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{name}</text>')
    line = []
    for it, rate in enumerate(rates):
        y = TOP + up * (1 - rate / top)
        line.append(f"{LEFT + across * it / steps:.1f},{y:.1f} {LEFT + across * (it + 1) / steps:.1f},{y:.1f}")
    floor = f"{WIDTH - RIGHT},{TOP + up} {LEFT},{TOP + up}"
    told.append(f'<polygon points="{" ".join(line)} {floor}"/><polyline points="{" ".join(line)}"/>')
    label = f"{top:g} cases a second at most"
    return f'<svg class="rates" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(told)}</svg>'


def _at(points: Sequence[tuple[float, int]], second: float) -> float:
    """Cases so far at ``second``, between two points in proportion."""
    place = min(max(1, bisect_right(points, (second, float("inf")))), len(points) - 1)
    (before, low), (after, high) = points[place - 1], points[place]
    share = 1.0 if after <= before else min(1.0, max(0.0, (second - before) / (after - before)))
    return low + (high - low) * share


def _round_up(value: float) -> float:
    """The least of 1, 2, 4, 6, 8 or 10 times a power of ten that is no less."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value > 0:
        power /= 10
    return next((power * it for it in (1, 2, 4, 6, 8, 10) if power * it >= value), power * 10)
