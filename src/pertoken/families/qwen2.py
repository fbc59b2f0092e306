"""Qwen2 and Qwen2.5, dense: a bias on queries, keys and values (Yang et al., "Qwen2 Technical Report", 2024, 2.2.1).

The class reads no `attention_bias`: its biases are always there.
"""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["QWEN2"]

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    recipe_name="qwen2",
    rope_theta=1e6,
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
    },
    forced_tokenizer="Qwen2Tokenizer",
    qkv_bias=True,
    windows="layer_types",
    gguf=Gguf("qwen2"),
)
