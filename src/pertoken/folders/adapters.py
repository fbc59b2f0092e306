"""Adapters in and out, in peft's format: adapter_config.json, which names the base, and adapter_model.safetensors.

The base's weights are not copied. Their checksums are kept in a file of our own beside these two, so that an adapter is
never put onto weights that it was not trained on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pertoken.data.files.hashes import recall, remember, see
from pertoken.errors import ModelError, RecipeError
from pertoken.files import cache_folder, plain_file, sha256
from pertoken.folders.files import read_json, save_tokenizer, weight_files, write_json
from pertoken.folders.weights import name_on_disk
from pertoken.hf_fallback.adapter import adapt_fallback, adapted_layers, fan_in_fan_out, merge_fallback
from pertoken.hf_fallback.model import FallbackLM
from pertoken.hub.fetch import on_disk
from pertoken.model.aligned import aligned
from pertoken.model.decoder import CausalLM
from pertoken.model.lora import Adapter, Base, LoraLinear, add_lora, is_of_adapter, lora_layers, merge_lora
from pertoken.model.moe import MixtureOfExperts
from pertoken.model.protocol import LanguageModel
from pertoken.recipe.adapter import ALL_LINEAR, AdapterConfig
from pertoken.text import listed, reason, shown

__all__ = [
    "adapt",
    "adapted_modules",
    "base_folder",
    "check_base",
    "checksums",
    "is_adapter",
    "merge",
    "put_on",
    "read_adapter",
    "save_adapter",
    "saved_state",
    "targeted_modules",
]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE, _BASE_VERSION = "pertoken_base.json", 1
_TENSOR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_[AB]\.weight")
# Keys of adapter_config.json that are read here, or change nothing of what a saved adapter computes. Which layers are
# adapted is read off the weights. All others must be null, false or empty.
_KNOWN = {
    *("base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights"),
    *("peft_type", "task_type", "bias", "inference_mode", "auto_mapping", "peft_version", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base's weights too


def is_adapter(folder: Path) -> bool:
    """Whether there is an adapter, and no model's own weights."""
    own = ("model.safetensors", "model.safetensors.index.json")
    return (folder / _CONFIG).is_file() and not any((folder / name).exists() for name in own)


def read_adapter(folder: Path) -> Adapter:
    """What the folder's adapter is. Raises ModelError for kinds of adapters that pertoken lacks."""
    path = folder / _CONFIG
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{path}: peft_type={shown(values.get('peft_type'))}: pertoken has LORA; {_MERGE}")
    for key, value in values.items():
        if (key not in _KNOWN and value) or (key == "bias" and value != "none"):
            raise ModelError(f"{path}: {key}={shown(value)}: pertoken has no such adapters; {_MERGE}")
    if values.get("init_lora_weights", True) not in _INITIAL:
        what = shown(values["init_lora_weights"])
        raise ModelError(f"{path}: init_lora_weights={what}: changes the base's weights as well; {_MERGE}")
    r, alpha, name = values.get("r", 8), values.get("lora_alpha", 8), values.get("base_model_name_or_path")
    for key, value, fits in (
        ("r", r, _is_number(r) and isinstance(r, int)),
        ("lora_alpha", alpha, _is_number(alpha)),
        ("base_model_name_or_path", name, isinstance(name, str) and bool(name)),
    ):
        if not fits:
            raise ModelError(f"{path}: {key}={shown(value)}: cannot be; copy or download the adapter again")
    revision = values.get("revision")
    dropout = values.get("lora_dropout", 0.0)
    return Adapter(
        r=r,
        alpha=float(alpha),
        rslora=values.get("use_rslora") is True,
        base=Base(str(name), revision if isinstance(revision, str) else None, _base_files(folder)),
        dropout=dropout if isinstance(dropout, float) else 0.0,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


_MERGE = "merge it into its model (peft's merge_and_unload) and name that one's folder"


def _base_files(folder: Path) -> dict[str, str]:
    """The checksums of the base's files, where pertoken has written the adapter."""
    path = folder / _BASE
    if not path.exists():
        return {}
    values = read_json(path)
    if values.get("format_version") != _BASE_VERSION:
        version = shown(values.get("format_version"))
        raise ModelError(f"{path}: format_version={version}: this version of pertoken reads {_BASE_VERSION}; update it")
    files = values.get("files")
    if not isinstance(files, dict):
        raise ModelError(f"{path}: files={shown(files)}: not an object of checksums; copy the adapter again")
    return {str(name): str(digest) for name, digest in files.items()}


def base_folder(folder: Path, base: Base) -> Path:
    """Where the base of the adapter in `folder` is; one of the hub is downloaded. Raises ModelError."""
    what = f"{folder / _CONFIG}: base_model_name_or_path"
    here = Path(base.name).expanduser()
    path = here
    if not here.exists():
        path = Path(on_disk(f"{base.name}@{base.revision}" if base.revision else base.name, "model", label=what))
    if not (path / "config.json").is_file():
        raise ModelError(f"{what}={base.name}: the base model is not there; put it back, or a link to it")
    if is_adapter(path):
        raise ModelError(f"{what}={base.name}: an adapter itself; {_MERGE}")
    return path


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that says what the model of a folder computes. Unchanged files are not read again."""
    files = [folder / "config.json", *weight_files(folder)]
    try:
        found = recall(cache_folder(), files)
        if found is None:
            seen = see(files)
            found = [sha256(file) for file in files]
            remember(cache_folder(), files, seen, found)
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read ({error.strerror})") from None
    return {file.name: digest for file, digest in zip(files, found, strict=True)}


def check_base(folder: Path, adapter: Adapter, where: Path) -> None:
    """Raises ModelError where the base at `where` is not the one that the adapter in `folder` was trained on."""
    known = adapter.base.files
    now = checksums(where) if known else {}
    if changed := sorted(name for name in known.keys() | now if known.get(name) != now.get(name)):
        raise ModelError(
            f"{folder}: its base model {where} is not the one that it was trained on ({listed(changed)} changed); "
            "restore it"
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    """By module and matrix, "model.layers.0.self_attn.q_proj.lora_A.weight"."""
    path = folder / _WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise ModelError(
            f"{folder / 'adapter_model.bin'}: pertoken does not unpickle adapters; open it with peft and save it again"
        )
    try:
        tensors = load_file(plain_file(path))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({reason(error)}); copy or download it again") from None
    other = sorted(name for name in tensors if not _TENSOR.fullmatch(name))
    if other or not tensors:
        what = listed(other) if other else "no tensor"
        raise ModelError(f"{path}: {what}: not the matrices of an adapter's linear layers; {_MERGE}")
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def put_on(model: LanguageModel, adapter: Adapter, folder: Path) -> None:
    """Adapt the layers that the weights in `folder` are for, and give them these, in place. Raises ModelError."""
    tensors, path = _tensors(folder), folder / _WEIGHTS
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    known = _adaptable(model)
    if other := sorted(modules - known.keys()):
        raise ModelError(f"{path}: {listed(other)}: no linear layer of the base model; name the adapter's own base")
    for name, expected in _shapes(model, adapter, {name: known[name] for name in modules}).items():
        found = tensors.get(name)
        if found is None:
            raise ModelError(f"{path}: {name}: missing; copy or download it again")
        if found.shape != expected:
            raise ModelError(
                f"{path}: {name}: shape {[*found.shape]} is not {[*expected]}; name the adapter's own base"
            )
    _adapt(model, adapter, [name for name in known if name in modules], seed=0)
    state = {}
    for ours, like in _adapter_state(model).items():
        state[ours] = aligned(tensors[_on_disk(model, ours).removeprefix(_PREFIX)].to(like.dtype))
    model.load_state_dict(state, strict=False, assign=True)


def _shapes(model: LanguageModel, adapter: Adapter, layers: dict[str, str]) -> dict[str, tuple[int, int]]:
    """What A and B must be of these layers, before there is memory for them; `layers`: name on disk -> in the model."""
    shapes = {}
    for name, ours in layers.items():
        layer = model.get_submodule(ours)
        out_features, in_features = layer.get_parameter("weight").shape
        if type(layer).__name__ == "Conv1D":
            out_features, in_features = in_features, out_features
        shapes[f"{name}.lora_A.weight"] = (adapter.r, in_features)
        shapes[f"{name}.lora_B.weight"] = (out_features, adapter.r)
    return shapes


def adapt(model: LanguageModel, config: AdapterConfig, base: Base, *, seed: int) -> None:
    """Put a new adapter on `model`, in place, as the recipe says. Raises RecipeError for targets that it lacks."""
    modules = targeted_modules(model, config)
    adapter = Adapter(r=config.r, alpha=config.alpha, rslora=config.rslora, base=base)
    _adapt(model, adapter, modules, seed=seed)


def targeted_modules(model: LanguageModel, config: AdapterConfig) -> list[str]:
    """The names on disk of the layers that the recipe's adapter is for. Raises RecipeError for targets that match
    nothing."""
    known = _adaptable(model)
    if config.targets == (ALL_LINEAR,):
        return list(known)
    for target in config.targets:
        if not any(_ends(name, target) for name in known):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in known}))
            raise RecipeError(f"adapter.targets={target}: the model has no such layer to adapt; there are {there}")
    return [name for name in known if any(_ends(name, target) for target in config.targets)]


def adapted_modules(model: LanguageModel) -> list[str]:
    """The names on disk of the layers that are adapted."""
    if isinstance(model, FallbackLM):
        return [name for name, _ in adapted_layers(model)]
    assert isinstance(model, CausalLM), type(model)
    return [_on_disk(model, f"{name}.weight")[len(_PREFIX) : -len(".weight")] for name, _ in lora_layers(model)]


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _adaptable(model: LanguageModel) -> dict[str, str]:
    """The layers that may be adapted: name on disk -> name in the model. Experts are not among them: transformers holds
    those of a layer in one tensor, which an adapter on disk has no matrices for."""
    if isinstance(model, FallbackLM):
        head, adapted = model.hf.get_output_embeddings(), {name for name, _ in adapted_layers(model)}
        linear = [name for name, m in model.hf.named_modules() if name in adapted or (_is_linear(m) and m is not head)]
        return {name: f"hf.{name}" for name in linear if not any(name.startswith(f"{other}.") for other in adapted)}
    assert isinstance(model, CausalLM), type(model)
    experts = {id(part) for m in model.modules() if isinstance(m, MixtureOfExperts) for part in m.modules()}
    names = [
        f"model.layers.{i}.{name}"
        for i, layer in enumerate(model.layers)
        for name, module in layer.named_modules()
        if type(module) in (nn.Linear, LoraLinear) and not is_of_adapter(f"{name}.") and id(module) not in experts
    ]
    return {_on_disk(model, f"{name}.weight")[len(_PREFIX) : -len(".weight")]: name for name in names}


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"  # GPT-2's, a linear layer transposed


def _adapt(model: LanguageModel, adapter: Adapter, modules: Sequence[str], seed: int) -> None:
    if isinstance(model, FallbackLM):
        adapt_fallback(model, adapter, modules, seed)
    else:
        assert isinstance(model, CausalLM), type(model)
        known = _adaptable(model)
        add_lora(model, [known[name] for name in modules], adapter, seed, model.head_weight.dtype)
    model.adapter = adapter


def merge(model: LanguageModel) -> None:
    """Make of an adapted model a plain one with the same logits, all of it trainable, in place."""
    if isinstance(model, FallbackLM):
        merge_fallback(model)
    else:
        assert isinstance(model, CausalLM), type(model)
        merge_lora(model)
    model.adapter = None


def saved_state(model: LanguageModel) -> dict[str, Tensor]:
    """What of the state dict a checkpoint holds: all of it, or the adapter's part."""
    return model.state_dict() if model.adapter is None else _adapter_state(model)


def _adapter_state(model: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if is_of_adapter(name)}


def _on_disk(model: LanguageModel, name: str) -> str:
    if isinstance(model, FallbackLM):
        return _PREFIX + name.removeprefix("hf.").replace(".default.weight", ".weight")
    assert isinstance(model, CausalLM), type(model)
    return _PREFIX + name_on_disk(name, model.config)


def save_adapter(
    model: LanguageModel,
    folder: Path,
    *,
    eos_token_id: int | None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """A folder that `PeftModel.from_pretrained` opens as it is, made if need be; arguments as of `save_folder`."""
    adapter = model.adapter
    assert adapter is not None
    folder.mkdir(parents=True, exist_ok=True)
    modules = adapted_modules(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base.name,
        "revision": adapter.base.revision,
        "r": adapter.r,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": 0.0,
        "use_rslora": adapter.rslora,
        "target_modules": _targets(modules, [name for name, _ in model.named_modules()]),
        "bias": "none",
        "fan_in_fan_out": isinstance(model, FallbackLM) and fan_in_fan_out(model),
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_json(folder / _CONFIG, config)
    special = {"eos_token_id": eos_token_id}
    special |= {key: getattr(tokenizer, key, None) for key in ("bos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    state = _adapter_state(model) if weights is None else weights
    tensors = {_on_disk(model, name): tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    if adapter.base.files:
        write_json(folder / _BASE, {"format_version": _BASE_VERSION, "files": adapter.base.files})
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _targets(adapted: Sequence[str], modules: Collection[str]) -> list[str]:
    """`target_modules` for peft: the last parts of the names if these mean no other layers, else the names."""
    last = sorted({name.rpartition(".")[2] for name in adapted})
    meant = sum(name.rpartition(".")[2] in last for name in modules)
    return last if meant == len(adapted) else sorted(adapted)
