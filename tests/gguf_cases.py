"""GGUF files for tests, written by the package `gguf` as llama.cpp's converter writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from pertoken.data.tokens.trained import CHATML, SPECIAL_TOKENS
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ResolvedModelConfig

NEIGHBOURS_TURN = ("llama", "smollm3", "granite")
OFFSET_NORMS = ("gemma", "gemma3")
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate.": "ffn_gate_inp.",
    "input_layernorm": "attn_norm",
}
MORE_NAMES = {
    "before": {"post_attention_layernorm": "ffn_norm"},
    "after": {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"},
}
MORE_NAMES["both"] = {**MORE_NAMES["after"], "pre_feedforward_layernorm": "ffn_norm"}
TEXT = (
    """\
The quick brown fox jumps over the lazy dog. What is 48/2? It is 24, of course! What is 12 and  345?
red green blue cat dog sun moon one two three runs sleeps eats sings near under over
def f(x):\n    return x ** 2\n
"""
    * 3
)


def package() -> Any:
    return pytest.importorskip("gguf", reason="needs the optional package gguf")


def tensors_of(model: CausalLM, arch: str) -> dict[str, Tensor]:
    """In the names and the layout of llama.cpp's converter."""
    config, found, experts = model.config, {}, {}
    for name, weight in model.state_dict().items():
        if arch in OFFSET_NORMS and name.endswith("norm.weight"):
            weight = weight + 1
        if arch in NEIGHBOURS_TURN and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[-1])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        if ".experts." in name:
            before, _, after = name.partition(".mlp.experts.")
            number, part, _ = after.split(".")
            key = f"{before.replace('model.layers.', 'blk.')}.ffn_{part.removesuffix('_proj')}_exps.weight"
            experts.setdefault(key, {})[int(number)] = weight
            continue
        for theirs, ggufs in {**NAMES, **MORE_NAMES[config.norms]}.items():
            name = name.replace(theirs, ggufs)
        found[name] = weight
    found |= {key: torch.stack([parts[i] for i in range(len(parts))]) for key, parts in experts.items()}
    if config.rope_scaling is not None:
        found["rope_freqs.weight"] = rope_factors(config)
    return found


def rope_factors(config: ResolvedModelConfig) -> Tensor:
    """As the converter computes them, in wavelengths, which is not how `pertoken.model.rope` does."""
    factors, scaling = [], config.rope_scaling
    length = scaling.original_max_position_embeddings
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        if wavelength < length / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > length / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = length / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return torch.tensor(factors)


def keys_of(model: CausalLM, arch: str) -> dict[str, Any]:
    """The metadata that describe the architecture."""
    config = model.config
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if arch == "granite":
        keys |= {"embedding_scale": config.embedding_multiplier, "residual_scale": config.residual_multiplier}
        keys |= {"attention.scale": config.attention_multiplier, "logit_scale": config.logits_scaling}
    if arch == "gemma3":
        keys["attention.sliding_window"] = config.sliding_window
    if config.use_moe:
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    return {f"{arch}.{key}": value for key, value in keys.items()}


def write_gguf(
    path: Path,
    model: CausalLM,
    arch: str,
    *,
    more: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda found: found,
    quantized: str = "F32",
) -> Path:
    """The model's matrices in one quantization, its vectors in float32; a key of `more` that is None is left out."""
    gguf = package()
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (keys_of(model, arch) | (more or {})).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, weight in tensors(tensors_of(model, arch)).items():
        kind = gguf.GGMLQuantizationType[quantized if weight.dim() > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weight.numpy()), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_tokenizer(vocab_size: int = 330) -> Tokenizer:
    """SmolLM's kind: digits one by one, then GPT-2's pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def tokenizer_keys(tokenizer: Tokenizer, pre: str = "smollm") -> dict[str, Any]:
    """The metadata of a byte-level tokenizer with CHATML."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": CHATML,
    }
