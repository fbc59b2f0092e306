"""The z-loss: log(Z)^2 of every supervised token (Chowdhery et al., "PaLM", 2022, section 5; there with 1e-4).

It keeps the logits' normalizer near 1, so that they do not drift, which low precision would round more and more.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["z_loss"]


def z_loss(nll_C: Tensor, log_z_C: Tensor) -> Tensor:
    """log(Z)^2 [C], a `RowFunction`."""
    return log_z_C.square()
