"""Inputs for attention, and its definition in plain PyTorch."""

from __future__ import annotations

import math

import torch


def qkv(n, heads=4, kv_heads=2, head_dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, h, head_dim, dtype=torch.float64, generator=generator, requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]


def plain_softmax_attention(q, k, v, lengths):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    outputs = []
    for q_THD, k_THD, v_THD in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("thd,shd->hts", q_THD, k_THD) / math.sqrt(q.shape[2])
        future = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        outputs.append(torch.einsum("hts,shd->thd", scores.masked_fill(future, -torch.inf).softmax(-1), v_THD))
    return torch.cat(outputs)


def plain_gradients(grad, q, k, v, lengths):
    """Of `plain_softmax_attention`, written out, for where autograd is not at hand."""
    group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[2])
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    parts = []
    for g, q_THD, k_THD, v_THD in zip(*(x.split(lengths) for x in (grad, q, wide_k, wide_v)), strict=True):
        scores = torch.einsum("thd,shd->hts", q_THD, k_THD) * scale
        p = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        d_p = torch.einsum("thd,shd->hts", g, v_THD)
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * scale
        d_q, d_k = torch.einsum("hts,shd->thd", d_scores, k_THD), torch.einsum("hts,thd->shd", d_scores, q_THD)
        parts.append((d_q, d_k, torch.einsum("hts,thd->shd", p, g)))
    d_q, d_k, d_v = (torch.cat(x) for x in zip(*parts, strict=True))
    return d_q, d_k.unflatten(1, (-1, group)).sum(2), d_v.unflatten(1, (-1, group)).sum(2)
