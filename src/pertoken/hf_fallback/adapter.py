"""Adapters of transformers' own models, through peft."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from pertoken.errors import ModelError
from pertoken.hf_fallback.model import FallbackLM
from pertoken.model.lora import Adapter, first_a
from pertoken.text import reason

__all__ = ["adapt_fallback", "adapted_layers", "fan_in_fan_out", "merge_fallback"]

_NAME = "default"  # peft's for the only adapter there is


def adapt_fallback(model: FallbackLM, adapter: Adapter, targets: Sequence[str] | str, seed: int) -> None:
    """Put peft's layers in place of those that `targets` names, as peft takes them, and freeze all else, in place.

    The first A depends on `seed` alone, B is zero. Raises ModelError without peft, and where peft cannot adapt these.
    """
    peft = _peft()
    config = peft.LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        use_rslora=adapter.rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.hf.modules()),
    )
    try:
        with torch.random.fork_rng():  # peft fills A with random numbers first
            peft.inject_adapter_in_model(config, model.hf, adapter_name=_NAME)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ModelError(f"{model.facts.family}: peft cannot adapt it ({reason(error)})") from None
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model):
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        like = model.head_weight  # a layer's own matrix may be kept in less
        layer.lora_A[_NAME].weight = nn.Parameter(first_a(*a.shape, generator=generator).to(like.device, like.dtype))
        layer.lora_B[_NAME].weight = nn.Parameter(torch.zeros_like(b, dtype=like.dtype))


def adapted_layers(model: FallbackLM) -> Iterator[tuple[str, Any]]:
    """peft's layers by the names that they have in transformers' model."""
    for name, module in model.hf.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield name, module


def fan_in_fan_out(model: FallbackLM) -> bool:
    """Whether the adapted layers' matrices are [in, out], as GPT-2's are."""
    return any(layer.fan_in_fan_out for _, layer in adapted_layers(model))


@torch.no_grad()
def merge_fallback(model: FallbackLM) -> None:
    """Put the layers that were adapted back, with the adapter in their weights, all of it trainable, in place."""
    for name, layer in list(adapted_layers(model)):
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.hf.get_submodule(parent), leaf, layer.get_base_layer())
    model.requires_grad_(True)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError(
            "adapters of models that pertoken's own decoder lacks need peft; install it: pip install 'pertoken[lora]'"
        ) from None
    return peft
