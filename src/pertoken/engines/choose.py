"""Which engine runs a model on this machine, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pertoken.engines.cpu.engine import CpuEngine
from pertoken.engines.torch_compile import CompileEngine, has_compiler, not_compiled
from pertoken.errors import CompilerError, RecipeError
from pertoken.kernels.ops import Kernels
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Execution

__all__ = ["Choice", "EngineName", "choose_engine"]

EngineName = Literal["auto", "cpu", "compile", "plain"]

# torch.compile takes some 15 to 60 s and saves a part of each step: fewer steps than these do not earn it.
_WORTH_COMPILING = 500
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
        compiled = self.compiled and self.engine != "compile" and device.type == "cpu"
        return Kernels(getattr(torch, dtype)) if compiled and _fits(dtype) else None


def choose_engine(
    model: object, how: EngineName, *, dtype: str, device: torch.device, total_steps: int, before: bool | None = None
) -> Choice:
    """What runs `model` in `dtype` on `device`, as `train.engine` says.

    `"auto"` takes the kernels on a CPU, compiled in seconds and kept in the cache, where there is a C compiler; on CUDA
    it takes torch.compile in runs of some length. `before`, whether the run generated code when it was started, is
    repeated where that can be. `"cpu"` and `"compile"` raise RecipeError where that engine cannot run here, or would
    not be used because of what the user has changed in the model.
    """
    if how == "plain":
        return _plain('as train.engine="plain" says')
    if how == "cpu":
        return _cpu(model, dtype, device)
    if how == "compile":
        return _compile(model, device)
    if before is False:
        return _plain("as when the run was started")
    if device.type == "cpu":
        return _fastest_on_a_cpu(model, dtype)
    if not isinstance(model, CausalLM):
        return _plain("transformers' own code")
    if before is None and total_steps < _WORTH_COMPILING:
        return _plain(f"torch.compile takes longer than it saves in fewer than {_WORTH_COMPILING} steps")
    why = not_compiled(model)
    return _compile(model, device) if why is None else _plain(why, f"training without torch.compile: {why}")


def _plain(note: str, remark: str | None = None) -> Choice:
    # "auto" would look for kernels for the loss by itself.
    return Choice(Execution(loss_impl="chunked"), note, remark=remark)


def _cpu(model: object, dtype: str, device: torch.device) -> Choice:
    if device.type != "cpu":
        raise RecipeError(f'train.engine="cpu": train.device is {device}; use "auto", "compile" or "plain"')
    engine = _kernels_or_why_not(dtype)
    why = engine if isinstance(engine, str) else engine.supports(model)
    if isinstance(engine, str) or why is not None:
        raise RecipeError(f'train.engine="cpu": {why}; set it to "auto" or "plain"')
    return _by_kernels(engine)


def _by_kernels(engine: CpuEngine) -> Choice:
    return Choice(Execution(engine), "kernels compiled for this processor", compiled=True)


def _compile(model: object, device: torch.device) -> Choice:
    why = not_compiled(model)
    if why is None and device.type == "cpu" and not has_compiler():
        why = "torch.compile finds no C++ compiler"
    if why is not None:
        raise RecipeError(f'train.engine="compile": {why}; set it to "auto" or "plain"')
    return Choice(Execution(CompileEngine()), "layers fused by torch.compile", compiled=True)


def _fastest_on_a_cpu(model: object, dtype: str) -> Choice:
    engine = _kernels_or_why_not(dtype)
    if isinstance(engine, str):
        expected = not _fits(dtype)
        return _plain(engine, None if expected else _slower(engine))
    if not isinstance(model, CausalLM):
        return Choice(Execution(), "transformers' own code; the loss by kernels", compiled=True)
    why = engine.supports(model)
    return _by_kernels(engine) if why is None else _plain(why, _slower(why))


def _slower(why: str) -> str:
    return f"training without compiled kernels, several times slower: {why}"


def _fits(dtype: str) -> bool:
    return dtype in _KERNEL_DTYPES


def _kernels_or_why_not(dtype: str) -> CpuEngine | str:
    if not _fits(dtype):
        return f"the kernels are for bfloat16 and float32, not for {dtype}"
    try:
        return CpuEngine(getattr(torch, dtype))
    except CompilerError as error:
        return str(error)
