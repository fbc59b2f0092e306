"""Whether a module is exactly what its class says: no subclass, hook or forward of a user's own.

What reads a weight past the module that holds it must ask first, or whatever a user has put there would be dropped
without a word.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["has_global_hook", "is_exactly", "is_plain_linear", "loaded", "users_hook"]

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is a product with its weight and nothing else, which then may be read past it."""
    if type(module) is not nn.Linear or module.bias is not None or "forward" in module.__dict__:
        return False
    return not has_global_hook() and not any(module.__dict__[key] for key in _HOOKS)


def has_global_hook() -> bool:
    """Whether torch.nn has a hook on all modules."""
    return any(getattr(torch_module, f"_global{key}", None) for key in _HOOKS)


def is_exactly(module: object, kind: type[nn.Module]) -> bool:
    """FSDP2 gives what it shards a class of its own, made of FSDPModule and the class that it was."""
    if type(module) is kind:
        return True
    sharded = loaded("torch.distributed.fsdp", "FSDPModule")
    return sharded is not None and type(module).__bases__ == (sharded, kind)


def users_hook(module: nn.Module, *, any_dtype: bool = False) -> str | None:
    """The hook on `module`, as the end of a sentence about it; None if there is none.

    The pair by which FSDP2 gathers and frees the weights of a module that it shards is not a user's, as long as it
    gathers them in float32, or `any_dtype`.
    """
    own = module.__dict__
    allowed: dict[str, set[int]] = {}
    sharded = loaded("torch.distributed.fsdp", "FSDPModule")
    if sharded is not None and isinstance(module, sharded):
        state = module._get_fsdp_state()
        policy = state._mp_policy
        if not any_dtype and {policy.param_dtype, policy.output_dtype} - {None, torch.float32}:
            return f"is gathered by FSDP2 in {policy.param_dtype or policy.output_dtype}"
        allowed["_forward_pre_hooks"] = _ids_of(state._pre_forward_hook_handle)
        allowed["_forward_hooks"] = _ids_of(state._post_forward_hook_handle)
    for key, words in _HOOKS.items():
        if own[key].keys() - allowed.get(key, ()):
            return f"has {words}"
    return None


def _ids_of(handle: Any) -> set[int]:
    """Of one hook, or of those of modules that are gathered together."""
    return {getattr(one, "id", -1) for one in getattr(handle, "handles", (handle,))}


def loaded(package: str, name: str) -> Any:
    """Of a package of torch's whose import costs half a second, and which nothing needs that has not imported it."""
    return getattr(sys.modules.get(package), name, None)
