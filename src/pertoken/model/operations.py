"""How many operations a forward and backward pass takes, for what it is about and for padding.

An operation is a multiplication or an addition in a matrix product, whose forward pass is 2 for a weight and row, and
whose backward pass 4 (Kaplan et al., "Scaling Laws for Neural Language Models", section 2.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pertoken.data.batch.pack import MicroBatch
from pertoken.objective.wide import in_float64
from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["attention_operations", "body_parameters", "padding_metric", "padding_of"]


def body_parameters(config: ResolvedModelConfig) -> int:
    """Weights of the blocks' matrices that one token meets; embedding, head and norms are not among them."""
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = 2 * config.hidden_size * (query + key)
    mlp = 3 * config.hidden_size * config.intermediate_size
    if config.use_moe:
        experts = config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
        mlp = experts + config.hidden_size * config.num_experts
        if config.shared_expert_intermediate_size is not None:
            mlp += config.hidden_size * (3 * config.shared_expert_intermediate_size + 1)
    return config.num_hidden_layers * (attention + mlp)


def attention_operations(config: ResolvedModelConfig, pairs: int) -> float:
    """Of q k^T and p v in all layers, for so many pairs of a query and a key, half of which causality leaves."""
    return 6.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs


def padding_metric(*, useful: float, padding: float, head: int, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of one micro-batch: operations on padding, and all of them. 0-d float64, as `in_float64`.

    `useful` and `padding` are those of the blocks, `head` the head's weights, which supervised rows alone meet.
    """
    supervised = 6.0 * head * in_float64(torch.count_nonzero(loss_mask))
    return torch.full_like(supervised, padding), supervised + (useful + padding)


def padding_of(
    config: ResolvedModelConfig, micro_batch: MicroBatch, *, rows: int, pairs: int, padding_pairs: int
) -> tuple[Tensor, Tensor]:
    """`padding_metric` of a decoder that computes so many `rows` beside the real ones, `pairs` of a query and a key of
    the documents' own, and so many beside those."""
    body = 6.0 * body_parameters(config)
    return padding_metric(
        useful=body * sum(micro_batch.lengths) + attention_operations(config, pairs),
        padding=body * rows + attention_operations(config, padding_pairs),
        head=config.vocab_size * config.hidden_size,
        loss_mask=micro_batch.loss_mask,
    )
