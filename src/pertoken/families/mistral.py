"""Mistral: Llama with a window in all of its layers, or in none (Jiang et al., "Mistral 7B", 2023, section 2)."""

from __future__ import annotations

from pertoken.families.family import Family

__all__ = ["MISTRAL"]

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    recipe_name="mistral",
    rope_theta=1e4,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e4,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    window_switch=None,
    windows="all",
)
