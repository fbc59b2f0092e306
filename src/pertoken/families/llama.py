"""Llama 2 and 3, and what is built like them; from 3.1 on with scaled rotary frequencies (`model/rope.py`)."""

from __future__ import annotations

from pertoken.families.family import Family, Gguf

__all__ = ["LLAMA"]

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    recipe_name="llama",
    rope_theta=1e4,
    defaults={"max_position_embeddings": 2048, "rope_theta": 1e4, "tie_word_embeddings": False},
    constants={"attention_bias": False, "mlp_bias": False},
    gguf=Gguf("llama", neighbours_turn=True),
)
