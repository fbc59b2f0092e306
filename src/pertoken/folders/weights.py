"""Weights in and out: Hugging Face folders of the families that the decoder computes.

What the decoder cannot compute is refused by name, never approximated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pertoken.errors import ModelError
from pertoken.folders.config import config_from_hf, config_to_hf, family_of
from pertoken.folders.files import read_json, save_tokenizer, weight_files, write_json
from pertoken.folders.fused import fuse, split
from pertoken.folders.mapped import MappedWeights
from pertoken.model.aligned import aligned
from pertoken.model.decoder import CausalLM
from pertoken.model.lora import matrices_of
from pertoken.recipe.model import ResolvedModelConfig
from pertoken.text import listed, reason

__all__ = [
    "build_model",
    "config_from_hf",
    "config_to_hf",
    "load_folder",
    "name_on_disk",
    "resize_embeddings",
    "save_folder",
    "skeleton",
]

# Buffers that older files saved among the weights; they follow from the configuration.
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$|^model\.freqs_(cos|sin)$")


def load_folder(
    path: str | Path, *, dtype: torch.dtype = torch.float32, blocks_dtype: torch.dtype | None = None
) -> CausalLM:
    """The model of a Hugging Face folder (config.json and safetensors, one file or several with an index), in `dtype`,
    the matrices of its blocks in `blocks_dtype`.

    Weights are converted one by one, so that memory holds little more than the model.

    Raises ModelError for a folder that is not one, an architecture that pertoken lacks, and tensors that are missing,
    unexpected or of another shape.
    """
    folder = Path(path)
    config = config_from_hf(read_json(folder / "config.json"))
    tensors = MappedWeights(weight_files(folder))
    try:
        return build_model(config, tensors, dtype, folder, blocks_dtype=blocks_dtype)
    finally:
        tensors.close()


def name_on_disk(name: str, config: ResolvedModelConfig) -> str:
    """What a folder calls the parameter `name` of `CausalLM`: the same, but for what the family's record says."""
    for ours, theirs in family_of(config).weight_names.items():
        name = name.replace(ours, theirs)
    return name


def build_model(
    config: ResolvedModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    source: Path,
    *,
    blocks_dtype: torch.dtype | None = None,
) -> CausalLM:
    """A model around the tensors, which are not copied where they have `dtype` already and lie as `aligned` wants."""
    tensors = split(tensors, config)
    model = skeleton(config, len(tensors), source)
    on_disk = {name: name_on_disk(name, config) for name in model.state_dict()}
    expected = {on_disk[name]: tensor.shape for name, tensor in model.state_dict().items()}
    head = tensors.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None:
        if not torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
            raise ModelError(
                f"{source}: lm_head.weight differs from the embedding; set tie_word_embeddings to false in config.json"
            )
        expected["lm_head.weight"] = head.shape
    del head  # its file would stay mapped
    there = {name for name in tensors if not _DERIVED.search(name)}
    if missing := sorted(expected.keys() - there):
        raise ModelError(f"{source}: {listed(missing)}: missing; the file is not of this architecture or incomplete")
    if extra := sorted(there - expected.keys()):
        raise ModelError(f"{source}: {listed(extra)}: no place in this architecture; compare it with config.json")
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape:
            raise ModelError(f"{source}: {name}: shape {[*found.shape]} is not {[*shape]}; compare it with config.json")
        if not found.is_floating_point():
            raise ModelError(f"{source}: {name}: dtype {found.dtype}; write the model out dequantized")
    dtypes = dict.fromkeys(on_disk, dtype)
    if blocks_dtype is not None:
        low = {module.weight for module in matrices_of(model.layers)}
        dtypes |= {name: blocks_dtype for name, parameter in model.named_parameters() if parameter in low}
    placed = {}
    # The largest first, which for a moment are there twice.
    for name in sorted(on_disk, key=lambda name: -expected[on_disk[name]].numel()):
        placed[name] = aligned(tensors[on_disk[name]].to(dtypes[name]))
    model.load_state_dict(placed, assign=True)
    return model


def skeleton(
    config: ResolvedModelConfig, num_tensors: int, source: Path, *, described_by: str = "config.json"
) -> CausalLM:
    """The model without memory for its tensors. What asks for more modules than there are tensors is not begun."""
    modules = config.num_hidden_layers * (config.num_experts if config.use_moe else 1)
    if modules > num_tensors:
        experts = f" of {config.num_experts} experts" if config.use_moe else ""
        raise ModelError(
            f"{source}: num_hidden_layers={config.num_hidden_layers}{experts}: the weights have {num_tensors} tensors "
            f"in all; compare them with {described_by}"
        )
    try:
        return CausalLM(config, device="meta")
    except (OverflowError, RuntimeError, TypeError) as error:
        raise ModelError(f"{source}: sizes that no tensor can have ({reason(error)}); correct {described_by}") from None


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
    tensors = fuse(tensors, model.config)
    special = {"eos_token_id": eos_token_id, "bos_token_id": getattr(tokenizer, "bos_token_id", None)}
    config = config_to_hf(model.config, dtype=dtype or model.head_weight.dtype, **special)
    write_json(folder / "config.json", config)
    special["pad_token_id"] = getattr(tokenizer, "pad_token_id", None)
    write_json(folder / "generation_config.json", {k: v for k, v in special.items() if v is not None})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


@torch.no_grad()
def resize_embeddings(model: CausalLM, vocab_size: int) -> None:
    """Make room for new tokens, in place: each new row of the embedding (and of an untied head) is the mean of the old.

    Optimizers made before hold the old parameters. Raises ModelError where `vocab_size` is smaller than the model's.
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
