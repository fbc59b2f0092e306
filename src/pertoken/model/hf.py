"""Weights and configurations in and out: Hugging Face folders (Qwen3, Llama) and MiniMind's `.pth` files.

What the decoder cannot compute is refused by name, never approximated.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pertoken.config import ModelConfig, ResolvedModelConfig
from pertoken.errors import ModelError
from pertoken.model.transformer import CausalLM

__all__ = [
    "NotCovered",
    "config_from_hf",
    "config_to_hf",
    "load_folder",
    "load_minimind",
    "resize_embeddings",
    "save_folder",
    "save_minimind",
]

_FAMILIES = {"qwen3": "qwen3", "llama": "llama", "minimind": "qwen3"}
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# What an absent key means: the defaults of the class that each model type names. `head_dim` absent from a Llama
# configuration is hidden_size / num_attention_heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32768, "rope_theta": 1e4, "tie_word_embeddings": False},
    "llama": {"max_position_embeddings": 2048, "rope_theta": 1e4, "tie_word_embeddings": False},
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
# A .pth carries no configuration; MiniMind builds it with these.
_MINIMIND_ROPE_THETA, _MINIMIND_RMS_NORM_EPS = 1e6, 1e-6
# Buffers that older files saved among the weights; they follow from the configuration.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|^model\.freqs_(cos|sin)$")


class NotCovered(ModelError):
    """An architecture that the decoder lacks. Transformers may have it (`pertoken.model.folder`)."""

    def __init__(self, message: str, model_type: object) -> None:
        super().__init__(message)
        self.model_type = model_type


def config_from_hf(values: dict[str, Any]) -> ResolvedModelConfig:
    """The architecture that a Hugging Face `config.json` describes, in the fields of transformers 4 or 5.

    Dropout is ignored: it does not change what the model computes. Raises ModelError with one line (key, value, remedy)
    for anything the decoder lacks.
    """
    model_type = values.get("model_type")
    if model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise NotCovered(f"model_type={model_type!r}: pertoken has {known}; choose a model of these", model_type)
    values = _DEFAULTS[model_type] | {key: value for key, value in values.items() if value is not None}
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
        ).resolve(values["vocab_size"])
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "value_error":
            raise ModelError(f"config.json: {problem['ctx']['error']}") from None
        key = ".".join(map(str, problem["loc"]))
        raise ModelError(f"config.json: {key}={problem['input']!r}: {problem['msg']}; correct it") from None


def _refuse_what_is_missing(values: dict[str, Any]) -> None:
    def refuse(key: str, reason: str) -> None:
        raise NotCovered(f"{key}={values[key]!r}: {reason}", values["model_type"])

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
    # transformers dequantises GGUF as it reads it, but leaves the note in what it writes out.
    if values.get("quantization_config", {}).get("quant_method", "gguf") != "gguf":
        refuse("quantization_config", "pertoken reads floating-point weights; write the model out dequantised")
    # MiniMind writes num_experts into dense configurations too.
    experts = ["use_moe"] if values["model_type"] == "minimind" else ["use_moe", "num_experts", "num_local_experts"]
    for key in experts:
        if values.get(key):
            refuse(key, "pertoken has dense models only; choose one without experts")
    if "layer_types" in values:
        if any(kind != "full_attention" for kind in values["layer_types"]):
            refuse("layer_types", "pertoken has full attention only; choose a model without windows")
    elif values.get("use_sliding_window") and "sliding_window" in values:
        refuse("sliding_window", "pertoken has full attention only; set use_sliding_window to false for short texts")


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
    values = config.model_dump(exclude={"family"})
    values |= {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
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
    values |= {"use_sliding_window": False, "sliding_window": None} if config.family == "qwen3" else {"mlp_bias": False}
    return values


def load_folder(path: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a Hugging Face folder (config.json and safetensors, one file or several with an index), in `dtype`.

    Raises ModelError for a folder that is not one, an architecture that pertoken lacks, and tensors that are missing,
    unexpected or of another shape.
    """
    folder = Path(path)
    config = config_from_hf(_read_json(folder / "config.json"))
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read ({error}); copy or download it again") from None
    return _build(config, tensors, dtype, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); name a Hugging Face model folder") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); copy or download it again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object; copy or download it again")
    return values


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        return [folder / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    pickled = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise ModelError(
            f"{folder / pickled[0]}: pertoken does not unpickle model folders; convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ModelError(f"{folder}: no model.safetensors; name a folder with weights")


def _build(config: ResolvedModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype, source: Path) -> CausalLM:
    """A model around the tensors, which are not copied where they have `dtype` already."""
    model = CausalLM(config, device="meta")
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    head = tensors.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None:
        if not torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
            raise ModelError(
                f"{source}: lm_head.weight differs from the embedding; set tie_word_embeddings to false in config.json"
            )
        expected["lm_head.weight"] = head.shape
    tensors = {name: tensor for name, tensor in tensors.items() if not _DERIVED.search(name)}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ModelError(f"{source}: {_listed(missing)}: missing; the file is not of this architecture or incomplete")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise ModelError(f"{source}: {_listed(extra)}: no place in this architecture; compare it with config.json")
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape:
            raise ModelError(f"{source}: {name}: shape {[*found.shape]} is not {[*shape]}; compare it with config.json")
        if not found.is_floating_point():
            raise ModelError(f"{source}: {name}: dtype {found.dtype}; write the model out dequantised")
    wanted = model.state_dict().keys()
    model.load_state_dict({name: tensors[name].to(dtype) for name in wanted}, assign=True)
    return model


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_folder(
    model: CausalLM,
    folder: str | Path,
    *,
    eos_token_id: int | None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` opens as it is, made if need be.

    `eos_token_id` is what generation stops at: the end-of-turn token of a chat model. `tokenizer` (transformers) is
    saved beside the weights; `dtype` is the weights' own if not given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    special = {"eos_token_id": eos_token_id, "bos_token_id": getattr(tokenizer, "bos_token_id", None)}
    config = config_to_hf(model.config, dtype=dtype or model.head_weight.dtype, **special)
    _write_json(folder / "config.json", config)
    special["pad_token_id"] = getattr(tokenizer, "pad_token_id", None)
    _write_json(folder / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_minimind(path: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a MiniMind `.pth` (dense, with q/k-norm), its architecture read off the tensors' names and shapes.

    The head is tied unless `lm_head.weight` differs from the embedding. Raises ModelError for any other file.
    """
    path = Path(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); name a MiniMind .pth file") from None
    except Exception:  # foreign bytes lead the unpickler to errors of any kind
        raise ModelError(f"{path}: not a file of tensors; name a MiniMind .pth file (out/*.pth)") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelError(f"{path}: not a state dict; name the weights (out/*.pth), not a resume file")
    return _build(_minimind_config(tensors, path), tensors, dtype, path)


def _minimind_config(tensors: dict[str, Tensor], path: Path) -> ResolvedModelConfig:
    if experts := [name for name in tensors if ".mlp.experts." in name or ".mlp.gate." in name]:
        raise ModelError(f"{path}: {experts[0]}: a mixture of experts; pertoken has dense models only")
    first = "model.layers.0."
    names = [f"{first}self_attn.{x}.weight" for x in ("q_norm", "q_proj", "k_proj")]
    names += [f"{first}mlp.gate_proj.weight", "model.embed_tokens.weight"]
    if missing := [name for name in names if name not in tensors]:
        raise ModelError(
            f"{path}: {_listed(missing)}: missing; name a MiniMind file with q/k-norm (minimind-3 or later)"
        )
    q_norm, q_proj, k_proj, gate_proj, embedding = (tensors[name] for name in names)
    head_dim = q_norm.shape[0]
    head = tensors.get("lm_head.weight", embedding)
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    return ResolvedModelConfig(
        family="qwen3",
        hidden_size=embedding.shape[1],
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=q_proj.shape[0] // head_dim,
        num_key_value_heads=k_proj.shape[0] // head_dim,
        head_dim=head_dim,
        intermediate_size=gate_proj.shape[0],
        vocab_size=embedding.shape[0],
        rope_theta=_MINIMIND_ROPE_THETA,
        rms_norm_eps=_MINIMIND_RMS_NORM_EPS,
        tie_word_embeddings=torch.equal(head, embedding),
    )


def save_minimind(model: CausalLM, path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
    """A `.pth` that MiniMind loads (`strict=True` too), in float16 as MiniMind saves it unless `dtype` says otherwise.

    The file carries no configuration, so a model that MiniMind would compute differently is refused (ModelError).
    """
    config = model.config
    if config.family != "qwen3":
        raise ModelError(f"model.family={config.family!r}: MiniMind has q/k-norm; export as hf")
    if (config.rope_theta, config.rms_norm_eps) != (_MINIMIND_ROPE_THETA, _MINIMIND_RMS_NORM_EPS):
        raise ModelError(
            f"model.rope_theta={config.rope_theta}, model.rms_norm_eps={config.rms_norm_eps}: a .pth has neither and "
            f"MiniMind assumes {_MINIMIND_ROPE_THETA} and {_MINIMIND_RMS_NORM_EPS}; export as hf"
        )
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    torch.save(tensors, path)


@torch.no_grad()
def resize_embeddings(model: CausalLM, vocab_size: int) -> None:
    """Make room for new tokens, in place: each new row of the embedding (and of an untied head) is the mean of the old.

    Optimisers made before hold the old parameters. Raises ModelError where `vocab_size` is smaller than the model's.
    """
    old = model.config.vocab_size
    if vocab_size < old:
        raise ModelError(
            f"vocab_size={vocab_size}: the model has {old} tokens and none are removed; give at least {old}"
        )
    if vocab_size == old:
        return
    new_rows = vocab_size - old

    def grown(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.cat((weight, weight.mean(0, keepdim=True).expand(new_rows, -1))))

    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight, embedding.num_embeddings = grown(embedding.weight), vocab_size
    if head is not None:
        head.weight, head.out_features = grown(head.weight), vocab_size
    model.config = model.config.model_copy(update={"vocab_size": vocab_size})
