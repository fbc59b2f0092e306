"""Where the parts of a drawing lie, in percent of its width and height: it fits every screen, its text unscaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log10
from typing import Any

__all__ = ["Bar", "Histogram", "Segment", "Tick", "histogram", "stack"]

_MOST_X_TICKS, _Y_TICKS = 6, 4


@dataclass(frozen=True)
class Bar:
    low: float
    high: float | None  # None: without an end
    count: float
    x: float
    width: float
    height: float


@dataclass(frozen=True)
class Tick:
    value: float
    at: float


@dataclass(frozen=True)
class Histogram:
    bars: list[Bar]
    x_ticks: list[Tick]
    y_ticks: list[Tick]  # `at` from below
    total: float
    most: Bar


@dataclass(frozen=True)
class Segment:
    name: str
    value: float
    x: float
    width: float


def histogram(edges: Sequence[float], counts: Sequence[float]) -> Histogram | None:
    """Bars of equal width for counts between edges; None where nothing was counted. One edge may be missing: the last
    bar then has no end."""
    if not any(counts):
        return None
    bins = [(low, edges[i + 1] if i + 1 < len(edges) else None) for i, low in enumerate(edges[: len(counts)])]
    step = _round_up(max(counts) / _Y_TICKS)
    top = step * ceil(max(counts) / step)
    width = 100 / len(bins)
    bars = [
        Bar(low, high, n, i * width, width, 100 * n / top)
        for i, ((low, high), n) in enumerate(zip(bins, counts, strict=True))
    ]
    every = 1  # doubled, since edges are multiples of powers of two: 0, 512, 1024
    while len(edges) / every > _MOST_X_TICKS:
        every *= 2
    x_ticks = [Tick(edge, i * width) for i, edge in enumerate(edges) if i % every == 0]
    y_ticks = [Tick(step * i, 100 * step * i / top) for i in range(round(top / step) + 1)]
    return Histogram(bars, x_ticks, y_ticks, sum(counts), max(bars, key=lambda bar: bar.count))


def stack(parts: Mapping[str, Any], whole: float) -> list[Segment]:
    """Parts of `whole`, one after the other. What is unknown has no width."""
    found, x = [], 0.0
    for name, value in parts.items():
        width = 100 * value / whole if value and whole else 0.0
        found.append(Segment(name, value, x, width))
        x += width
    return found


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    power = 10 ** max(0, int(log10(value))) if value >= 1 else 1
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)
