"""Takes weights and gradients from our names to Megatron's and back, and cuts them as tensor parallelism does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pertoken.recipe.model import ResolvedModelConfig

_WHOLE = {  # ours -> Megatron's
    "model.embed_tokens": "embedding.word_embeddings",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
}
_WHOLE_IN_LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "mlp.down_proj": "mlp.linear_fc2",
}


def _pairs(config: ResolvedModelConfig) -> dict[str, str]:
    pairs = dict(_WHOLE)
    for i in range(config.num_hidden_layers):
        pairs |= {f"model.layers.{i}.{a}": f"decoder.layers.{i}.{b}" for a, b in _WHOLE_IN_LAYER.items()}
    return {f"{a}.weight": f"{b}.weight" for a, b in pairs.items()}


def to_megatron(ours: Mapping[str, Tensor], config: ResolvedModelConfig) -> dict[str, Tensor]:
    """Our tensors (weights, gradients) under Megatron's names: q, k, v in one matrix, gate and up in another.

    The rows of `linear_qkv` go by key-value head: its query heads, its key, its value.
    """
    theirs = {b: ours[a] for a, b in _pairs(config).items() if a in ours}
    groups, head_dim = config.num_key_value_heads, config.head_dim
    for i in range(config.num_hidden_layers):
        layer, there = f"model.layers.{i}", f"decoder.layers.{i}"
        qkv = [ours[f"{layer}.self_attn.{x}_proj.weight"].unflatten(0, (groups, -1, head_dim)) for x in "qkv"]
        theirs[f"{there}.self_attention.linear_qkv.weight"] = torch.cat(qkv, 1).flatten(0, 2)
        gate_up = [ours[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        theirs[f"{there}.mlp.linear_fc1.weight"] = torch.cat(gate_up)
    return theirs


def from_megatron(theirs: Mapping[str, Tensor], config: ResolvedModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_megatron`."""
    ours = {a: theirs[b] for a, b in _pairs(config).items() if b in theirs}
    groups, head_dim = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups
    for i in range(config.num_hidden_layers):
        layer, there = f"model.layers.{i}", f"decoder.layers.{i}"
        qkv = theirs[f"{there}.self_attention.linear_qkv.weight"].unflatten(0, (groups, queries + 2, head_dim))
        for x, part in zip("qkv", qkv.split((queries, 1, 1), 1), strict=True):
            ours[f"{layer}.self_attn.{x}_proj.weight"] = part.flatten(0, 2)
        gate_up = theirs[f"{there}.mlp.linear_fc1.weight"].chunk(2)
        for x, part in zip(("gate", "up"), gate_up, strict=True):
            ours[f"{layer}.mlp.{x}_proj.weight"] = part
    return ours


_CUT_ROWS = ("linear_qkv", "word_embeddings", "output_layer")
_CUT_COLUMNS = ("linear_proj", "linear_fc2")


def cut(name: str, whole: Tensor, ranks: int) -> list[Tensor]:
    """What each of `ranks` tensor-parallel ranks holds of a parameter, by Megatron's name for it."""
    if "linear_fc1" in name:  # gate and up are cut each by itself
        return [torch.cat(halves) for halves in zip(*(half.chunk(ranks) for half in whole.chunk(2)), strict=True)]
    if any(part in name for part in _CUT_ROWS):
        return list(whole.chunk(ranks))
    if any(part in name for part in _CUT_COLUMNS):
        return list(whole.chunk(ranks, 1))
    return [whole] * ranks


def join(name: str, parts: Sequence[Tensor]) -> Tensor:
    """The inverse of `cut`."""
    if "linear_fc1" in name:
        return torch.cat([torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True)])
    if any(part in name for part in _CUT_ROWS):
        return torch.cat(list(parts))
    if any(part in name for part in _CUT_COLUMNS):
        return torch.cat(list(parts), 1)
    return parts[0]


def of_stage(whole: Mapping[str, Tensor], stage: int, layers_per_stage: int) -> dict[str, Tensor]:
    """What a pipeline stage may hold, under its own names: every stage counts its layers from 0."""
    start = "decoder.layers."
    mine = {}
    for name, tensor in whole.items():
        if name.startswith(start):
            number, rest = name.removeprefix(start).split(".", 1)
            layer = int(number) - stage * layers_per_stage
            if 0 <= layer < layers_per_stage:
                mine[f"{start}{layer}.{rest}"] = tensor
        else:
            mine[name] = tensor
    return mine
