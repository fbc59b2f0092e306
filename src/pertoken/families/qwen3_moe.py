"""Qwen3 with experts in every layer (Qwen Team, "Qwen3 Technical Report", 2025, section 2)."""

from __future__ import annotations

from pertoken.families.family import Experts, Family, Gguf

__all__ = ["QWEN3_MOE"]

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    recipe_name="qwen3",
    rope_theta=1e6,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 1e-3,
    },
    constants={
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    qk_norm=True,
    experts=Experts(),
    gguf=Gguf(
        "qwen3moe",
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        constants={"norm_topk_prob": True},
    ),
)
