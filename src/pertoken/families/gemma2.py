"""Gemma 2: Gemma with norms on both sides, a window in every second layer, and soft-capped scores and logits
(Gemma Team, "Gemma 2", 2024, section 2)."""

from __future__ import annotations

from pertoken.families.family import Family

__all__ = ["GEMMA2"]

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    recipe_name="gemma2",
    rope_theta=1e4,
    defaults={
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "rope_theta": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "tie_word_embeddings": True,
    },
    constants={"attention_bias": False, "use_bidirectional_attention": False, "pad_token_id": None},
    window_switch=None,
    windows="layer_types",
    full_attention_every=2,
    norms="both",
    offset_norms=True,
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    scaled_embedding=True,
    numbers=("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"),
)
