"""What a kernel may be given: checks of tensors, and arguments as C takes them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["C_FLOAT", "C_INT", "as_c", "expect", "expect_indices"]

C_FLOAT, C_INT = ctypes.c_float, ctypes.c_int


def expect(name: str, x: Tensor, dtype: torch.dtype, *shape: int, apart: bool = False) -> None:
    """TypeError or ValueError unless `x` is a plain tensor of `shape` (-1: any), contiguous, or `apart` in its rows."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        raise TypeError(f"{name} is a {type(x).__name__}: must be a plain tensor")
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}: must be {dtype}")
    if x.layout != torch.strided or not x.is_cpu:
        raise ValueError(f"{name} is {x.layout} on {x.device}: must be dense, on the CPU")
    if x.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} has shape {list(x.shape)}: must be {list(shape)}")
    walkable = x.shape[-1] <= 1 or x.stride(-1) == 1 if apart else x.is_contiguous()
    if not walkable:
        raise ValueError(f"{name} has strides {x.stride()}: must be contiguous{' rows' if apart else ''}")


def expect_indices(name: str, x: Tensor, end: int) -> None:
    if x.numel():
        low, high = x.aminmax()
        if not 0 <= int(low) <= int(high) < end:
            raise IndexError(f"{name} from {int(low)} to {int(high)}: must be within [0, {end})")


def as_c(value: Any) -> Any:
    match value:
        case None:
            return ctypes.c_void_p(None)
        case Tensor():
            return ctypes.c_void_p(value.data_ptr())
        case int():
            return ctypes.c_int64(value)
        case _:
            return value
