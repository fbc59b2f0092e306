"""Float64 where a device has it, else on the host: Apple's `mps` has none."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["device_of_sums", "in_float64"]

_WITHOUT_FLOAT64 = ("mps",)


def device_of_sums(device: torch.device) -> torch.device:
    """Where sums in float64 of tensors on `device` are formed: there, or on the host."""
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def in_float64(x: Tensor) -> Tensor:
    """`x` in float64 on `device_of_sums(x.device)`. Where that is the host, the host waits for the device."""
    return x.to(device_of_sums(x.device)).double()
