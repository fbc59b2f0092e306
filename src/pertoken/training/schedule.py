"""The learning rate of every step."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

__all__ = ["count_total_steps", "count_warmup_steps", "lr_at", "set_lr"]


def count_total_steps(epochs: int | float, steps_per_epoch: int) -> int:
    """The steps of `epochs` epochs, rounded up. A fraction counts as the decimal that was written: 0.1 is a tenth."""
    return math.ceil(Fraction(repr(epochs)) * steps_per_epoch)


def count_warmup_steps(total_steps: int, *, warmup_steps: int, warmup_ratio: float | None) -> int:
    """`warmup_steps`, or `warmup_ratio` of all steps, rounded up as transformers does, and exactly for decimals."""
    return warmup_steps if warmup_ratio is None else math.ceil(Fraction(repr(warmup_ratio)) * total_steps)


def lr_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str = "cosine",
    min_lr_ratio: float = 0.1,
    decay_ratio: float = 0.2,
) -> float:
    """The learning rate of step `step`; steps count from 1, and step `total_steps` is the last.

    Warm-up is `peak * step / warmup_steps`. After it, with t = (step - warmup_steps) / (total_steps - warmup_steps) in
    [0, 1] and r = `min_lr_ratio`:

    - cosine: peak * (r + (1 - r) * (1 + cos(pi t)) / 2); without warm-up and with r = 0.1 this is MiniMind's
      peak * (0.1 + 0.45 * (1 + cos(pi * step / total_steps)));
    - linear: peak * (1 - (1 - r) * t);
    - constant: peak;
    - wsd (warm-up, stable, decay: Hu et al., "MiniCPM", 2024): peak until the last `decay_ratio` of the steps, then
      linear down to r * peak at the last step.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    t = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    match schedule:
        case "cosine":
            return peak * (min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * t)) / 2)
        case "linear":
            return peak * (1 - (1 - min_lr_ratio) * t)
        case "constant":
            return peak
        case "wsd":
            decayed = max(0.0, 1 - (total_steps - step) / max(1.0, decay_ratio * total_steps))
            return peak * (1 - (1 - min_lr_ratio) * decayed)
        case _:
            raise AssertionError(schedule)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next update, for every group times its own factor (`lr_ratio`, 1 where it has none)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
