"""Causal attention that never crosses documents, on flat tokens, and attention over a key-value cache.

Shape suffixes: N flat tokens, P padded tokens, S documents of a rectangle, T its width, H query heads, K key-value
heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "AttentionLayout",
    "KVCache",
    "attention",
    "cached_attention",
    "flash_capability",
    "varlen_attention",
    "which_attention",
]

# In units of one query attending to one key, as measured on two CPU cores (8/4 heads of 64, bfloat16). The optimum is
# flat: at 16 documents of 150 to 340 tokens, 192^2 to 384^2 for a rectangle differ by less than a tenth.
_ROW_COST = 32  # to carry a row in and out
_RECTANGLE_COST = 256**2  # to launch a dozen kernels, forward and backward


def which_attention(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int] | None,
    softcap: float | None = None,
) -> Literal["varlen", "rectangles"]:
    """How the documents of a micro-batch attend: "varlen", where they lie, or "rectangles", padded side by side.

    `capability` is `flash_capability`'s. PyTorch's FlashAttention takes half precision alone, heads of a multiple of 8
    up to 256, and CUDA devices from 8.0 (Ampere) on; above 192 its backward pass does not run on all of them. It has
    no cap of scores.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 192 and softcap is None
    return (
        "varlen" if device_type == "cuda" and capability is not None and capability >= (8, 0) and fits else "rectangles"
    )


@cache
def flash_capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device for which this PyTorch has FlashAttention over documents of any length,
    None for any other."""
    if device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return None
    if not _has_varlen():
        return None
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class AttentionLayout:
    """Where the documents of one micro-batch are for attention: computed once, used by every layer.

    Either `cu_seqlens` [S + 1] int32 says at which flat rows they begin and end, and nothing is padded; or `rectangles`
    holds (S, T) for S consecutive documents right-padded to T, and `positions` [N] int64 says at which row of the
    rectangles, laid end to end, a flat row sits (None where nothing is padded).
    """

    rectangles: tuple[tuple[int, int], ...]
    positions: Tensor | None
    cu_seqlens: Tensor | None = None
    max_length: int = 0  # no document is longer
    fewer_keys: bool = False  # with `cu_seqlens`: the kernel takes fewer key-value heads than query heads
    # Pairs of a query and a key: the documents' own, the sum of T^2 (future keys included), and what padding adds.
    pairs: int = 0
    padding_pairs: int = 0

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        *,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> AttentionLayout:
        """The layout of consecutive documents of the given lengths, its index on `device`.

        `cu_seqlens` are theirs, on `device`, and given where `which_attention` says "varlen". No document is longer
        than `longest`, which is the greatest of `lengths` if not given.
        """
        pairs, longest = sum(t * t for t in lengths), longest or max(lengths, default=0)
        if cu_seqlens is not None and lengths:  # the kernel refuses an empty batch
            return cls((), None, cu_seqlens, longest, _varlen_takes_fewer_keys(), pairs)
        rectangles = _cut_into_rectangles(lengths)
        padding_pairs = sum(s * t * t for s, t in rectangles) - pairs
        if sum(s * t for s, t in rectangles) == sum(lengths):
            return cls(rectangles, None, None, longest, False, pairs, padding_pairs)
        widths = torch.tensor([t for s, t in rectangles for _ in range(s)])
        lengths_S = torch.tensor(lengths)
        padding_before = torch.cumsum(widths - lengths_S, 0) - (widths - lengths_S)
        positions = torch.arange(sum(lengths)) + padding_before.repeat_interleave(lengths_S)
        return cls(rectangles, positions.to(device, non_blocking=True), None, longest, False, pairs, padding_pairs)


def _cut_into_rectangles(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Consecutive documents grouped so that the sum of `S * T * (T + row cost) + rectangle cost` is least.

    A shortest path over the runs of equal length (a rectangle never splits one), O(runs^2): documents sorted by length
    have few runs, at most sqrt(2N).
    """
    runs = [(length, len(list(group))) for length, group in groupby(lengths)]
    best: list[tuple[int, int]] = [(0, 0)]  # for the first i runs: (cost, where the last rectangle starts)
    for end in range(1, len(runs) + 1):
        width = documents = 0
        candidates = []
        for start in range(end - 1, -1, -1):
            width = max(width, runs[start][0])
            documents += runs[start][1]
            candidates.append((best[start][0] + documents * width * (width + _ROW_COST) + _RECTANGLE_COST, start))
        best.append(min(candidates))
    rectangles = []
    end = len(runs)
    while end:
        start = best[end][1]
        rectangles.append((sum(n for _, n in runs[start:end]), max(t for t, _ in runs[start:end])))
        end = start
    return tuple(reversed(rectangles))


def attention(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    *,
    layout: AttentionLayout,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v within each document, every token seeing itself and what precedes it. [N, H, D]

    `scale` is 1 / sqrt(D) if None. H is a multiple of K; query head h uses key-value head h // (H / K). Documents are
    right-padded into rectangles: causality alone keeps the padding out of every real row, so there is no mask. With
    `window` a token sees so many at most, itself one of them; only documents longer than that need a mask. With
    `softcap` c a scaled score x is c * tanh(x / c).
    """
    if not layout.rectangles:
        return q_NHD + (k_NKD.sum() + v_NKD.sum())  # N = 0: nothing to attend to, but all three have a (zero) gradient
    rows = [s * t for s, t in layout.rectangles]
    if layout.positions is not None:
        q_NHD, k_NKD, v_NKD = (_pad(x, layout.positions, sum(rows)) for x in (q_NHD, k_NKD, v_NKD))
    outputs = []
    parts = (torch.split(x, rows) for x in (q_NHD, k_NKD, v_NKD))
    for (s, t), *qkv in zip(layout.rectangles, *parts, strict=True):
        q_SHTD, k_SKTD, v_SKTD = (x.view(s, t, *x.shape[1:]).transpose(1, 2) for x in qkv)
        mask = None if window is None or t <= window else _band(t, 0, window, q_NHD.device)
        if softcap is not None:
            mask = _band(t, 0, None, q_NHD.device) if mask is None else mask
            out_SHTD = _capped_attention(q_SHTD, k_SKTD, v_SKTD, mask, scale=scale, softcap=softcap)
        else:
            out_SHTD = F.scaled_dot_product_attention(
                q_SHTD, k_SKTD, v_SKTD, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=scale
            )
        outputs.append(out_SHTD.transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return out if layout.positions is None else out.index_select(0, layout.positions)


def _capped_attention(
    q_SHTD: Tensor, k_SKLD: Tensor, v_SKLD: Tensor, mask_TL: Tensor, *, scale: float | None, softcap: float
) -> Tensor:
    """softmax(c * tanh(scale * q k^T / c)) v where `mask` is true, which no kernel of PyTorch computes; [S, H, T, D].

    Scores are at least float32 from the cap to the soft-max.
    """
    k_SHLD, v_SHLD = (x.repeat_interleave(q_SHTD.shape[1] // x.shape[1], 1) for x in (k_SKLD, v_SKLD))
    scores = q_SHTD @ k_SHLD.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = softcap * torch.tanh(scores * ((scale or q_SHTD.shape[-1] ** -0.5) / softcap))
    return scores.masked_fill(~mask_TL, -torch.inf).softmax(-1).to(v_SHLD.dtype) @ v_SHLD


def _band(rows: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """[rows, before + rows] bool: row i sees columns up to before + i, with `window` the last of these alone."""
    sees = torch.ones(rows, before + rows, dtype=torch.bool, device=device).tril(before)
    return sees if window is None else sees.triu(before - window + 1)


def varlen_attention(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    *,
    layout: AttentionLayout,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`attention` for a layout with `cu_seqlens`: the documents are read where they lie, and nothing is padded.

    In half precision on CUDA alone. A single operator whose shapes may vary, so the compiler can keep it in its graph.
    """
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = layout.cu_seqlens, layout.max_length
    assert ends is not None
    window_size = (-1 if window is None else window - 1, 0)  # tokens before, -1: all; and none after: causal
    settings: dict[str, Any] = {"window_size": window_size, "scale": scale}
    if layout.fewer_keys:
        settings["enable_gqa"] = True
    elif q_NHD.shape[1] != k_NKD.shape[1]:
        k_NKD, v_NKD = (x.repeat_interleave(q_NHD.shape[1] // x.shape[1], 1) for x in (k_NKD, v_NKD))
    out = varlen_attn(q_NHD, k_NKD, v_NKD, ends, ends, longest, longest, **settings)
    assert isinstance(out, Tensor)
    return out


@cache
def _varlen_takes_fewer_keys() -> bool:
    """Whether `varlen_attn` takes fewer key-value heads than query heads, as it does from PyTorch 2.13 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


@cache
def _has_varlen() -> bool:
    """PyTorch has it from 2.10 on, and takes a window in it from 2.11 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in signature(varlen_attn).parameters


def _pad(x_N: Tensor, positions: Tensor, num_rows: int) -> Tensor:
    """Flat rows to their places among zeros. Its backward is a gather."""
    return x_N.new_zeros(num_rows, *x_N.shape[1:]).index_copy_(0, positions, x_N)


class KVCache:
    """The keys and values of one sequence, for every layer; `length` positions of at most `max_length` are filled."""

    def __init__(self, *, layers: int, kv_heads: int, head_dim: int, max_length: int, like: Tensor) -> None:
        shape = (layers, kv_heads, max_length, head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.max_length = max_length
        self.length = 0


def cached_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    *,
    cache: KVCache,
    layer: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """T new tokens of one sequence attend to the cached ones and, causally, to each other. [T, H, D]

    Writes the new keys and values behind `cache.length`, which the caller advances after the last layer.
    """
    start, end = cache.length, cache.length + q_THD.shape[0]
    assert end <= cache.max_length, (end, cache.max_length)
    cache.keys[layer, :, start:end] = k_TKD.transpose(0, 1)
    cache.values[layer, :, start:end] = v_TKD.transpose(0, 1)
    q_HTD = q_THD.transpose(0, 1)
    k_KLD, v_KLD = (x[layer, :, :end].to(q_THD.dtype) for x in (cache.keys, cache.values))
    mask = None
    if window is not None and end > window:
        mask = _band(end - start, start, window, q_THD.device)
    elif start and end - start > 1:  # is_causal would align the first new token with the first cached one
        mask = _band(end - start, start, None, q_THD.device)
    if softcap is not None:
        mask = _band(end - start, start, window, q_THD.device)
        capped = _capped_attention(q_HTD[None], k_KLD[None], v_KLD[None], mask, scale=scale, softcap=softcap)
        return capped[0].transpose(0, 1)
    is_causal = mask is None and not start
    out_HTD = F.scaled_dot_product_attention(
        q_HTD[None], k_KLD[None], v_KLD[None], attn_mask=mask, is_causal=is_causal, enable_gqa=True, scale=scale
    )[0]
    return out_HTD.transpose(0, 1)
