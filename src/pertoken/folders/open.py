"""A Hugging Face folder in and out: through our own decoder where it covers the family, else through transformers.

`FallbackLM` has the decoder's face in all that training, evaluation and generation use: both are typed as `CausalLM`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pertoken.folders import weights as hf
from pertoken.folders.config import NotCovered
from pertoken.hf_fallback.model import FallbackLM, load_fallback
from pertoken.model.decoder import CausalLM

__all__ = ["load_folder", "resize_embeddings", "save_folder"]


def load_folder(path: str | Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a Hugging Face folder (config.json and safetensors), with parameters in `dtype`.

    A family that the decoder lacks, and a feature that it lacks (other rotary embeddings, windows, biases), mean
    transformers' own model. Raises ModelError where that cannot be either.
    """
    try:
        return hf.load_folder(path, dtype=dtype)
    except NotCovered as refusal:
        if not _transformers_has(refusal.model_type):
            raise
        return cast(CausalLM, load_fallback(Path(path), dtype=dtype))


def _transformers_has(model_type: object) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def save_folder(
    model: CausalLM,
    folder: str | Path,
    *,
    eos_token_id: int | None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """`pertoken.folders.weights.save_folder`, for either kind of model."""
    if isinstance(model, FallbackLM):
        model.save(Path(folder), eos_token_id=eos_token_id, tokenizer=tokenizer, dtype=dtype, weights=weights)
    else:
        hf.save_folder(model, folder, eos_token_id=eos_token_id, tokenizer=tokenizer, dtype=dtype, weights=weights)


def resize_embeddings(model: CausalLM, vocab_size: int) -> None:
    """`pertoken.folders.weights.resize_embeddings`, for either kind of model."""
    if isinstance(model, FallbackLM):
        model.resize(vocab_size)
    else:
        hf.resize_embeddings(model, vocab_size)
