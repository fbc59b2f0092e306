"""Whether code is generated for this machine: kernels on a CPU, layers fused by torch.compile on CUDA."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch

from pertoken.errors import CompilerError, RecipeError
from pertoken.kernels.ops import Kernels
from pertoken.model.decoder import CausalLM
from pertoken.training.precision import Precision

__all__ = ["compile_model", "has_compiler"]

# torch.compile takes some 15 to 60 s and saves a part of each step: fewer steps than these do not earn it.
_WORTH_COMPILING = 500
_KERNEL_DTYPES = ("bfloat16", "float32")


def compile_model(
    model: CausalLM, how: Literal["auto", "on", "off"], precision: Precision, *, total_steps: int, before: bool | None
) -> tuple[bool, str | None]:
    """Prepare `model` as `train.compile` says; whether code is generated, and what the user should know.

    On a CPU that means kernels, compiled in seconds and kept in the cache, so `"auto"` uses them where there is a C
    compiler. On CUDA it means torch.compile, which `"auto"` uses in runs of some length. `before` is what the run
    decided when it was started, which `"auto"` repeats on a resume, where it can. `"on"` raises RecipeError where code
    cannot be generated, or would not be used because of what the user has changed in the model.
    """
    if how == "off" or (how == "auto" and before is False):
        return _without(model), None
    if precision.device.type != "cpu":
        if how == "auto" and before is None and (total_steps < _WORTH_COMPILING or not isinstance(model, CausalLM)):
            return False, None
        model.compile_layers()
        return True, None
    if how == "on" and not isinstance(model, CausalLM):
        why: str | None = "the kernels are for pertoken's own decoder"
    else:
        why = _use_kernels(model, precision)
    if why is None:
        return True, None
    if how == "on":
        raise RecipeError(f'train.compile="on": {why}; set it to "auto" or "off"')
    expected = precision.dtype not in _KERNEL_DTYPES
    return _without(model), None if expected else f"training without compiled kernels, several times slower: {why}"


def _use_kernels(model: CausalLM, precision: Precision) -> str | None:
    """Why not, if they cannot be. Of a foreign model, which lacks `use_kernels`, only the loss has kernels."""
    if precision.dtype not in _KERNEL_DTYPES:
        return f"the kernels are for bfloat16 and float32, not for {precision.dtype}"
    dtype = getattr(torch, precision.dtype)
    try:
        if not isinstance(model, CausalLM):
            Kernels(dtype)
            return None
        if model.unsupported is not None:
            return model.unsupported
        model.use_kernels(dtype)
        return None
    except CompilerError as error:
        return str(error)


def _without(model: CausalLM) -> bool:
    if isinstance(model, CausalLM):
        model.native = False
    if model.loss_impl == "auto":
        model.loss_impl = "chunked"  # which would look for kernels by itself
    return False


def has_compiler() -> bool:
    """Whether `torch.compile` finds a C++ compiler, which it needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
