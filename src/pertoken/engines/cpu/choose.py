"""`train.engine = "cpu"`: the C kernels, where there is a compiler, a CPU, and a model that they can compute."""

from __future__ import annotations

import torch

from pertoken.engines.choice import Choice, have_kernels
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.errors import CompilerError, RecipeError
from pertoken.model.execution import Execution

__all__ = ["by_kernels", "choose", "engine_or_why_not"]


def choose(model: object, dtype: str, device: torch.device) -> Choice:
    """Raises RecipeError where the kernels cannot run `model` here."""
    if device.type != "cpu":
        raise RecipeError(f'train.engine="cpu": train.device is {device}; use "auto", "compile" or "plain"')
    engine = engine_or_why_not(dtype)
    why = engine if isinstance(engine, str) else engine.supports(model)
    if isinstance(engine, str) or why is not None:
        raise RecipeError(f'train.engine="cpu": {why}; set it to "auto" or "plain"')
    return by_kernels(engine)


def by_kernels(engine: CpuEngine) -> Choice:
    return Choice(Execution(engine), "kernels compiled for this processor", compiled=True)


def engine_or_why_not(dtype: str) -> CpuEngine | str:
    """The engine, or in words why there is none for this dtype on this machine."""
    if not have_kernels(dtype):
        return f"the kernels are for bfloat16 and float32, not for {dtype}"
    try:
        return CpuEngine(getattr(torch, dtype))
    except CompilerError as error:
        return str(error)
