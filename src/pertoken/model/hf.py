"""Weights in and out: Hugging Face folders (Qwen3, Qwen3-MoE, Llama, Mixtral).

What the decoder cannot compute is refused by name, never approximated.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pertoken.errors import ModelError
from pertoken.model.hf_config import config_from_hf, config_to_hf
from pertoken.model.transformer import CausalLM
from pertoken.model_config import ResolvedModelConfig

__all__ = [
    "build_model",
    "config_from_hf",
    "config_to_hf",
    "listed",
    "load_folder",
    "name_on_disk",
    "resize_embeddings",
    "save_folder",
]

_MIXTRAL_NAMES = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}
# Buffers that older files saved among the weights; they follow from the configuration.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|^model\.freqs_(cos|sin)$")


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
    return build_model(config, tensors, dtype, folder)


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


def name_on_disk(name: str, config: ResolvedModelConfig) -> str:
    """What a folder calls the parameter `name` of `CausalLM`: the same, but for the feed-forward parts of Mixtral."""
    if config.use_moe and config.family == "llama":
        for ours, theirs in _MIXTRAL_NAMES.items():
            name = name.replace(ours, theirs)
    return name


def build_model(config: ResolvedModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype, source: Path) -> CausalLM:
    """A model around the tensors, which are not copied where they have `dtype` already."""
    model = CausalLM(config, device="meta")
    on_disk = {name: name_on_disk(name, config) for name in model.state_dict()}
    expected = {on_disk[name]: tensor.shape for name, tensor in model.state_dict().items()}
    head = tensors.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None:
        if not torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
            raise ModelError(
                f"{source}: lm_head.weight differs from the embedding; set tie_word_embeddings to false in config.json"
            )
        expected["lm_head.weight"] = head.shape
    tensors = {name: tensor for name, tensor in tensors.items() if not _DERIVED.search(name)}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ModelError(f"{source}: {listed(missing)}: missing; the file is not of this architecture or incomplete")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise ModelError(f"{source}: {listed(extra)}: no place in this architecture; compare it with config.json")
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape:
            raise ModelError(f"{source}: {name}: shape {[*found.shape]} is not {[*shape]}; compare it with config.json")
        if not found.is_floating_point():
            raise ModelError(f"{source}: {name}: dtype {found.dtype}; write the model out dequantised")
    model.load_state_dict({name: tensors[there].to(dtype) for name, there in on_disk.items()}, assign=True)
    return model


def listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def save_folder(
    model: CausalLM,
    folder: str | Path,
    *,
    eos_token_id: int | None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """A folder that `AutoModelForCausalLM.from_pretrained` opens as it is, made if need be.

    `eos_token_id` is what generation stops at: the end-of-turn token of a chat model. `tokenizer` (transformers) is
    saved beside the weights; `dtype` is the weights' own if not given. `weights` is the model's state dict where its
    own is sharded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name_on_disk(name, model.config): tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in (model.state_dict() if weights is None else weights).items()
    }
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
