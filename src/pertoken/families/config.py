"""Hugging Face's `config.json` in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from pydantic import ValidationError

from pertoken.errors import ModelError
from pertoken.recipe.model import MOE_KEYS, ModelConfig, ResolvedModelConfig
from pertoken.text import shown

__all__ = ["NotCovered", "config_from_hf", "config_to_hf"]

_FAMILIES = {"qwen3": "qwen3", "qwen3_moe": "qwen3", "llama": "llama", "mixtral": "llama", "minimind": "qwen3"}
_MODEL_TYPES = {  # (family, use_moe) -> model_type, class
    ("qwen3", False): ("qwen3", "Qwen3ForCausalLM"),
    ("qwen3", True): ("qwen3_moe", "Qwen3MoeForCausalLM"),
    ("llama", False): ("llama", "LlamaForCausalLM"),
    ("llama", True): ("mixtral", "MixtralForCausalLM"),
}
_MOE_TYPES = ("qwen3_moe", "mixtral")
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# What an absent key means: the defaults of the class that each model type names. `head_dim` absent from any but a Qwen3
# configuration is hidden_size / num_attention_heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 1e4, "tie_word_embeddings": False},
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 1e-3,
    },
    "llama": {"max_position_embeddings": 2048, "rope_theta": 1e4, "tie_word_embeddings": False},
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 1e-3,
    },
    "minimind": {
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": None,
        "vocab_size": 6400,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
}


_KINDS: dict[str, type] = {
    "rope_parameters": dict,
    "rope_scaling": dict,
    "quantization_config": dict,
    "layer_types": list,
}


class NotCovered(ModelError):
    """An architecture that the decoder lacks. Transformers may have it (`pertoken.folders.open`)."""

    def __init__(self, message: str, model_type: object) -> None:
        super().__init__(message)
        self.model_type = model_type


def config_from_hf(values: dict[str, Any]) -> ResolvedModelConfig:
    """The architecture that a Hugging Face `config.json` describes, in the fields of transformers 4 or 5.

    Dropout and noise on the router's input are ignored: they do not change what the model computes. `aux_loss_coef` is
    the configuration's `router_aux_loss_coef`. Raises ModelError with one line (key, value, remedy) for anything the
    decoder lacks.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        known, own = ", ".join(_FAMILIES), "" if "auto_map" not in values else " (its own code, auto_map, is never run)"
        raise NotCovered(
            f"model_type={shown(model_type)}: pertoken has {known}; choose a model of these{own}", model_type
        )
    values = _DEFAULTS[model_type] | {key: value for key, value in values.items() if value is not None}
    for key, kind in _KINDS.items():
        if not isinstance(values.get(key, kind()), kind):
            raise ModelError(f"config.json: {key}={shown(values[key])}: must be a JSON {kind.__name__}; correct it")
    _refuse_what_is_missing(values)
    for key in _REQUIRED:
        if key not in values:
            raise ModelError(f"{key}: missing from config.json; add it")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    keys = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    try:
        return ModelConfig.model_validate(
            {key: values.get(key) for key in keys}
            | {
                "family": _FAMILIES[model_type],
                "rope_theta": rope.get("rope_theta", values["rope_theta"]),
                "rms_norm_eps": values.get("rms_norm_eps", 1e-6),
            }
            | _experts(values)
        ).resolve(values["vocab_size"])
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "value_error":
            raise ModelError(f"config.json: {problem['ctx']['error']}") from None
        key = ".".join(map(str, problem["loc"]))
        raise ModelError(f"config.json: {key}={shown(problem['input'])}: {problem['msg']}; correct it") from None


def _has_experts(values: dict[str, Any]) -> bool:
    return bool(values.get("use_moe")) if values["model_type"] == "minimind" else values["model_type"] in _MOE_TYPES


def _experts(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a mixture of experts, none for a dense model."""
    if not _has_experts(values):
        return {}
    return {
        "use_moe": True,
        # transformers 5 writes the first, 4 the second for Qwen3-MoE
        "num_experts": values.get("num_local_experts", values.get("num_experts")),
        "num_experts_per_tok": values.get("num_experts_per_tok"),
        "norm_topk_prob": values.get("norm_topk_prob"),
        "moe_intermediate_size": values.get("moe_intermediate_size"),
        "aux_loss_coef": values.get("router_aux_loss_coef"),
    }


def _refuse_what_is_missing(values: dict[str, Any]) -> None:
    def refuse(key: str, reason: str) -> NoReturn:
        raise NotCovered(f"{key}={shown(values[key])}: {reason}", values["model_type"])

    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key, {})
        plain = rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or rope.get("partial_rotary_factor", 1) != 1 or any(isinstance(v, dict) for v in rope.values()):
            refuse(key, "pertoken has plain rotary embeddings only; choose a model without scaling")
    if values.get("partial_rotary_factor", 1) != 1:
        refuse("partial_rotary_factor", "pertoken rotates whole heads; choose a model that does")
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            refuse(key, "pertoken's linear layers have no bias; choose a model without")
    if values.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "pertoken has silu only; choose a model with it")
    # transformers dequantizes GGUF as it reads it, but leaves the note in what it writes out.
    if values.get("quantization_config", {}).get("quant_method", "gguf") != "gguf":
        refuse("quantization_config", "pertoken reads floating-point weights; write the model out dequantized")
    _refuse_experts(values, refuse)
    if values["model_type"] == "mixtral" and "sliding_window" in values:  # no other key switches it off
        refuse("sliding_window", "pertoken has full attention only; set it to null for short texts")
    if "layer_types" in values:
        if any(kind != "full_attention" for kind in values["layer_types"]):
            refuse("layer_types", "pertoken has full attention only; choose a model without windows")
    elif values.get("use_sliding_window") and "sliding_window" in values:
        refuse("sliding_window", "pertoken has full attention only; set use_sliding_window to false for short texts")


def _refuse_experts(values: dict[str, Any], refuse: Callable[[str, str], NoReturn]) -> None:
    for key in ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"):
        if values.get(key):
            refuse(key, "pertoken has no shared experts; choose a model without")
    if _has_experts(values):
        for key, usual in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
            if values.get(key, usual) != usual:
                refuse(key, "pertoken has experts in every layer or in none; choose such a model")
    elif values["model_type"] != "minimind":  # which writes num_experts into dense configurations too
        for key in ("use_moe", "num_experts", "num_local_experts"):
            if values.get(key):
                refuse(
                    key, f"a {values['model_type']} model is dense; correct model_type, or choose one without experts"
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
    model_type, architecture = _MODEL_TYPES[config.family, config.use_moe]
    values = config.model_dump(exclude={"family", "use_moe", *MOE_KEYS})
    values |= {
        "architectures": [architecture],
        "model_type": model_type,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    if config.family == "qwen3":
        values |= {"use_sliding_window": False, "sliding_window": None}
    elif config.use_moe:
        values |= {"sliding_window": None}
    else:
        values |= {"mlp_bias": False}
    if config.use_moe:
        values |= {
            "num_experts_per_tok": config.num_experts_per_tok,
            "router_aux_loss_coef": config.aux_loss_coef,
            "output_router_logits": False,
        }
    if config.use_moe and config.family == "qwen3":
        values |= {
            "num_experts": config.num_experts,
            "norm_topk_prob": config.norm_topk_prob,
            "moe_intermediate_size": config.moe_intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    elif config.use_moe:
        values |= {"num_local_experts": config.num_experts, "router_jitter_noise": 0.0}
    return values
