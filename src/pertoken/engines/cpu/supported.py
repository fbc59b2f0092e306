"""Whether the kernels compute what the modules of a model would.

The kernels read parameters past the modules that hold them, so they may stand in only for modules that are exactly what
the decoder is built of. Whatever else a user has put there (an adapter, a bias, a hook, a parametrization) runs plain.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from pertoken.kernels.ops import MAX_HEAD_DIM
from pertoken.model.blocks import Attention, Decoder, Layer
from pertoken.model.mlp import MLP
from pertoken.model.moe import MixtureOfExperts
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["is_plain_linear", "unsupported"]

_Part = tuple[str, nn.Module | None, type[nn.Module], tuple[int, ...]]  # its name, it, what it must be, its weight

_QKV = (".q_proj", ".k_proj", ".v_proj")

_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def unsupported(model: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why `model`, which must be exactly a `cls` (CausalLM), cannot run through the kernels, in words; None if it can.

    0.1 ms for eight layers, so that every forward pass asks: nothing is remembered that a user might change
    in between. Hooks of the model itself do not matter, since it is called either way. Experts are not looked into:
    they run plain.
    """
    config: ResolvedModelConfig = model.config  # type: ignore[assignment]
    if not _is_exactly(model, cls):
        return f"the model is a {type(model).__name__}"
    if config.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {config.head_dim}, and the kernels take {MAX_HEAD_DIM} at most"
    if _has_global_hook():
        return "torch.nn has a hook on all modules"
    for name, module, kind, shape in _parts(model, config):
        has_bias = config.qkv_bias and name.endswith(_QKV)
        why = _difference(module, kind, shape, has_bias, config.rms_norm_eps)
        if why is not None:
            return f"{name} {why}"
    return None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling `module` is a product with its weight and nothing else, which then may be read past it."""
    if type(module) is not nn.Linear or module.bias is not None or "forward" in module.__dict__:
        return False
    return not _has_global_hook() and not any(module.__dict__[key] for key in _HOOKS)


def _has_global_hook() -> bool:
    return any(getattr(torch_module, f"_global{key}", None) for key in _HOOKS)


def _parts(model: nn.Module, config: ResolvedModelConfig) -> Iterator[_Part]:
    """Every module that is skipped, or that gets other arguments, when the kernels run."""
    d, f, head_dim, vocab = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    decoder = model._modules.get("model")
    yield "model", decoder, Decoder, ()
    assert isinstance(decoder, Decoder)
    yield "model.embed_tokens", decoder._modules.get("embed_tokens"), nn.Embedding, (vocab, d)
    yield "model.norm", decoder._modules.get("norm"), nn.RMSNorm, (d,)
    head = model._modules.get("lm_head")
    if head is not None:
        yield "lm_head", head, nn.Linear, (vocab, d)
    layers = decoder._modules.get("layers")
    yield "model.layers", layers, nn.ModuleList, ()
    assert isinstance(layers, nn.ModuleList)
    for i, layer in layers._modules.items():
        name = f"model.layers.{i}"
        yield name, layer, Layer, ()
        assert isinstance(layer, Layer)
        of_layer = layer._modules
        yield f"{name}.input_layernorm", of_layer.get("input_layernorm"), nn.RMSNorm, (d,)
        attention = of_layer.get("self_attn")
        yield f"{name}.self_attn", attention, Attention, ()
        assert isinstance(attention, Attention)
        of_attention = attention._modules
        yield f"{name}.self_attn.q_proj", of_attention.get("q_proj"), nn.Linear, (queries, d)
        yield f"{name}.self_attn.k_proj", of_attention.get("k_proj"), nn.Linear, (keys, d)
        yield f"{name}.self_attn.v_proj", of_attention.get("v_proj"), nn.Linear, (keys, d)
        yield f"{name}.self_attn.o_proj", of_attention.get("o_proj"), nn.Linear, (d, queries)
        for which in ("q_norm", "k_norm"):
            norm = of_attention.get(which)
            if norm is not None or config.qk_norm:  # a user may give other families one: it is not skipped
                yield f"{name}.self_attn.{which}", norm, nn.RMSNorm, (head_dim,)
        yield f"{name}.post_attention_layernorm", of_layer.get("post_attention_layernorm"), nn.RMSNorm, (d,)
        mlp = of_layer.get("mlp")
        yield f"{name}.mlp", mlp, MixtureOfExperts if config.use_moe else MLP, ()
        if isinstance(mlp, MLP):
            yield f"{name}.mlp.gate_proj", mlp._modules.get("gate_proj"), nn.Linear, (f, d)
            yield f"{name}.mlp.up_proj", mlp._modules.get("up_proj"), nn.Linear, (f, d)
            yield f"{name}.mlp.down_proj", mlp._modules.get("down_proj"), nn.Linear, (d, f)


def _difference(
    module: nn.Module | None, kind: type[nn.Module], shape: tuple[int, ...], has_bias: bool, eps: float
) -> str | None:
    """What of `module` is not as the kernels take it to be, as the end of a sentence about it."""
    if module is None:
        return "is missing"
    if not _is_exactly(module, kind):
        parametrized = "parametrizations" in module._modules
        return "is parametrized" if parametrized else f"is a {type(module).__name__}"
    own = module.__dict__
    if "forward" in own:
        return "has a forward of its own"
    if module._compiled_call_impl is not None:
        return "is compiled by torch.compile"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        why = _foreign_hook(module)
        if why is not None:
            return why
    if kind is nn.RMSNorm and own["eps"] != eps:
        return f"has an eps of {own['eps']}, not {eps}"
    if kind is nn.Embedding and not (
        own["padding_idx"] is None and own["max_norm"] is None and not own["scale_grad_by_freq"] and not own["sparse"]
    ):
        return "does more than look rows up"
    if not shape:
        return None
    why = _parameter_difference(own["_parameters"].get("weight"), "weight", kind, shape)
    if why is not None or kind is not nn.Linear:
        return why
    bias = own["_parameters"].get("bias")
    if not has_bias:
        return None if bias is None else "has a bias"
    return _parameter_difference(bias, "bias", kind, shape[:1])


def _parameter_difference(weight: Any, what: str, kind: type[nn.Module], shape: tuple[int, ...]) -> str | None:
    if weight is None:
        return f"has no {what} of its own"
    if type(weight) is not nn.Parameter and type(weight) is not _loaded("torch.distributed.tensor", "DTensor"):
        return f"has a {what} that is a {type(weight).__name__}"
    if weight.dtype != torch.float32:
        return f"is in {str(weight.dtype).removeprefix('torch.')}, not in float32"
    if not weight.is_cpu:
        return f"is on {weight.device}, not on the CPU"
    if weight.shape != shape:
        return f"has a {what} of {tuple(weight.shape)}, not {shape}"
    if kind is nn.RMSNorm and not weight.is_contiguous():
        return "has a weight that is not contiguous"
    return None


def _is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """FSDP2 gives what it shards a class of its own, made of FSDPModule and the class that it was."""
    if type(module) is kind:
        return True
    sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    return sharded is not None and type(module).__bases__ == (sharded, kind)


def _foreign_hook(module: nn.Module) -> str | None:
    """The hook that is not the one pair by which FSDP2 gathers and frees the weights of a module it shards."""
    own = module.__dict__
    allowed: dict[str, set[int]] = {}
    sharded = _loaded("torch.distributed.fsdp", "FSDPModule")
    if sharded is not None and isinstance(module, sharded):
        state = module._get_fsdp_state()
        policy = state._mp_policy
        if policy.param_dtype not in (None, torch.float32) or policy.output_dtype not in (None, torch.float32):
            return f"is gathered by FSDP2 in {policy.param_dtype or policy.output_dtype}"
        allowed["_forward_pre_hooks"] = {getattr(state._pre_forward_hook_handle, "id", -1)}
        allowed["_forward_hooks"] = {getattr(state._post_forward_hook_handle, "id", -1)}
    for key, words in _HOOKS.items():
        if own[key].keys() - allowed.get(key, ()):
            return f"has {words}"
    return None


def _loaded(package: str, name: str) -> Any:
    """Of a package of torch's whose import costs half a second, and which nothing needs that has not imported it."""
    return getattr(sys.modules.get(package), name, None)
