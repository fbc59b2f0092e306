"""OLMo 2: norms of what attention and feed-forward add, not of what they read, and a norm over all heads of queries and
of keys (OLMo Team, "2 OLMo 2 Furious", 2025, section 2)."""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["OLMO2"]

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    recipe_name="olmo2",
    rope_theta=5e5,
    defaults={
        "max_position_embeddings": 2048,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    constants={"attention_bias": False, "pad_token_id": None},
    window_switch=None,
    qk_norm=True,
    qk_norm_of_all_heads=True,
    norms="after",
    gguf=Gguf("olmo2"),
)
