"""Attention on a CPU as batched matrix products, with the soft-max between them fused. One document at a time.

Each document is padded to a width that repeats (code for matrix products is generated once per shape), its heads one
after another: keys and values as [document, K, T, D], queries as [document, K, block, H / K, R, D], so that the query
heads that share a key-value head make one matrix, and a block of queries a contiguous piece of it. A block sees the
columns up to its last query, so that memory is linear in the length of long documents.

Shape suffixes: S documents, H query heads, K key-value heads, T width in keys, R rows of a block of queries, C columns
it sees, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pertoken.kernels.memory import empty
from pertoken.kernels.ops import Kernels, PaddedLayout

__all__ = ["AttentionPlan", "Heads", "attention_backward", "attention_forward", "round_up"]

_ONE_BLOCK = 384  # documents of more queries are cut into blocks, so that little above the diagonal is computed
_BLOCK = 256
_SCORES = 2**22  # of all heads at once: more documents of a width do not go into one product


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True)
class Heads:
    """The numbers that attention needs."""

    query: int
    kv: int
    dim: int
    scale: float  # of the scores
    softcap: float | None = None  # c: a scaled score x becomes c * tanh(x / c)

    @property
    def group(self) -> int:
        """Query heads for each key-value head."""
        return self.query // self.kv


@dataclass(frozen=True)
class _Block:
    """What one product computes: the same block of queries of S consecutive documents of one width."""

    documents: int  # S
    first_query: int  # row of the first document's first query, for one head
    query_width: int
    block: int  # which of the document's blocks
    rows: int  # R
    first_key: int
    key_width: int  # T
    first_column: int
    columns: int  # C
    limits: Tensor  # [S, R] int32, before which of these columns each query sees
    starts: Tensor | None  # [S, R] int32, from which of them on; None: from the first of the document on


@dataclass(frozen=True)
class AttentionPlan:
    """How the documents of one micro-batch are computed; the same for every layer that asks the same queries."""

    queries: PaddedLayout
    keys: PaddedLayout
    blocks: tuple[_Block, ...]
    all_keys_used: bool  # else the gradient of some is zero, and no product writes it

    @property
    def pairs(self) -> int:
        """Of a query and a key, that products are computed for."""
        return sum(block.documents * block.rows * block.columns for block in self.blocks)

    @classmethod
    def of(
        cls, lengths: Sequence[int], heads: Heads, output_rows: Tensor | None = None, *, window: int | None = None
    ) -> AttentionPlan:
        """For consecutive documents of `lengths`; `output_rows` [M]: the rows whose queries are needed, None: all.
        A query sees `window` keys at most, its own one of them; None: all before it."""
        lengths_S = np.asarray(lengths, dtype=np.int64)
        key_widths = _widths(lengths_S)
        keys, _ = _seat(lengths_S, key_widths, key_widths)
        if output_rows is None:
            counts, query_widths, positions = lengths_S, key_widths, keys.positions.numpy()
        else:
            chosen = output_rows.numpy()
            ends = np.searchsorted(chosen, np.cumsum(lengths_S))
            counts = np.diff(ends, prepend=0)
            query_widths = _widths(counts)
            positions = keys.positions.numpy()[chosen]
        blocks = np.where(query_widths > _ONE_BLOCK, _BLOCK, np.maximum(query_widths, 1))
        query_widths = -(-query_widths // blocks) * blocks
        queries, query_first = _seat(counts, query_widths, blocks, positions)
        key_first = np.cumsum(key_widths) - key_widths
        limits = np.zeros(queries.num_rows, dtype=np.int32)
        limits[queries.table.numpy()[:, 0] + queries.table.numpy()[:, 3]] = positions + 1
        cut = []
        for start, end in _groups(query_widths, key_widths, heads):
            s, width, rows = end - start, int(query_widths[start]), int(blocks[start])
            seen = limits[query_first[start] :][: s * width].reshape(s, width)
            for block in range(width // rows):
                mine = np.ascontiguousarray(seen[:, block * rows : (block + 1) * rows])
                columns = min(int(key_widths[start]), round_up(int(mine.max()), 32))
                first_column, starts = _window_of(mine, window)
                if starts is not None:
                    mine, columns = np.maximum(mine - first_column, 0), columns - first_column
                cut.append(
                    _Block(
                        documents=s,
                        first_query=int(query_first[start]),
                        query_width=width,
                        block=block,
                        rows=rows,
                        first_key=int(key_first[start]),
                        key_width=int(key_widths[start]),
                        first_column=first_column,
                        columns=columns,
                        limits=torch.from_numpy(mine),
                        starts=starts,
                    )
                )
        return cls(
            queries,
            keys,
            tuple(cut),
            bool((counts > 0).all()) and all(b.columns == b.key_width or b.rows < b.query_width for b in cut),
        )


def _window_of(limits: np.ndarray, window: int | None) -> tuple[int, Tensor | None]:
    """The first column that a block needs, and the first that each of its queries sees, counted from there."""
    if window is None or limits.max() <= window:
        return 0, None
    starts = np.maximum(limits - window, 0)
    first = int(starts[limits > 0].min()) // 32 * 32
    return first, torch.from_numpy(np.ascontiguousarray(np.maximum(starts - first, 0), dtype=np.int32))


def _widths(lengths_S: np.ndarray) -> np.ndarray:
    """Padded: to few different widths."""
    return np.where(lengths_S > 64, -(-lengths_S // 32) * 32, -(-lengths_S // 16) * 16)


def _seat(
    counts: np.ndarray, widths: np.ndarray, blocks: np.ndarray, positions: np.ndarray | None = None
) -> tuple[PaddedLayout, np.ndarray]:
    """PaddedLayout for `counts` rows of each document, and the first row of each document in the padded layout."""
    first = np.cumsum(widths) - widths
    rows = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    last = rows == np.repeat(counts, counts) - 1
    table = np.stack(
        [*(np.repeat(x, counts) for x in (first, widths, blocks)), rows, last], axis=1, dtype=np.int32, casting="unsafe"
    )
    positions = rows if positions is None else positions
    as_int32 = torch.from_numpy(np.ascontiguousarray(positions, dtype=np.int32))
    return PaddedLayout(torch.from_numpy(table), as_int32, int(widths.sum())), first


def _groups(query_widths: np.ndarray, key_widths: np.ndarray, heads: Heads) -> list[tuple[int, int]]:
    """Runs of documents with equal widths, in powers of two (each number of documents is another shape)."""
    groups, start = [], 0
    while start < len(query_widths):
        same = (query_widths[start:] == query_widths[start]) & (key_widths[start:] == key_widths[start])
        end = start + (len(same) if same.all() else int(np.argmin(same)))
        if query_widths[start]:
            most = max(1, _SCORES // int(heads.query * query_widths[start] * key_widths[start]))
            end = start + 2 ** (min(end - start, most).bit_length() - 1)
            groups.append((start, end))
        start = end
    return groups


def _queries(x: Tensor, block: _Block, heads: Heads) -> Tensor:
    """[S * K, (H / K) * R, D], a view of the padded layout."""
    group = heads.group
    return x.as_strided(
        (block.documents * heads.kv, group * block.rows, heads.dim),
        (group * block.query_width * heads.dim, heads.dim, 1),
        (block.first_query * heads.query + block.block * group * block.rows) * heads.dim,
    )


def _keys(x: Tensor, block: _Block, heads: Heads) -> Tensor:
    """[S * K, C, D], a view of the padded layout."""
    return x.as_strided(
        (block.documents * heads.kv, block.columns, heads.dim),
        (block.key_width * heads.dim, heads.dim, 1),
        (block.first_key * heads.kv + block.first_column) * heads.dim,
    )


def attention_forward(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, heads: Heads
) -> tuple[Tensor, list[Tensor]]:
    """softmax(scale * q k^T) v, all in the padded layout, and the logarithm of each block's normalizers."""
    out, log_zs = empty(*q.shape, dtype=q.dtype), []
    for block in plan.blocks:
        scores = torch.bmm(_queries(q, block, heads), _keys(k, block, heads).transpose(1, 2))
        shape = (block.documents * heads.query, block.rows)
        log_z = torch.empty(shape)
        scale, _ = _cap(scores, heads)
        kernels.softmax_forward(scores.view(*shape, block.columns), log_z, block.limits, scale, block.starts)
        _put(_queries(out, block, heads), scores, _keys(v, block, heads))
        log_zs.append(log_z)
    return out, log_zs


def attention_backward(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    log_zs: Sequence[Tensor],
    plan: AttentionPlan,
    heads: Heads,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, all in the padded layout. Probabilities are computed once more."""
    d_q, d_k, d_v = (empty(*x.shape, dtype=x.dtype) for x in (q, k, v))
    if not plan.all_keys_used:
        d_k.zero_()
        d_v.zero_()
    # Several blocks add to the same keys: in float32.
    wide = {}
    for block, log_z in zip(plan.blocks, log_zs, strict=True):
        q_B, d_out_B = (_queries(x, block, heads) for x in (q, d_out))
        k_B, v_B, d_k_B, d_v_B = (_keys(x, block, heads) for x in (k, v, d_k, d_v))
        scores, d_p = torch.bmm(q_B, k_B.transpose(1, 2)), torch.bmm(d_out_B, v_B.transpose(1, 2))
        shape = (block.documents * heads.query, block.rows, block.columns)
        scale, slope = _cap(scores, heads, gradient=True)
        kernels.softmax_backward(scores.view(shape), d_p.view(shape), log_z, block.limits, scale, block.starts)
        if slope is not None:
            d_p.mul_(slope)
        _put(_queries(d_q, block, heads), d_p, k_B)
        if block.query_width == block.rows:
            _put(d_k_B, d_p.transpose(1, 2), q_B)
            _put(d_v_B, scores.transpose(1, 2), d_out_B)
            continue
        if block.block == 0:
            size = (2, block.documents * heads.kv, block.key_width, heads.dim)
            wide[block.first_key] = torch.zeros(size, dtype=torch.float32)
        sums = wide[block.first_key][:, :, block.first_column : block.first_column + block.columns]
        sums[0] += torch.bmm(d_p.transpose(1, 2), q_B)
        sums[1] += torch.bmm(scores.transpose(1, 2), d_out_B)
        if (block.block + 1) * block.rows == block.query_width:
            whole = replace(block, first_column=0, columns=block.key_width)
            for d_x, total in zip((d_k, d_v), wide.pop(block.first_key), strict=True):
                _keys(d_x, whole, heads).copy_(total)
    return d_q, d_k, d_v


def _cap(scores: Tensor, heads: Heads, *, gradient: bool = False) -> tuple[float, Tensor | None]:
    """In place: scores become tanh(scale * score / softcap) where there is a cap. Returns by what the
    soft-max multiplies them, and with `gradient` what turns the gradient of the tanh into that of the score."""
    if heads.softcap is None:
        return heads.scale, None
    inner = heads.scale / heads.softcap
    scores.mul_(inner).tanh_()
    return heads.softcap, (1.0 - scores.square()).mul_(inner) if gradient else None


def _put(to: Tensor, a: Tensor, b: Tensor) -> None:
    if to.is_contiguous():
        torch.bmm(a, b, out=to)
    else:
        to.copy_(torch.bmm(a, b))
