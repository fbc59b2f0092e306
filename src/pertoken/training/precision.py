"""In what precision a step is computed: parameters, autocast, loss scale."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from pertoken.errors import RecipeError
from pertoken.objective.wide import device_of_sums

__all__ = ["Precision", "resolve_device"]


@dataclass(frozen=True)
class Precision:
    """`float32` and `float64` compute in that type. `bfloat16` and `float16` are automatic mixed precision: parameters,
    gradients and optimizer state stay float32, and float16 scales the loss with a `GradScaler`."""

    dtype: str  # float64 | float32 | bfloat16 | float16
    device: torch.device

    def __post_init__(self) -> None:
        """Raises RecipeError for float64 on a device that has none."""
        if self.dtype == "float64" and device_of_sums(self.device) != self.device:
            raise RecipeError(f'dtype="float64": {self.device.type} has none; use "float32", or device="cpu"')

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def low_dtype(self) -> torch.dtype | None:
        """What autocast computes matrix products in; None without it."""
        return None if self.dtype in ("float32", "float64") else getattr(torch, self.dtype)

    def autocast(self) -> AbstractContextManager[object]:
        return nullcontext() if self.low_dtype is None else torch.autocast(self.device.type, self.low_dtype)

    def is_emulated(self) -> bool:
        """Whether this is bfloat16 on a processor without instructions for it, where float32 is faster (measured)."""
        if self.dtype != "bfloat16" or self.device.type != "cpu":
            return False
        x, w = torch.ones(1024, 256), torch.ones(256, 256)
        low_x, low_w = x.bfloat16(), w.bfloat16()
        return _best_of_five(lambda: low_x @ low_w) > 1.5 * _best_of_five(lambda: x @ w)  # emulation costs far more

    def new_scaler(self) -> torch.amp.GradScaler:
        """Does nothing unless `dtype` is float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")


def _best_of_five(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises RecipeError for a device that is not there.

    Of several processes on a machine, each gives its `local_rank` and gets the CUDA device of that number. `mps` is
    one device for one process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if local_rank is not None and name.startswith("cuda"):
        name = f"cuda:{local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f'train.device="{name}": this machine has no such CUDA device; use "auto" or "cpu"')
    if device.type == "mps" and not (torch.backends.mps.is_available() and (device.index or 0) == 0):
        raise RecipeError(f'train.device="{name}": PyTorch has no such device here; use "auto" or "cpu"')
    if device.type == "mps" and local_rank is not None:
        raise RecipeError(f'train.device="{name}": is for one process; start one, or use "cpu"')
    return device
