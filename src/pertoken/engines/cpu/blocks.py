"""The first half of a block through the kernels, with its gradient by hand: attention, its norms, its residual sum.

Suffixes as in runner.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pertoken.engines.cpu.adapters import d_factors, factors_of
from pertoken.engines.cpu.attention import attention_backward, attention_forward
from pertoken.engines.cpu.halves import Normed, add_update, d_add_update, d_normed, d_weights, normed, product, widened
from pertoken.engines.cpu.runner import CpuBatch
from pertoken.kernels.memory import empty
from pertoken.model.norms import norm_factors
from pertoken.objective.cross_entropy import first_order_only

__all__ = ["attention_block"]


def attention_block(
    hidden: Tensor,
    norms: tuple[nn.RMSNorm | None, nn.RMSNorm | None],
    projections: Sequence[nn.Linear],
    head_norms: Sequence[nn.RMSNorm | None],
    batch: CpuBatch,
) -> Tensor:
    """hidden + attention(hidden), of the rows asked for; norms of what it reads and of what it adds, projections of q,
    k, v and out, norms of q and k.

    The projections of q, k and v have a bias all three or none.
    """
    weights = [p.weight for p in projections]
    low = batch.cast(projections[:3]), batch.cast(projections[3:])
    before, after, q_norm, k_norm = (None if n is None else norm_factors(n) for n in (*norms, *head_norms))
    biases = [p.bias for p in projections[:3]]
    inputs = (hidden, before, after, *weights, q_norm, k_norm, *biases, *factors_of(projections))
    out: Tensor = _AttentionBlock.apply(batch, low, *inputs)  # type: ignore[no-untyped-call]
    return out


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: CpuBatch,
        low: tuple[Tensor, Tensor],
        hidden: Tensor,
        before: Tensor | None,
        after: Tensor | None,
        w_q: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        w_o: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        *biases_and_factors: Tensor | None,
    ) -> Tensor:
        kernels, heads = batch.kernels, batch.heads
        biases, factors = biases_and_factors[:3], biases_and_factors[3:]
        w_qkv, w_out = low
        x_ND, rstd = normed(batch, hidden, before)
        b_qkv, b_q, b_kv = _low_biases(biases, w_q.shape[0], kernels.dtype)
        if batch.output_rows is None:
            residual = hidden
            projected = product(x_ND, w_qkv.t(), b_qkv)
            q_rows, kv_rows = projected, projected[:, w_q.shape[0] :]
        else:
            m = batch.padded(batch.num_output_rows)
            residual = _rows(hidden, batch.output_rows, m)
            q_rows = product(_rows(x_ND, batch.output_rows, m), w_qkv[: w_q.shape[0]].t(), b_q)
            kv_rows = projected = product(x_ND, w_qkv[w_q.shape[0] :].t(), b_kv)
        q, k, v = _seat_all(batch, _HeadRows.of(batch, q_rows, kv_rows, q_norm, k_norm), q_norm, k_norm)
        seated, log_zs = attention_forward(kernels, q, k, v, batch.plan, heads)
        mixed = empty(q_rows.shape[0], heads.query * heads.dim, dtype=q_rows.dtype)
        mixed[batch.num_output_rows :].zero_()
        kernels.unpad_heads(seated, mixed, batch.plan.queries, heads.query, heads.group, heads.dim)
        update = product(mixed, w_out.t())
        out, rstd_after = add_update(batch, residual, update, after)
        of_sum = (None, None, None) if after is None else (update, after, rstd_after)
        saved = (hidden, before, rstd, q_rows, projected, mixed, w_qkv, w_out, q_norm, k_norm)
        ctx.save_for_backward(*saved, *of_sum, *factors, *log_zs)
        ctx.batch, ctx.sizes = batch, [w.shape[0] for w in (w_q, w_k, w_v)]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first_order_only()
        hidden, before, rstd, q_rows, projected, mixed, w_qkv, w_out, q_norm, k_norm, *rest = ctx.saved_tensors
        of_sum, factors, log_zs, given = rest[:3], rest[3:11], rest[11:], Normed(hidden, before, rstd)
        batch: CpuBatch = ctx.batch
        kernels, heads, plan = batch.kernels, batch.heads, batch.plan
        needs, needs_factors = _AttentionNeeds(*ctx.needs_input_grad[2:14]), ctx.needs_input_grad[14:]
        d_out = grads[0].contiguous()
        d_update, d_after = d_add_update(batch, d_out, *of_sum)
        low, low_t = kernels.cast_and_transpose(d_update) if needs.w_o else (d_update.to(kernels.dtype), None)
        d_w_out = None if low_t is None else widened(torch.mm(low_t, mixed))
        d_factors_out = d_factors(mixed, [low], factors[6:], needs_factors[6:])
        if not any(needs._replace(w_o=False, after=False)) and not any(needs_factors[:6]):
            return *[None] * 4, d_after, *[None] * 3, d_w_out, *[None] * 11, *d_factors_out
        d_mixed = product(low, w_out)
        del d_update, low, low_t
        query_size = ctx.sizes[0]
        kv_rows = projected[:, query_size:] if batch.output_rows is None else projected
        d_seated = kernels.pad_heads(d_mixed, plan.queries, heads.query, heads.group, heads.dim)
        rows = _HeadRows.of(batch, q_rows, kv_rows, q_norm, k_norm)
        q, k, v = _seat_all(batch, rows, q_norm, k_norm)
        d_q, d_k, d_v = attention_backward(kernels, q, k, v, d_seated, log_zs, plan, heads)
        d_projected = empty(*projected.shape, dtype=projected.dtype)
        d_projected[batch.num_rows :].zero_()
        d_q_rows, d_kv_rows = d_projected, d_projected[:, query_size:]
        if batch.output_rows is not None:
            d_q_rows, d_kv_rows = empty(*q_rows.shape, dtype=q_rows.dtype), d_projected
            d_q_rows[batch.num_output_rows :].zero_()
        d_q_norm, d_k_norm = _unpad_all(batch, (d_q, d_k, d_v), rows, (d_q_rows, d_kv_rows), q_norm, k_norm)
        d_weights = _d_qkv(batch, needs, given, (d_q_rows, d_projected), ctx.sizes)
        d_biases = _d_biases(needs, (d_q_rows, d_kv_rows), ctx.sizes)
        d_factors_qkv = _d_factors_qkv(batch, needs_factors, given, (d_q_rows, d_kv_rows), ctx.sizes, factors)
        d_hidden = d_before = None
        if needs.hidden or needs.before:
            if batch.output_rows is None:
                d_x, d_residual = product(d_projected, w_qkv), d_out
            else:
                d_x = product(d_projected, w_qkv[query_size:])
                d_x.index_add_(0, batch.output_rows, torch.mm(d_q_rows, w_qkv[:query_size])[: batch.num_output_rows])
                d_residual = torch.zeros_like(hidden).index_copy_(0, batch.output_rows, d_out[: batch.num_output_rows])
            d_hidden, d_before = d_normed(batch, d_x, given, d_residual)
        d_of_inputs = (d_hidden, d_before, d_after, *d_weights, d_w_out, d_q_norm, d_k_norm, *d_biases)
        return None, None, *d_of_inputs, *d_factors_qkv, *d_factors_out


class _AttentionNeeds(NamedTuple):
    """Which inputs of an attention block want a gradient."""

    hidden: bool
    before: bool
    after: bool
    w_q: bool
    w_k: bool
    w_v: bool
    w_o: bool
    q_norm: bool
    k_norm: bool
    b_q: bool
    b_k: bool
    b_v: bool


def _low_biases(
    biases: Sequence[Tensor | None], query_size: int, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of q, k and v one after the other, of q, and of k and v, in the kernels' dtype."""
    found = [bias for bias in biases if bias is not None]
    if not found:
        return None, None, None
    low = torch.cat(found).to(dtype)
    return low, low[:query_size], low[query_size:]


def _d_biases(needs: _AttentionNeeds, d_rows: tuple[Tensor, Tensor], sizes: list[int]) -> list[Tensor | None]:
    """The gradients of the biases of q, k and v from those of their rows: sums over rows, the added ones are zero."""
    d_q_rows, d_kv_rows = d_rows
    parts = (d_q_rows[:, : sizes[0]], *torch.split(d_kv_rows, sizes[1:], 1))
    return [part.sum(0, dtype=torch.float32) if wants else None for part, wants in zip(parts, needs[-3:], strict=True)]


def _d_factors_qkv(
    batch: CpuBatch,
    needs: Sequence[bool],
    given: Normed,
    d_rows: tuple[Tensor, Tensor],
    sizes: list[int],
    factors: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the factors of q, k and v from those of their rows."""
    if not any(needs[:6]):
        return [None] * 6
    d_q_rows, d_kv_rows = d_rows
    x_ND = x_MD = normed(batch, given.hidden, given.factors)[0]
    if batch.output_rows is not None:
        x_MD = _rows(x_ND, batch.output_rows, d_q_rows.shape[0])
    of_q = d_factors(x_MD, [d_q_rows[:, : sizes[0]]], factors[:2], needs[:2])
    return of_q + d_factors(x_ND, torch.split(d_kv_rows, sizes[1:], 1), factors[2:6], needs[2:6])


def _d_qkv(
    batch: CpuBatch,
    needs: _AttentionNeeds,
    given: Normed,
    d_rows: tuple[Tensor, Tensor],
    sizes: list[int],
) -> list[Tensor | None]:
    """The gradients of the matrices of q, k and v from those of their rows."""
    hidden, norm, rstd = given
    d_q_rows, d_projected = d_rows
    wanted = needs[3:6]
    if batch.output_rows is None:
        return d_weights(batch, given, d_projected, sizes, wanted)
    m = d_q_rows.shape[0]
    rstd_M = None if rstd is None else _rows(rstd, batch.output_rows, m)
    of_output = Normed(_rows(hidden, batch.output_rows, m), norm, rstd_M)
    of_q = d_weights(batch, of_output, d_q_rows, sizes[:1], wanted[:1]) if wanted[0] else [None]
    return of_q + d_weights(batch, given, d_projected, sizes[1:], wanted[1:])


def _rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Those of `index`, followed by zeros."""
    out = empty(rows, *x.shape[1:], dtype=x.dtype)
    torch.index_select(x, 0, index, out=out[: index.shape[0]])
    out[index.shape[0] :].zero_()
    return out


class _HeadRows(NamedTuple):
    """What attention is given, one row a token; columns may follow. Where queries and keys are normalized over all
    heads they are so already, and `wide` has what each was in float32, and 1 / rms."""

    q: Tensor
    k: Tensor
    v: Tensor
    wide: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def of(
        cls, batch: CpuBatch, q_rows: Tensor, kv_rows: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
    ) -> _HeadRows:
        v = kv_rows[:, batch.heads.kv * batch.heads.dim :]
        if not batch.norms_all_heads or q_norm is None or k_norm is None:
            return cls(q_rows, kv_rows, v)
        wide_q, wide_k = (widened(x[:, : len(norm)]) for x, norm in ((q_rows, q_norm), (kv_rows, k_norm)))
        q, rstd_q = batch.kernels.norm_forward(wide_q, q_norm, batch.eps)
        k, rstd_k = batch.kernels.norm_forward(wide_k, k_norm, batch.eps)
        return cls(q, k, v, ((wide_q, rstd_q), (wide_k, rstd_k)))


def _seat_all(
    batch: CpuBatch, rows: _HeadRows, q_norm: Tensor | None, k_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalized and turned, all in attention's layout."""
    heads, plan = batch.heads, batch.plan
    seat = partial(batch.kernels.pad_heads, angles=batch.angles, eps=batch.eps)
    if rows.wide is not None:
        q_norm = k_norm = None
    q = seat(rows.q, plan.queries, heads.query, heads.group, heads.dim, norm=q_norm)
    k = seat(rows.k, plan.keys, heads.kv, 1, heads.dim, norm=k_norm)
    v = batch.kernels.pad_heads(rows.v, plan.keys, heads.kv, 1, heads.dim)
    return q, k, v


def _unpad_all(
    batch: CpuBatch,
    gradients: tuple[Tensor, Tensor, Tensor],
    rows: _HeadRows,
    to: tuple[Tensor, Tensor],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the rows that `rows` were made of, written to `to`; returns those of the two norms."""
    heads, plan = batch.heads, batch.plan
    unpad = partial(batch.kernels.unpad_heads, angles=batch.angles, eps=batch.eps)
    (d_q, d_k, d_v), (to_q, to_kv) = gradients, to
    of_heads = (None, None) if rows.wide is not None else (q_norm, k_norm)
    d_q_norm = unpad(d_q, to_q, plan.queries, heads.query, heads.group, heads.dim, x=rows.q, norm=of_heads[0])
    d_k_norm = unpad(d_k, to_kv, plan.keys, heads.kv, 1, heads.dim, x=rows.k, norm=of_heads[1])
    to_v = to_kv[:, heads.kv * heads.dim :]
    batch.kernels.unpad_heads(d_v, to_v, plan.keys, heads.kv, 1, heads.dim)
    if rows.wide is not None and q_norm is not None and k_norm is not None:
        (wide_q, rstd_q), (wide_k, rstd_k) = rows.wide
        d_q_norm = _d_wide(batch, to_q[:, : len(q_norm)], wide_q, q_norm, rstd_q)
        d_k_norm = _d_wide(batch, to_kv[:, : len(k_norm)], wide_k, k_norm, rstd_k)
    return d_q_norm, d_k_norm


def _d_wide(batch: CpuBatch, d_rows: Tensor, wide: Tensor, norm: Tensor, rstd: Tensor) -> Tensor:
    """In place: the gradient of normalized rows becomes that of the rows. Returns the norm's."""
    d_wide, d_norm = batch.kernels.norm_backward(d_rows.contiguous(), wide, norm, rstd, None)
    d_rows.copy_(d_wide)
    return d_norm
