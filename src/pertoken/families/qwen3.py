"""Qwen3, dense: a norm of queries and keys, no bias (Qwen Team, "Qwen3 Technical Report", 2025, section 2)."""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["QWEN3"]

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    recipe_name="qwen3",
    rope_theta=1e6,
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
    constants={"attention_bias": False},
    qk_norm=True,
    windows="layer_types",
    gguf=Gguf("qwen3"),
)
