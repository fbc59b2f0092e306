"""Weights lie in memory where torch would put them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["aligned"]

_ALIGNMENT = 64  # bytes, as torch allocates


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it where torch's own allocator would put one.

    The last bit of a matrix product may depend on where its factors lie. In a mapped file they lie at any multiple of
    eight bytes; a resumed run would compute with them what the uninterrupted run computes with aligned ones.
    """
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()
