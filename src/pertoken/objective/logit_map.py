"""What some families do to a logit between the head's product and the soft-max: a scale, then a soft cap.

    y = cap * tanh(scale * x / cap)        dy/dx = scale * (1 - (y / cap)^2)

(Bello et al., "Neural Combinatorial Optimization", 2017, section 5, for the cap.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PLAIN_LOGITS", "LogitMap"]


@dataclass(frozen=True)
class LogitMap:
    """Of a model's logits, one by one. Neither a scale nor a cap by default."""

    scale: float = 1.0
    cap: float | None = None  # None: none

    def __call__(self, logits: Tensor) -> Tensor:
        """The definition, differentiable, in the dtype of `logits`."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def scale_hidden(self, hidden: Tensor) -> Tensor:
        """Hidden states whose product with the head's weight is scaled: one pass over [N, D] for one over [N, V]."""
        return hidden if self.scale == 1.0 else hidden * self.scale

    def cap_(self, logits: Tensor) -> Tensor | None:
        """In place, without a gradient: scaled `logits` are capped. Returns what the cap's gradient multiplies by."""
        if self.cap is None:
            return None
        tanh = logits.div_(self.cap).tanh_()
        slope = 1.0 - tanh.square()
        logits.mul_(self.cap)
        return slope


PLAIN_LOGITS = LogitMap()
