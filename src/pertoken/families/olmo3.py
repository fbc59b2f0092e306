"""OLMo 3: OLMo 2 with a window in three of four layers, whose rotary frequencies no scaling touches (Team
Olmo, "Olmo 3", 2025)."""

from __future__ import annotations

from pertoken.families.family import Family

__all__ = ["OLMO3"]

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    recipe_name="olmo3",
    rope_theta=5e5,
    defaults={
        "max_position_embeddings": 2048,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
    constants={"attention_bias": False, "pad_token_id": None},
    window_switch=None,
    windows="layer_types",
    full_attention_every=4,
    by_layer_type=True,
    qk_norm=True,
    qk_norm_of_all_heads=True,
    norms="after",
)
