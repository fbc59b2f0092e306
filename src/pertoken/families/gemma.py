"""Gemma, the first: Llama with GeGLU, norms that multiply by 1 + weight, a scaled embedding (Gemma Team, "Gemma", 2024,
section 2)."""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["GEMMA"]

GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    recipe_name="gemma",
    rope_theta=1e4,
    defaults={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    },
    constants={"attention_bias": False, "pad_token_id": None},
    offset_norms=True,
    activation="gelu_pytorch_tanh",
    activation_aliases=("gelu",),  # as its first releases have it, and its class understands it
    scaled_embedding=True,
    gguf=Gguf("gemma"),
)
