"""Hugging Face's `config.json` in and out, as the records of `families` say."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from pertoken.errors import ModelError
from pertoken.families import FAMILIES, Family, saved_as
from pertoken.folders.refusals import NotCovered, refuse
from pertoken.folders.rope import (
    FULL,
    SLIDING,
    local_base_from_hf,
    partial_from_hf,
    refuse_rope,
    rope_from_hf,
    rope_to_hf,
)
from pertoken.recipe.model import ModelConfig, ResolvedModelConfig
from pertoken.text import shown

__all__ = ["config_from_hf", "config_to_hf", "family_of"]

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
_KINDS: dict[str, type] = {
    "rope_parameters": dict,
    "rope_scaling": dict,
    "quantization_config": dict,
    "layer_types": list,
}
# Keys whose null is not their absence: as many key-value heads as query heads, no window, and no cap.
_NULL_SAYS_SOMETHING = (
    *("num_key_value_heads", "sliding_window"),
    *("final_logit_softcapping", "attn_logit_softcapping"),
)
_SHARED = "shared_expert_intermediate_size"


def family_of(config: ResolvedModelConfig) -> Family:
    """The record in whose names a model of this configuration is saved."""
    family = saved_as(config.family, use_moe=config.use_moe)
    assert family is not None, "ModelConfig is validated against the same records"
    return family


def config_from_hf(values: dict[str, Any]) -> ResolvedModelConfig:
    """The architecture that a Hugging Face `config.json` describes, in the fields of transformers 4 or 5.

    Dropout and noise on the router's input are ignored: they do not change what the model computes. `aux_loss_coef` is
    the configuration's `router_aux_loss_coef`. Raises ModelError with one line (key, value, remedy) for anything the
    decoder lacks.
    """
    family = _known_family(values)
    defaults = {k: v for k, v in family.defaults.items() if k not in _NULL_SAYS_SOMETHING or k not in values}
    values = defaults | {key: value for key, value in values.items() if value is not None}
    for key, kind in _KINDS.items():
        if not isinstance(values.get(key, kind()), kind):
            raise ModelError(f"config.json: {key}={shown(values[key])}: must be a JSON {kind.__name__}; correct it")
    _refuse_what_is_missing(values, family)
    for key in _REQUIRED:
        if key not in values:
            raise ModelError(f"{key}: missing from config.json; add it")
    rope_theta, scaling = rope_from_hf(values, family)
    try:
        return ModelConfig.model_validate(
            {key: values.get(key) for key in _SIZES}
            | {
                "family": family.recipe_name,
                "rope_theta": rope_theta,
                "rope_scaling": scaling,
                "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
            }
            | {key: values.get(key) for key in family.numbers}
            | _layers(values, family)
            | _experts(values, family)
        ).resolve(values["vocab_size"])
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "value_error":
            raise ModelError(f"config.json: {problem['ctx']['error']}") from None
        key = ".".join(map(str, problem["loc"]))
        raise ModelError(f"config.json: {key}={shown(problem['input'])}: {problem['msg']}; correct it") from None


def _known_family(values: dict[str, Any]) -> Family:
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    known, own = ", ".join(FAMILIES), "" if "auto_map" not in values else " (its own code, auto_map, is never run)"
    raise NotCovered(f"model_type={shown(model_type)}: pertoken has {known}; choose a model of these{own}", model_type)


def _has_experts(values: dict[str, Any], family: Family) -> bool:
    if family.experts is None:
        return False
    return family.experts.switch is None or bool(values.get(family.experts.switch))


def _layers(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """The keys on what differs from layer to layer."""
    found: dict[str, Any] = {}
    if family.no_rope:
        interval = values.get("no_rope_layer_interval", 4)
        count = values["num_hidden_layers"]
        found["no_rope_layers"] = values.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    types = _layer_types(values, family)
    if types is not None and SLIDING in types:
        found |= {"sliding_window": values.get("sliding_window"), "layer_types": types}
    if family.partial_rotary:
        found["partial_rotary_factor"] = partial_from_hf(values, family)
    if family.by_layer_type:
        found["rope_local_base_freq"] = local_base_from_hf(values, family)
    return found


def _layer_types(values: dict[str, Any], family: Family) -> list[str] | None:
    """Of each layer, as the type's own class works them out; None: no layer has a window."""
    if family.windows is None or "sliding_window" not in values:
        return None
    if family.window_switch is not None and not values.get(family.window_switch):
        return None
    count = int(values["num_hidden_layers"])
    if family.windows == "all":
        return [SLIDING] * count
    if "layer_types" in values:
        return list(values["layer_types"])
    if family.no_rope:
        reason = "which layers have the window is not said; add them"
        raise NotCovered(f"layer_types: missing from config.json; {reason}", family.model_type)
    if family.window_switch is None:
        every = values.get("sliding_window_pattern", family.full_attention_every)
        return [FULL if every and (i + 1) % int(every) == 0 else SLIDING for i in range(count)]
    return [SLIDING if i >= values.get("max_window_layers", 28) else FULL for i in range(count)]


def _experts(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """The keys of a mixture of experts, none for a dense model."""
    if not _has_experts(values, family):
        return {}
    return {
        "use_moe": True,
        # transformers 5 writes the first, 4 the second for Qwen3-MoE
        "num_experts": values.get("num_local_experts", values.get("num_experts")),
        "num_experts_per_tok": values.get("num_experts_per_tok"),
        "norm_topk_prob": values.get("norm_topk_prob"),
        "moe_intermediate_size": values.get("moe_intermediate_size"),
        _SHARED: values.get(_SHARED) if family.experts is not None and family.experts.shared else None,
        "aux_loss_coef": values.get("router_aux_loss_coef"),
    }


def _refuse_what_is_missing(values: dict[str, Any], family: Family) -> None:
    refuse_rope(values, family)
    if not values.get("qkv_bias", True) and family.qkv_bias and "qkv_bias" in family.constants:
        refuse(values, "qkv_bias", "pertoken has these biases in every such model; choose one with them")
    # A family whose queries, keys and values have a bias has it in every model, and its class reads no such key.
    for key in ("mlp_bias",) if family.qkv_bias else ("attention_bias", "mlp_bias"):
        if values.get(key):
            refuse(values, key, "pertoken has no such bias; choose a model without")
    if values.get(family.activation_key, family.activation) not in (family.activation, *family.activation_aliases):
        reason = f"pertoken has {family.activation} only for model_type {family.model_type}; choose a model with it"
        refuse(values, family.activation_key, reason)
    for key in ("attn_logit_softcapping", "use_bidirectional_attention", "clip_qkv"):
        if values.get(key) and key not in family.numbers:
            refuse(values, key, "pertoken has plain causal attention; choose a model with it")
    # transformers dequantizes GGUF as it reads it, but leaves the note in what it writes out.
    if values.get("quantization_config", {}).get("quant_method", "gguf") != "gguf":
        refuse(values, "quantization_config", "pertoken reads floating-point weights; write the model out dequantized")
    _refuse_experts(values, family)
    _refuse_windows(values, family)


def _takes_no_null(family: Family) -> bool:
    """Whether the class wants a size of windows even where no layer has one."""
    return family.windows == "layer_types" and family.window_switch is None


def _refuse_windows(values: dict[str, Any], family: Family) -> None:
    if family.windows is not None:
        if any(kind not in (FULL, SLIDING) for kind in values.get("layer_types", ())):
            refuse(values, "layer_types", f"pertoken has {FULL} and {SLIDING}; choose a model with these")
        if len(values.get("layer_types", ())) not in (0, values.get("num_hidden_layers")):
            refuse(values, "layer_types", "one entry for each of num_hidden_layers is needed; correct it")
        if "layer_types" in values:
            types = _layer_types(values, family) or [FULL] * len(values["layer_types"])
            if list(values["layer_types"]) != types:
                switch = f" and {family.window_switch}" if family.window_switch else ""
                refuse(values, "layer_types", f"does not go with sliding_window{switch}; correct one of them")
        elif _takes_no_null(family) and "sliding_window" not in values:
            values["sliding_window"] = None
            refuse(values, "sliding_window", f"of layers that are {SLIDING} by default; add layer_types")
        return
    if family.window_switch is None and "sliding_window" in values:
        refuse(values, "sliding_window", "pertoken has full attention only; set it to null for short texts")
    if "layer_types" in values:
        if any(kind != FULL for kind in values["layer_types"]):
            refuse(values, "layer_types", "pertoken has full attention only; choose a model without windows")
    elif family.window_switch and values.get(family.window_switch) and "sliding_window" in values:
        reason = f"pertoken has full attention only; set {family.window_switch} to false for short texts"
        refuse(values, "sliding_window", reason)


def _refuse_experts(values: dict[str, Any], family: Family) -> None:
    has_shared = family.experts is not None and family.experts.shared
    for key in ("n_shared_experts", "num_shared_experts", *(() if has_shared else (_SHARED,))):
        if values.get(key):
            refuse(values, key, "pertoken has no shared experts; choose a model without")
    if _has_experts(values, family):
        for key, usual in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
            if values.get(key, usual) != usual:
                refuse(values, key, "pertoken has experts in every layer or in none; choose such a model")
    elif family.experts is None:  # a type with a switch may name its experts in dense configurations too
        for key in ("use_moe", "num_experts", "num_local_experts"):
            if values.get(key):
                refuse(
                    values,
                    key,
                    f"a {family.model_type} model is dense; correct model_type, or choose one without experts",
                )


def config_to_hf(
    config: ResolvedModelConfig,
    *,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """A `config.json` for `AutoModelForCausalLM.from_pretrained`, readable by transformers 5 and 4.

    It names no padding token: transformers would freeze that token's embedding, which may well be in use.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    family = family_of(config)
    values = {key: getattr(config, key) for key in (*_SIZES, "rope_theta", "rms_norm_eps")}
    values |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **rope_to_hf(config, family),
        family.activation_key: family.activation,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        **{key: getattr(config, key) for key in family.numbers},
        **family.constants,
    }
    values |= _layers_to_hf(config, family)
    if family.experts is not None:
        values |= {
            family.experts.num_key: config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "router_aux_loss_coef": config.aux_loss_coef,
            "output_router_logits": False,
        }
        if family.experts.may_not_normalize:
            values["norm_topk_prob"] = config.norm_topk_prob
        if family.experts.own_width:
            values["moe_intermediate_size"] = config.moe_intermediate_size
        if family.experts.shared:
            values[_SHARED] = config.shared_expert_intermediate_size
    return values


def _layers_to_hf(config: ResolvedModelConfig, family: Family) -> dict[str, Any]:
    """What differs from layer to layer, in the fields of transformers 4 and 5."""
    found: dict[str, Any] = {}
    if family.windows is not None:
        types = list(config.layer_types or [FULL] * config.num_hidden_layers)
        if config.sliding_window is not None or not _takes_no_null(family):
            found["sliding_window"] = config.sliding_window
        if family.windows == "layer_types":
            full = next((i for i, kind in enumerate(types) if kind == SLIDING), len(types))
            found |= {"layer_types": types, "max_window_layers": full}
    if family.window_switch is not None:
        found[family.window_switch] = config.sliding_window is not None
    if family.rope_local_base_freq is not None:
        found["rope_local_base_freq"] = config.rope_local_base_freq
    if family.no_rope:
        found["no_rope_layers"] = list(config.no_rope_layers or ())
    return found
