"""Whether the kernels compute what the modules of a model would.

The kernels read parameters past the modules that hold them, so they may stand in only for modules that are exactly what
the decoder is built of, or a `LoraLinear` in place of a linear layer. Whatever else a user has put there (another
adapter, a bias, a hook, a parametrization) runs plain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from pertoken.kernels.ops import MAX_HEAD_DIM
from pertoken.model.blocks import Attention, Decoder, Layer
from pertoken.model.decoder import CausalLM
from pertoken.model.hooks import has_global_hook, is_exactly, loaded, users_hook
from pertoken.model.lora import LoraLinear
from pertoken.model.mlp import MLP
from pertoken.model.moe import MixtureOfExperts
from pertoken.model.norms import norm_kind
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["unsupported"]

_Part = tuple[str, nn.Module | None, type[nn.Module], tuple[int, ...]]  # its name, it, what it must be, its weight

_NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "both": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
_QKV = (".q_proj", ".k_proj", ".v_proj")


def unsupported(model: object) -> str | None:
    """Why `model` cannot run through the kernels, in words; None if it can.

    0.1 ms for eight layers, so that every forward pass asks: nothing is remembered that a user might change
    in between. Hooks of the model itself do not matter, since it is called either way. Experts are not looked into:
    they run plain.
    """
    if not isinstance(model, CausalLM):
        return "the kernels are for pertoken's own decoder"
    if not is_exactly(model, CausalLM):
        return f"the model is a {type(model).__name__}"
    config = model.config
    if config.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {config.head_dim}, and the kernels take {MAX_HEAD_DIM} at most"
    if has_global_hook():
        return "torch.nn has a hook on all modules"
    for name, module, kind, shape in _parts(model, config):
        has_bias = config.qkv_bias and name.endswith(_QKV)
        if type(module) is LoraLinear and kind is nn.Linear and name != "lm_head":
            why = _lora_difference(name, module, shape, has_bias)
            if why is not None:
                return why
            continue
        why = _difference(module, kind, shape, has_bias, config.rms_norm_eps)
        if why is not None:
            return f"{name} {why}"
    return None


def _lora_difference(name: str, layer: LoraLinear, shape: tuple[int, ...], has_bias: bool) -> str | None:
    """What of an adapted layer is not as the kernels take it to be."""
    if layer._modules.keys() != {"lora_A", "lora_B"}:
        return f"{name} has other modules than lora_A and lora_B"
    a, b = layer._modules["lora_A"], layer._modules["lora_B"]
    r = a.out_features if isinstance(a, nn.Linear) else 0
    parts = (
        (name, layer, LoraLinear, shape, has_bias),
        (f"{name}.lora_A", a, nn.Linear, (r, shape[1]), False),
        (f"{name}.lora_B", b, nn.Linear, (shape[0], r), False),
    )
    for part, module, kind, of_weight, biased in parts:
        why = _difference(module, kind, of_weight, biased, 0.0)
        if why is not None:
            return f"{part} {why}"
    return None


def _parts(model: nn.Module, config: ResolvedModelConfig) -> Iterator[_Part]:
    """Every module that is skipped, or that gets other arguments, when the kernels run."""
    norm_class = norm_kind(config)
    d, f, head_dim, vocab = config.hidden_size, config.intermediate_size, config.head_dim, config.vocab_size
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    decoder = model._modules.get("model")
    yield "model", decoder, Decoder, ()
    assert isinstance(decoder, Decoder)
    yield "model.embed_tokens", decoder._modules.get("embed_tokens"), nn.Embedding, (vocab, d)
    yield "model.norm", decoder._modules.get("norm"), norm_class, (d,)
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
        for which in _NORMS[config.norms]:
            yield f"{name}.{which}", of_layer.get(which), norm_class, (d,)
        attention = of_layer.get("self_attn")
        yield f"{name}.self_attn", attention, Attention, ()
        assert isinstance(attention, Attention)
        of_attention = attention._modules
        yield f"{name}.self_attn.q_proj", of_attention.get("q_proj"), nn.Linear, (queries, d)
        yield f"{name}.self_attn.k_proj", of_attention.get("k_proj"), nn.Linear, (keys, d)
        yield f"{name}.self_attn.v_proj", of_attention.get("v_proj"), nn.Linear, (keys, d)
        yield f"{name}.self_attn.o_proj", of_attention.get("o_proj"), nn.Linear, (d, queries)
        for which, size in zip(("q_norm", "k_norm"), config.qk_norm_sizes, strict=True):
            norm = of_attention.get(which)
            if norm is not None or config.qk_norm:  # a user may give other families one: it is not skipped
                yield f"{name}.self_attn.{which}", norm, norm_class, (size,)
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
    if not is_exactly(module, kind):
        parametrized = "parametrizations" in module._modules
        return "is parametrized" if parametrized else f"is a {type(module).__name__}"
    own = module.__dict__
    if "forward" in own:
        return "has a forward of its own"
    if module._compiled_call_impl is not None:
        return "is compiled by torch.compile"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        why = users_hook(module)
        if why is not None:
            return why
    if issubclass(kind, nn.RMSNorm) and own["eps"] != eps:
        return f"has an eps of {own['eps']}, not {eps}"
    if kind is nn.Embedding and not (
        own["padding_idx"] is None and own["max_norm"] is None and not own["scale_grad_by_freq"] and not own["sparse"]
    ):
        return "does more than look rows up"
    if not shape:
        return None
    why = _parameter_difference(own["_parameters"].get("weight"), "weight", kind, shape)
    if why is not None or not issubclass(kind, nn.Linear):
        return why
    bias = own["_parameters"].get("bias")
    if not has_bias:
        return None if bias is None else "has a bias"
    return _parameter_difference(bias, "bias", kind, shape[:1])


def _parameter_difference(weight: Any, what: str, kind: type[nn.Module], shape: tuple[int, ...]) -> str | None:
    if weight is None:
        return f"has no {what} of its own"
    if type(weight) is not nn.Parameter and type(weight) is not loaded("torch.distributed.tensor", "DTensor"):
        return f"has a {what} that is a {type(weight).__name__}"
    frozen_matrix = what == "weight" and issubclass(kind, nn.Linear) and not weight.requires_grad
    if weight.dtype != torch.float32 and not (frozen_matrix and weight.dtype == torch.bfloat16):
        return f"is in {str(weight.dtype).removeprefix('torch.')}, not in float32"
    if not weight.is_cpu:
        return f"is on {weight.device}, not on the CPU"
    if weight.shape != shape:
        return f"has a {what} of {tuple(weight.shape)}, not {shape}"
    if issubclass(kind, nn.RMSNorm) and not weight.is_contiguous():
        return "has a weight that is not contiguous"
    return None
