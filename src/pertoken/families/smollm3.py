"""SmolLM3: Llama without rotary angles in every fourth layer (Hugging Face, 2025; Yang et al., "Rope to Nope and Back
Again", 2025)."""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["SMOLLM3"]

SMOLLM3 = Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    recipe_name="smollm3",
    rope_theta=2e6,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
    },
    constants={"attention_bias": False, "mlp_bias": False, "pad_token_id": None},
    windows="layer_types",
    no_rope=True,
    gguf=Gguf("smollm3", neighbours_turn=True),
)
