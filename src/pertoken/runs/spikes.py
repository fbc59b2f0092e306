"""Finite outliers among gradient norms: which they are, and what becomes of their step."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Literal

import torch

from pertoken.training.parallel import World

__all__ = ["SpikeStep", "Spikes"]

_WINDOW = 100  # steps
_ENOUGH = 20  # known norms, below which nothing is called an outlier


class SpikeStep(Exception):
    """The gradient norm of this step is an outlier, and `train.on_spike = "stop"`. Weights untouched."""


class Spikes:
    """Compares each step's gradient norm with the median of the last 100 finite ones.

    A norm above `factor` times the median is a spike, once 20 norms are known; with `factor` 0 none is. Every finite
    norm is remembered, that of a spike or a skipped step too, so a level that has changed for good is the usual one
    after some 50 steps. A median of 0 says nothing, and makes no spikes.
    """

    def __init__(self, on_spike: Literal["stop", "skip", "warn"], factor: float, norms: Iterable[float] = ()) -> None:
        self.on_spike = on_spike
        self.factor = factor
        self._norms = deque(norms, maxlen=_WINDOW)

    @property
    def norms(self) -> list[float]:
        """What is remembered, oldest first: a checkpoint keeps it, so that a resumed run decides alike."""
        return list(self._norms)

    @property
    def median(self) -> float:
        """Of the norms remembered; 0 as long as they are too few."""
        return statistics.median(self._norms) if len(self._norms) >= _ENOUGH else 0.0

    def ratio(self, norm: float) -> float | None:
        """`norm` over the median if it is a spike, None if not."""
        median = self.median
        is_spike = self.factor > 0 and median > 0 and math.isfinite(norm) and norm > self.factor * median
        return norm / median if is_spike else None

    def remember(self, norm: float) -> None:
        if math.isfinite(norm):
            self._norms.append(norm)

    def skips(self, norm: float, world: World) -> bool:
        """Whether this step's update is left out: asked by every rank before it, answered by rank 0 for all.

        Raises SpikeStep, on all ranks, where that is what a spike should do.
        """
        if self.on_spike == "warn" or self.factor == 0:
            return False
        # Ranks of different processors may compute norms that differ in their last bit, and must not decide apart.
        mine = world.is_main and self.ratio(norm) is not None
        is_spike = bool(world.sum(torch.tensor([float(mine)])))
        if is_spike and self.on_spike == "stop":
            raise SpikeStep(self.describe(norm))
        return is_spike

    def describe(self, norm: float) -> str:
        """The norm of a spike, beside what is usual."""
        median, count = self.median, len(self._norms)
        times = norm / median if median else math.inf
        return f"the gradient norm {norm:.4g} is {times:.3g} times {median:.4g}, the median of the last {count} steps"
