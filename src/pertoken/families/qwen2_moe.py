"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts in every layer, and one more that every token goes through, weighted by
a gate of its own (Yang et al., "Qwen2 Technical Report", 2024, section 2.2.2)."""

from __future__ import annotations

from pertoken.families.family import Experts, Family

__all__ = ["QWEN2_MOE"]

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    recipe_name="qwen2",
    rope_theta=1e6,
    defaults={
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "router_aux_loss_coef": 1e-3,
    },
    constants={
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    qkv_bias=True,
    experts=Experts(shared=True),
)
