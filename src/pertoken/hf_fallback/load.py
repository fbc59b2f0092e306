"""A Hugging Face folder opened by transformers: no code of the folder's, no pickle, nothing missing or left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pertoken.errors import ModelError
from pertoken.hf_fallback.model import FallbackLM
from pertoken.hf_fallback.older_transformers import put_rotary_parameters
from pertoken.hf_fallback.quiet import quiet
from pertoken.model.aligned import aligned
from pertoken.text import escaped_logs, listed, reason

__all__ = ["load_fallback"]


def load_fallback(folder: Path, *, num_weights: int, dtype: torch.dtype) -> FallbackLM:
    """The model of a Hugging Face folder, in transformers' own code: no code of the folder's, and no pickle.

    `num_weights` is the number of numbers in its weights. Raises ModelError for a family that transformers lacks,
    weights that are missing or left over, and what `FallbackLM` refuses.
    """
    try:
        with escaped_logs("transformers"):
            return _load(folder, num_weights, dtype)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def _load(folder: Path, num_weights: int, dtype: torch.dtype) -> FallbackLM:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        put_rotary_parameters(config)
        _switch_off_dropout(config)
        if getattr(config, "quantization_config", None):
            raise ModelError("quantization_config: pertoken trains floating-point weights; write it out dequantized")
        with torch.device("meta"):  # where a parameter takes no memory
            asked = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).num_parameters()
        if asked > 2 * num_weights:  # tied ones are in the file once
            raise ModelError(
                f"config.json asks for {asked:,} numbers where the weights have {num_weights:,}; correct it"
            )
        with quiet():
            hf, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:  # transformers raises errors of any kind for a folder that is not what it says
        raise ModelError(f"transformers cannot open it ({reason(error)}); name another model") from None
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(key, ()))):
            raise ModelError(f"{key.replace('_', ' ')}: {listed(names)}; compare the weights with config.json")
    for parameter in hf.parameters():
        parameter.data = aligned(parameter.data)
    return FallbackLM(hf)


def _switch_off_dropout(config: Any) -> None:
    """Set every dropout rate of a configuration, and of those within it, to zero."""
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
        elif hasattr(value, "to_dict"):
            _switch_off_dropout(value)
