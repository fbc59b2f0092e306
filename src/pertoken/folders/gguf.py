"""Models in GGUF, llama.cpp's format: their metadata as a `config.json` would say it, their weights dequantized.

Nothing is guessed: a key of the architecture, a tensor or a quantization that has no place here is refused by name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken.errors import ModelError
from pertoken.families import FAMILIES, Family
from pertoken.folders.config import config_from_hf, family_of
from pertoken.folders.weights import name_on_disk, skeleton
from pertoken.gguf_file import GgufFile, GgufTensor, read_gguf
from pertoken.model.aligned import aligned
from pertoken.model.decoder import CausalLM
from pertoken.model.rope import frequencies
from pertoken.recipe.model import ResolvedModelConfig
from pertoken.text import listed, one_line, reason, shown

__all__ = ["config_of_gguf", "count_gguf", "load_gguf"]

# How keys go on after the architecture: what every model says -> as config.json calls it, and its type.
_KEYS: dict[str, tuple[str, type]] = {
    "embedding_length": ("hidden_size", int),
    "block_count": ("num_hidden_layers", int),
    "feed_forward_length": ("intermediate_size", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "context_length": ("max_position_embeddings", int),
    "rope.freq_base": ("rope_theta", float),
}
_REQUIRED = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "context_length")
# Those that must say what the tensors, or other keys, say too.
_CHECKED = ("vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type", "expert_count")
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
# `rope_freqs.weight` has what comes of these and of one more number, the factor, which is its largest.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROWS = 1024  # of a matrix, dequantized at once
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a GGUF file, with parameters in `dtype`. One tensor at a time is dequantized, in float32.

    Raises ModelError for a file that is damaged or no GGUF file, and for what pertoken lacks.
    """
    file = read_gguf(path)
    config = _config(file)
    num_parts = sum(tensor.shape[0] if len(tensor.shape) > 2 else 1 for tensor in file.tensors.values())
    model = skeleton(config, num_parts, file.path, described_by="its metadata")
    places = _places(file, config, [name_on_disk(name, config) for name in model.state_dict()])
    placed = {}
    for name, like in model.state_dict().items():
        there, expert = places[name_on_disk(name, config)]
        tensor = file.tensors[there]
        if (shape := tensor.shape if expert is None else tensor.shape[1:]) != like.shape:
            raise ModelError(
                f"{file.path}: {there}: shape {[*tensor.shape]} does not fit {[*like.shape]} of the metadata; "
                "convert the model again"
            )
        placed[name] = aligned(_weight(file, tensor, expert, name, config, dtype).view(shape))
    model.load_state_dict(placed, assign=True)
    return model


def config_of_gguf(path: str | Path) -> ResolvedModelConfig:
    """The architecture that a file's metadata describe. Raises ModelError."""
    return _config(read_gguf(path))


def count_gguf(path: str | Path) -> int:
    """How many numbers the weights of a file have. Raises ModelError."""
    return sum(math.prod(tensor.shape) for tensor in read_gguf(path).tensors.values())


def _config(file: GgufFile) -> ResolvedModelConfig:
    if file.get("split.count", int, 1) > 1:
        raise ModelError(f"{file.path}: one of several files; join them with llama-gguf-split")
    family, arch = _family(file), file.architecture
    values = _values(file, family)
    scaled = _ROPE_FACTORS in file.tensors
    if scaled:
        factors = _dequantized(file, file.tensors[_ROPE_FACTORS]).flatten()
        values["rope_scaling"] = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
    try:
        config = config_from_hf(values)
    except ModelError as error:
        said = one_line(str(error)).removeprefix("config.json: ")
        raise ModelError(
            f"{file.path}: general.architecture={arch!r}: as a config.json would have it, {said}"
        ) from None
    if scaled:
        _check_rope_factors(file, config, factors)
    return config


def _family(file: GgufFile) -> Family:
    known = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}
    if file.architecture not in known:
        raise ModelError(
            f"{file.path}: general.architecture={shown(file.architecture)}: pertoken reads {', '.join(known)} from "
            "GGUF; choose a model of these, or its Hugging Face folder"
        )
    return known[file.architecture]


def _values(file: GgufFile, family: Family) -> dict[str, Any]:
    """What a config.json would say."""
    assert family.gguf is not None
    arch = file.architecture
    here = {key.removeprefix(f"{arch}."): key for key in file.metadata if key.startswith(f"{arch}.")}
    unknown = here.keys() - _KEYS.keys() - family.gguf.keys.keys() - set(_CHECKED)
    if unknown:
        first = here[min(unknown)]
        raise ModelError(
            f"{file.path}: {listed([first])}={shown(file.metadata[first])}: pertoken has no such feature; choose "
            "another model, or its Hugging Face folder"
        )
    for key in _REQUIRED:
        file.require(f"{arch}.{key}", int)
    found = {"model_type": family.model_type, **family.gguf.constants}
    for key, (name, kind) in _KEYS.items():
        if key in here:
            found[name] = file.get(here[key], kind)
    for key, name in family.gguf.keys.items():
        if key in here:
            found[name] = file.metadata[here[key]]
    if _EMBEDDING not in file.tensors:
        raise ModelError(f"{file.path}: {_EMBEDDING}: missing; name a file with a whole model")
    found["vocab_size"] = file.tensors[_EMBEDDING].shape[0]
    found["tie_word_embeddings"] = _HEAD not in file.tensors
    heads = found["num_attention_heads"]
    dims = file.get(f"{arch}.rope.dimension_count", int)
    found.setdefault("head_dim", dims or found["hidden_size"] // max(1, heads))
    if "query_pre_attn_scalar" in family.numbers:
        layers = found["num_hidden_layers"]
        found["query_pre_attn_scalar"] = family.gguf.query_scalars.get(layers, found["head_dim"])
    _check_others(file, family, found)
    return found


def _check_others(file: GgufFile, family: Family, found: dict[str, Any]) -> None:
    """Raises ModelError where a key says something else than what the model has."""
    experts = found.get("num_experts", 0)
    for key, only, what in (
        ("vocab_size", found["vocab_size"], f"{_EMBEDDING} has {found['vocab_size']} rows"),
        ("attention.value_length", found["head_dim"], "keys and values have one size here"),
        ("rope.dimension_count", found["head_dim"], "rotary embeddings turn whole heads here"),
        ("rope.scaling.type", "none", "read from GGUF are plain rotary embeddings and those of Llama 3.1"),
        ("expert_count", experts, f"{family.model_type} models read from GGUF have no experts"),
    ):
        name = f"{file.architecture}.{key}"
        if (value := file.metadata.get(name, only)) != only:
            raise ModelError(f"{file.path}: {name}={shown(value)}: {what}; choose another model")


def _check_rope_factors(file: GgufFile, config: ResolvedModelConfig, factors: Tensor) -> None:
    """Raises ModelError where what frequencies are divided by is not what Llama 3.1's scaling makes of them."""
    plain = frequencies(config.model_copy(update={"rope_scaling": None}), torch.float64)
    ours = plain / frequencies(config, torch.float64)
    if factors.shape != ours.shape or not torch.allclose(factors.double(), ours, rtol=1e-4):
        raise ModelError(
            f"{file.path}: {_ROPE_FACTORS}: not the scaling of Llama 3.1 to 3.3 (low_freq_factor 1, high_freq_factor "
            "4, 8192 tokens at first); choose the model's Hugging Face folder"
        )


def _places(file: GgufFile, config: ResolvedModelConfig, names: list[str]) -> dict[str, tuple[str, int | None]]:
    """Where each tensor of a Hugging Face folder is: the name in the file, and which expert of those in one tensor.

    Raises ModelError for tensors that are missing, and those that have no place in the architecture.
    """
    gguf = _package()
    arch = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture), None)
    if arch is None:
        raise ModelError(f"{file.path}: the installed package gguf has no {file.architecture}; install a newer one")
    name_map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    places: dict[str, tuple[str, int | None]] = {}
    for name in names:
        stem, _, last = name.rpartition(".")
        expert = _EXPERT.search(stem)
        theirs = name_map.get_name(_EXPERT.sub(".experts.", stem))
        if theirs is None:
            raise ModelError(f"{file.path}: {name}: no such tensor in {file.architecture}; choose another model")
        places[name] = f"{theirs}.{last}", None if expert is None else int(expert[1])
    expected = {there for there, _ in places.values()}
    if missing := sorted(expected - file.tensors.keys()):
        raise ModelError(f"{file.path}: {listed(missing)}: missing; the file is incomplete, convert the model again")
    if extra := sorted(file.tensors.keys() - expected - {_ROPE_FACTORS}):
        raise ModelError(
            f"{file.path}: {listed(extra)}: no place in {family_of(config).model_type}; choose another model, or its "
            "Hugging Face folder"
        )
    return places


def _weight(
    file: GgufFile, tensor: GgufTensor, part: int | None, name: str, config: ResolvedModelConfig, dtype: torch.dtype
) -> Tensor:
    """A tensor of the file as the parameter `name`, with what llama.cpp's converter changed in it undone."""
    gguf = family_of(config).gguf
    assert gguf is not None
    if config.offset_norms and name.endswith("norm.weight"):
        return (_dequantized(file, tensor, part) - 1).to(dtype)  # it stores what the norm multiplies by
    weight = _dequantized(file, tensor, part, dtype)
    if gguf.neighbours_turn and name.endswith((".q_proj.weight", ".k_proj.weight")):
        heads = weight.view(-1, config.head_dim // 2, 2, weight.shape[-1])
        return heads.transpose(1, 2).reshape(weight.shape)
    return weight


def _dequantized(
    file: GgufFile, tensor: GgufTensor, part: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[rows, width], a tensor of the file or the given one of those along its first dimension. Raises ModelError."""
    import numpy as np

    gguf = _package()
    kind, (rows, row_bytes) = _packed_as(file, tensor)
    start = tensor.offset
    if part is not None:
        rows //= tensor.shape[0]
        start += part * rows * row_bytes
    try:
        packed = np.memmap(file.path, np.uint8, "r", start, (rows, row_bytes))
        weight = torch.empty(rows, tensor.shape[-1], dtype=dtype)
        for i in range(0, rows, _ROWS):  # the package needs twice the memory of what it dequantizes at once
            numbers = gguf.dequantize(packed[i : i + _ROWS], kind)
            weight[i : i + _ROWS] = torch.from_numpy(np.array(numbers))
    except OSError as error:
        raise ModelError(f"{file.path}: cannot be read ({reason(error)}); copy or download it again") from None
    except NotImplementedError:
        raise ModelError(
            f"{file.path}: {tensor.name}: the package gguf cannot dequantize {kind.name}; choose a file with another "
            "quantization, Q8_0 for one"
        ) from None
    return weight


def _packed_as(file: GgufFile, tensor: GgufTensor) -> tuple[Any, tuple[int, int]]:
    """The quantization of a tensor, and its (rows, bytes of a row), which the file does have. Raises ModelError."""
    gguf, where = _package(), f"{file.path}: {tensor.name}"
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
    except ValueError:
        raise ModelError(f"{where}: quantization {tensor.kind} is unknown to the package gguf; update it") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    *rows, width = tensor.shape or (0,)
    if math.prod((*rows, width)) == 0 or width % block:
        raise ModelError(f"{where}: shape {[*tensor.shape]} in {kind.name}; convert the model again")
    shape = (math.prod(rows), width // block * size)
    if tensor.offset + math.prod(shape) > file.num_bytes:
        raise ModelError(f"{file.path}: ends before {tensor.name} does; copy or download it again")
    return kind, shape


def _package() -> Any:
    """The package `gguf`. Raises ModelError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError(
            'a GGUF file is read with the package gguf, which is not installed; pip install "pertoken[gguf]"'
        ) from None
    return gguf
