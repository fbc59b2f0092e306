"""Granite 3, dense: Llama whose embedding, residual sums, scores and logits are multiplied (Granite Team, "Granite 3.0
Language Models", 2024, section 2)."""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["GRANITE"]

GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    recipe_name="granite",
    rope_theta=1e4,
    defaults={
        "max_position_embeddings": 2048,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    constants={"attention_bias": False, "mlp_bias": False},
    numbers=("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    gguf=Gguf(
        "granite",
        neighbours_turn=True,
        keys={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
)
