"""Models and micro-batches for the tests of engines, and how gradients are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pertoken.data.batch.pack import MicroBatch, Sample, collate
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.recipe.model import ModelConfig

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
VOCAB = 101
BATCHES = {
    "short": ([7, 5, 1], "some"),
    "all supervised": ([50, 33, 64], "all"),
    "blocks": ([500, 400, 400, 33], "some"),
    "one row": ([400, 30], "one"),
    "weights": ([90, 90, 90, 40], "weights"),
    "a document that nobody supervises": ([20, 33, 33], "not the first"),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama, untied": {"family": "llama", "tie_word_embeddings": False},
    "llama3": {
        "family": "llama",
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"family": "qwen2"},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "linear": {"family": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "olmo2": {"family": "olmo2"},
    "granite": {
        "family": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.1,
        "logits_scaling": 5.0,
    },
    "gemma": {"family": "gemma"},
    "gemma3": {"family": "gemma3", "query_pre_attn_scalar": 9, "final_logit_softcapping": 3.0},
    "gemma2, capped scores": {
        "family": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "sliding_window": 300,
    },
    "mistral, a window": {"family": "mistral", "sliding_window": 40},
    "gemma3, windows of some layers": {
        "family": "gemma3",
        "sliding_window": 300,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    },
    "olmo3, windows and YaRN": {
        "family": "olmo3",
        "sliding_window": 300,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "phi3, three quarters turned": {"family": "phi3", "partial_rotary_factor": 0.75},
    "smollm3": {"family": "smollm3", "no_rope_layers": (1, 0, 1)},
    "one head each": {"num_key_value_heads": 4, "head_dim": 6},
    "experts": {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "aux_loss_coef": 0.1},
    "shared expert": {
        "family": "qwen2",
        "use_moe": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 40,
    },
}


def batch_of(lengths: list[int], supervised: str) -> MicroBatch:
    rng = np.random.default_rng(0)

    def mask(i: int, n: int) -> np.ndarray:
        match supervised:
            case "all":
                return np.ones(n, dtype=bool)
            case "one":
                return np.arange(n) == (n - 1 if i == 0 else n)
            case "weights":
                return (rng.random(n) * (rng.random(n) < 0.5)).astype(np.float32)
            case "not the first":
                return np.full(n, i > 0)
            case _:
                return rng.random(n) < 0.4

    return collate([Sample(rng.integers(0, VOCAB, n + 1), mask(i, n)) for i, n in enumerate(lengths)])


def model_of(changes: dict[str, Any], dtype: torch.dtype) -> CausalLM:
    """With weights large enough that attention and norms matter, and norms that are not 1."""
    model = CausalLM(ModelConfig(**{**SHAPE, **changes}).resolve(VOCAB), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05)
    return model


def gradient(
    model: CausalLM, micro_batch: MicroBatch, execution: Execution = PLAIN, *, low: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = model(micro_batch, execution)
    out.objective({"supervised": 50.0, "inputs": 60.0}).backward()
    return float(out.loss_sum.detach()), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def largest_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-30)) for n, g in exact.items())
