"""Phi-3 and Phi-4: Llama with fused matrices on disk, and in Phi-4-mini rotary angles for a part of each head
(Microsoft, "Phi-3 Technical Report", 2024; "Phi-4-Mini Technical Report", 2025).

Its class has no scaling but LongRoPE, for which it takes YaRN too.
"""

from __future__ import annotations

from pertoken.families.family import Family

__all__ = ["PHI3"]

PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    recipe_name="phi3",
    rope_theta=1e4,
    defaults={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    constants={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "pad_token_id": None},
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    window_switch=None,
    windows="all",
    partial_rotary=True,
    rope_types=("default",),
)
