"""A Hugging Face folder in and out: through our own decoder where it covers the family, else through transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken.folders import weights as hf
from pertoken.folders.adapters import base_folder, check_base, is_adapter, put_on, read_adapter, save_adapter
from pertoken.folders.config import config_from_hf, family_of
from pertoken.folders.files import check_fallback, read_json, save_tokenizer
from pertoken.folders.fused import split
from pertoken.folders.refusals import NotCovered
from pertoken.hf_fallback.load import load_fallback
from pertoken.hf_fallback.model import FallbackLM
from pertoken.model.decoder import CausalLM
from pertoken.model.protocol import LanguageModel

__all__ = ["load_adapter", "load_folder", "name_in_folder", "resize_embeddings", "save_folder", "split_as"]


def load_folder(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    blocks_dtype: torch.dtype | None = None,
    for_adapter: bool = False,
) -> LanguageModel:
    """The model of a Hugging Face folder (config.json and safetensors), with parameters in `dtype`.

    `blocks_dtype` is that of the blocks' matrices, where our decoder computes the model and they will be frozen: they
    are then never in memory in `dtype`. An adapter's A and B have `dtype`.

    A family that the decoder lacks, and a feature that it lacks (other rotary embeddings, windows, biases), mean
    transformers' own model. A folder with an adapter means its base model, adapted. `for_adapter` says that an adapter
    will be put on the model: one whose matrices are fused on disk is transformers' own then, as peft's adapters of such
    matrices are for all of each. Raises ModelError where that cannot be any of these.
    """
    if is_adapter(Path(path)):
        return load_adapter(Path(path), dtype=dtype, blocks_dtype=blocks_dtype)
    try:
        if for_adapter:
            _refuse_fused(Path(path))
        return hf.load_folder(path, dtype=dtype, blocks_dtype=blocks_dtype)
    except NotCovered as refusal:
        if not _transformers_has(refusal.model_type):
            raise
        folder = Path(path)
        return load_fallback(folder, num_weights=check_fallback(folder), dtype=dtype)


def load_adapter(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    blocks_dtype: torch.dtype | None = None,
    base: Path | None = None,
) -> LanguageModel:
    """The base model with the folder's adapter, which alone is trainable; `base` is where the base is, if it is not
    where the adapter says.

    Raises ModelError where the base is not there or not the one that the adapter was trained on, and for an adapter
    that pertoken lacks.
    """
    adapter = read_adapter(folder)
    where = base or base_folder(folder, adapter.base)
    check_base(folder, adapter, where)
    if base is not None and base.resolve() != Path(adapter.base.name).resolve() and adapter.base.revision is None:
        adapter = replace(adapter, base=replace(adapter.base, name=str(base.resolve())))
    model = load_folder(where, dtype=dtype, blocks_dtype=blocks_dtype, for_adapter=True)
    put_on(model, adapter, folder)
    return model


def _refuse_fused(folder: Path) -> None:
    values = read_json(folder / "config.json")
    if family_of(config_from_hf(values)).fused:
        model_type = values["model_type"]
        raise NotCovered(f"model_type={model_type}: adapters of its matrices are transformers' own", model_type)


def _transformers_has(model_type: object) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def name_in_folder(model: LanguageModel, name: str) -> str:
    """What a folder that `model` is saved in calls its parameter `name`."""
    return hf.name_on_disk(name, model.config) if isinstance(model, CausalLM) else name


def save_folder(
    model: LanguageModel,
    folder: str | Path,
    *,
    eos_token_id: int | None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """`pertoken.folders.weights.save_folder`, for either kind of model; of an adapted one the adapter alone."""
    if model.adapter is not None:
        save_adapter(model, Path(folder), eos_token_id=eos_token_id, tokenizer=tokenizer, dtype=dtype, weights=weights)
        return
    if isinstance(model, CausalLM):
        hf.save_folder(model, folder, eos_token_id=eos_token_id, tokenizer=tokenizer, dtype=dtype, weights=weights)
        return
    folder = Path(folder)
    _fallback(model).save(folder, eos_token_id=eos_token_id, tokenizer=tokenizer, dtype=dtype, weights=weights)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def resize_embeddings(model: LanguageModel, vocab_size: int) -> None:
    """`pertoken.folders.weights.resize_embeddings`, for either kind of model."""
    if isinstance(model, CausalLM):
        hf.resize_embeddings(model, vocab_size)
    else:
        _fallback(model).resize(vocab_size)


def split_as(model: LanguageModel, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors by their names on disk, with fused matrices taken apart where `model` has them apart."""
    return split(tensors, model.config) if isinstance(model, CausalLM) else tensors


def _fallback(model: LanguageModel) -> FallbackLM:
    assert isinstance(model, FallbackLM), type(model)
    return model
