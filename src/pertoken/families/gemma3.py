"""Gemma 3, text alone: norms on both sides of attention and feed-forward, GeGLU, a scaled embedding (Gemma Team,
"Gemma 3 Technical Report", 2025, section 2)."""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["GEMMA3"]

GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    recipe_name="gemma3",
    rope_theta=1e6,
    defaults={
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    constants={"attention_bias": False, "use_bidirectional_attention": False, "pad_token_id": None},
    window_switch=None,
    windows="layer_types",
    full_attention_every=6,
    by_layer_type=True,
    rope_local_base_freq=1e4,
    qk_norm=True,
    norms="both",
    offset_norms=True,
    activation="gelu_pytorch_tanh",
    activation_key="hidden_activation",
    scaled_embedding=True,
    numbers=("query_pre_attn_scalar", "final_logit_softcapping"),
    gguf=Gguf(
        "gemma3",
        keys={
            "attention.sliding_window": "sliding_window",
            "attention.sliding_window_pattern": "sliding_window_pattern",
            "final_logit_softcapping": "final_logit_softcapping",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        query_scalars={62: 168},  # 27B
    ),
)
