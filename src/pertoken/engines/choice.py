"""What `train.engine` leads to: how a model is run, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from pertoken.kernels.ops import Kernels
from pertoken.model.execution import Execution

__all__ = ["Choice", "ChooseEngine", "have_kernels"]

_KERNEL_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Choice:
    """What runs a model."""

    execution: Execution
    note: str  # about the engine, for the summary: what it is, or why there is no faster one
    compiled: bool = False  # code is generated for this machine, for the model or for its loss alone
    remark: str | None = None  # what the user should know besides

    @property
    def engine(self) -> str:
        return self.execution.engine.name

    def kernels(self, dtype: str, device: torch.device) -> Kernels | None:
        """Those of the run's dtype, for what is computed outside of the model."""
        made = self.compiled and self.engine != "compile" and device.type == "cpu" and have_kernels(dtype)
        return Kernels(getattr(torch, dtype)) if made else None


class ChooseEngine(Protocol):
    """How an engine's file offers it: what runs `model` in `dtype` on `device`, or a RecipeError with the remedy."""

    def __call__(self, model: object, dtype: str, device: torch.device) -> Choice: ...


def have_kernels(dtype: str) -> bool:
    """Whether the C kernels are for this dtype of the recipe."""
    return dtype in _KERNEL_DTYPES
