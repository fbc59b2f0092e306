"""OLMoE: experts in every layer, and a norm over all heads of queries and of keys (Muennighoff et al., "OLMoE: Open
Mixture-of-Experts Language Models", 2024, section 2)."""

from __future__ import annotations

from pertoken.families.family import Experts, Family

__all__ = ["OLMOE"]

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    recipe_name="olmoe",
    rope_theta=1e4,
    defaults={
        "max_position_embeddings": 4096,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    },
    constants={"attention_bias": False, "clip_qkv": None, "pad_token_id": None},
    window_switch=None,
    qk_norm=True,
    qk_norm_of_all_heads=True,
    experts=Experts(own_width=False),
)
