"""MiniMind, dense or with experts: Qwen3 under its own model type, as which models of it are saved."""

from __future__ import annotations

from pertoken.families.family import Experts, Family

__all__ = ["MINIMIND"]

MINIMIND = Family(
    model_type="minimind",
    architecture=None,
    recipe_name="qwen3",
    rope_theta=1e6,
    defaults={
        "hidden_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": None,
        "vocab_size": 6400,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    rope_types=("default",),
    qk_norm=True,
    experts=Experts(switch="use_moe"),
)
