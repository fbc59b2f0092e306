"""Mixtral: Llama with experts in every layer (Jiang et al., "Mixtral of Experts", 2024).

Its experts have the one feed-forward width of the configuration, and their weights always sum to 1.
"""

from __future__ import annotations

from pertoken.families.family import Experts, Family

__all__ = ["MIXTRAL"]

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    recipe_name="llama",
    rope_theta=1e6,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 1e-3,
    },
    constants={"attention_bias": False, "sliding_window": None, "router_jitter_noise": 0.0},
    weight_names={".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."},
    window_switch=None,
    experts=Experts(num_key="num_local_experts", own_width=False, may_not_normalize=False),
)
