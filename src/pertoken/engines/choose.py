"""Which engine runs a model on this machine, and why not a faster one.

An engine is one file of this package, whose `choose` is named in `ENGINES` of `recipe/homes.py`. What `"auto"` takes is
decided here.
"""

from __future__ import annotations

import torch

import pertoken.engines.torch_compile as torch_compile
from pertoken.engines.choice import Choice, ChooseEngine, have_kernels
from pertoken.engines.cpu.choose import by_kernels, engine_or_why_not
from pertoken.engines.plain import plain
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Execution
from pertoken.recipe.homes import ENGINES, at_home

__all__ = ["choose_engine"]

# torch.compile takes some 15 to 60 s and saves a part of each step: fewer steps than these do not earn it.
_WORTH_COMPILING = 500


def choose_engine(
    model: object, how: str, *, dtype: str, device: torch.device, total_steps: int, before: bool | None = None
) -> Choice:
    """What runs `model` in `dtype` on `device`, as `train.engine` says.

    `"auto"` takes the kernels on a CPU, compiled in seconds and kept in the cache, where there is a C compiler; on CUDA
    it takes torch.compile in runs of some length. `before`, whether the run generated code when it was started, is
    repeated where that can be. An engine that is asked for by name raises RecipeError where it cannot run here, or
    would not be used because of what the user has changed in the model.
    """
    if how != "auto":
        choose: ChooseEngine = at_home(ENGINES[how])
        return choose(model, dtype, device)
    if before is False:
        return plain("as when the run was started")
    if device.type == "cpu":
        return _fastest_on_a_cpu(model, dtype)
    if not isinstance(model, CausalLM):
        return plain("transformers' own code")
    if before is None and total_steps < _WORTH_COMPILING:
        return plain(f"torch.compile takes longer than it saves in fewer than {_WORTH_COMPILING} steps")
    why = torch_compile.not_compiled(model)
    if why is not None:
        return plain(why, f"training without torch.compile: {why}")
    return torch_compile.choose(model, dtype, device)


def _fastest_on_a_cpu(model: object, dtype: str) -> Choice:
    engine = engine_or_why_not(dtype)
    if isinstance(engine, str):
        expected = not have_kernels(dtype)
        return plain(engine, None if expected else _slower(engine))
    if not isinstance(model, CausalLM):
        return Choice(Execution(), "transformers' own code; the loss by kernels", compiled=True)
    why = engine.supports(model)
    return by_kernels(engine) if why is None else plain(why, _slower(why))


def _slower(why: str) -> str:
    return f"training without compiled kernels, several times slower: {why}"
