"""The engine "compile": the token-wise part of every block fused by torch.compile, once for any number of tokens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from pertoken.data.batch.pack import MicroBatch
from pertoken.engines.choice import Choice
from pertoken.errors import RecipeError
from pertoken.model.attention import attention
from pertoken.model.blocks import Attention, Layer, call
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Execution, ForwardPass
from pertoken.model.hooks import has_global_hook, is_exactly, users_hook
from pertoken.model.plain import PlainPass

__all__ = ["CompileEngine", "choose", "has_compiler", "not_compiled"]


def choose(model: object, dtype: str, device: torch.device) -> Choice:
    """Raises RecipeError where `model` cannot run compiled here."""
    why = not_compiled(model)
    if why is None and device.type == "cpu" and not has_compiler():
        why = "torch.compile finds no C++ compiler"
    if why is not None:
        raise RecipeError(f'train.engine="compile": {why}; set it to "auto" or "plain"')
    return Choice(Execution(CompileEngine()), "layers fused by torch.compile", compiled=True)


class CompileEngine:
    """The plain modules' own code, compiled. Attention stays as it is, and so do experts: their shapes differ from one
    micro-batch to the next."""

    name = "compile"

    def __init__(self, **options: Any) -> None:
        """`options` are torch.compile's."""
        # Here and not as decorators, which would import the compiler, two seconds' work, with this module.
        disable: Callable[[Any], Any] = torch.compiler.disable
        self._attention = disable(attention)  # or every set of rectangles would be a graph of its own
        self._block = partial(torch.compile(Layer.plain, dynamic=True, **options), call_experts=disable(call))

    def supports(self, model: object) -> str | None:
        return not_compiled(model)

    def begin(self, model: CausalLM, micro_batch: MicroBatch, casts: object) -> ForwardPass:
        if not_compiled(model) is not None:
            return PlainPass(model, micro_batch)
        return PlainPass(model, micro_batch, block=self._block, attend=self._attention)


def not_compiled(model: object) -> str | None:
    """Why `model` cannot run compiled, in words; None if it can.

    The compiler reads the modules' own code, whatever a user has made of it. It does not look for hooks again, though,
    once it has compiled a module, nor would it find a `plain` of another class than `Layer`.
    """
    if not isinstance(model, CausalLM):
        return "torch.compile is for pertoken's own decoder"
    if has_global_hook():
        return "torch.nn has a hook on all modules"
    for i, layer in enumerate(model.model.layers):
        why = _difference(f"model.layers.{i}", layer)
        if why is not None:
            return why
    return None


def _difference(name: str, layer: nn.Module) -> str | None:
    if not is_exactly(layer, Layer):
        return f"{name} is a {type(layer).__name__}"
    if not is_exactly(layer.self_attn, Attention):
        return f"{name}.self_attn is a {type(layer.self_attn).__name__}"
    if layer._compiled_call_impl is not None:
        return f"{name} is compiled already"
    for inner, module in layer.named_modules(prefix=name):
        why = users_hook(module, any_dtype=True)
        if why is not None:
            return f"{inner} {why}"
    return None


def has_compiler() -> bool:
    """Whether `torch.compile` finds a C++ compiler, which it needs on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))
