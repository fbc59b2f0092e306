"""A block through the kernels, as two autograd functions with gradients by hand: attention and MLP, each with its norm
and its residual sum.

Of the gradients of weights, d^T x and (x^T d)^T, the one is computed that has the narrower of d and x transposed, by a
kernel: oneDNN multiplies by a transposed left matrix at half of its rate. A frozen weight costs no product and no
transpose. Suffixes as in runner.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pertoken.engines.cpu.adapters import d_factors, factors_of
from pertoken.engines.cpu.attention import attention_backward, attention_forward
from pertoken.engines.cpu.runner import CpuBatch
from pertoken.kernels.memory import empty
from pertoken.objective.cross_entropy import first_order_only

__all__ = ["attention_block", "mlp_block"]


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    out = empty(a.shape[0], b.shape[1], dtype=a.dtype)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _widened(x: Tensor) -> Tensor:
    return empty(*x.shape, dtype=torch.float32).copy_(x)


def attention_block(
    hidden: Tensor,
    norm: nn.RMSNorm,
    projections: Sequence[nn.Linear],
    head_norms: Sequence[nn.RMSNorm | None],
    batch: CpuBatch,
) -> Tensor:
    """hidden + attention(norm(hidden)), of the rows asked for; projections of q, k, v and out, norms of q and k.

    The projections of q, k and v have a bias all three or none.
    """
    weights = [p.weight for p in projections]
    low = batch.cast(projections[:3]), batch.cast(projections[3:])
    norms = [None if n is None else n.weight for n in head_norms]
    biases = [p.bias for p in projections[:3]]
    inputs = (hidden, norm.weight, *weights, *norms, *biases, *factors_of(projections))
    out: Tensor = _AttentionBlock.apply(batch, low, *inputs)  # type: ignore[no-untyped-call]
    return out


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: CpuBatch,
        low: tuple[Tensor, Tensor],
        hidden: Tensor,
        norm: Tensor,
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
        x_ND, rstd = kernels.norm_forward(hidden, norm, batch.eps)
        b_qkv, b_q, b_kv = _low_biases(biases, w_q.shape[0], kernels.dtype)
        if batch.output_rows is None:
            residual = hidden
            projected = _product(x_ND, w_qkv.t(), b_qkv)
            q_rows, kv_rows = projected, projected[:, w_q.shape[0] :]
        else:
            m = batch.padded(batch.num_output_rows)
            residual = _rows(hidden, batch.output_rows, m)
            q_rows = _product(_rows(x_ND, batch.output_rows, m), w_qkv[: w_q.shape[0]].t(), b_q)
            kv_rows = projected = _product(x_ND, w_qkv[w_q.shape[0] :].t(), b_kv)
        q, k, v = _seat_all(batch, q_rows, kv_rows, q_norm, k_norm)
        seated, log_zs = attention_forward(kernels, q, k, v, batch.plan, heads)
        mixed = empty(q_rows.shape[0], heads.query * heads.dim, dtype=q_rows.dtype)
        mixed[batch.num_output_rows :].zero_()
        kernels.unpad_heads(seated, mixed, batch.plan.queries, heads.query, heads.group, heads.dim)
        out = kernels.add_residual(residual, _product(mixed, w_out.t()))
        saved = (hidden, norm, rstd, q_rows, projected, mixed, w_qkv, w_out, q_norm, k_norm)
        ctx.save_for_backward(*saved, *factors, *log_zs)
        ctx.batch, ctx.sizes = batch, [w.shape[0] for w in (w_q, w_k, w_v)]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first_order_only()
        hidden, norm, rstd, q_rows, projected, mixed, w_qkv, w_out, q_norm, k_norm, *rest = ctx.saved_tensors
        factors, log_zs = rest[:8], rest[8:]
        batch: CpuBatch = ctx.batch
        kernels, heads, plan = batch.kernels, batch.heads, batch.plan
        needs, needs_factors = _AttentionNeeds(*ctx.needs_input_grad[2:13]), ctx.needs_input_grad[13:]
        d_out = grads[0].contiguous()
        low, low_t = kernels.cast_and_transpose(d_out) if needs.w_o else (d_out.to(kernels.dtype), None)
        d_w_out = None if low_t is None else _widened(torch.mm(low_t, mixed))
        d_factors_out = d_factors(mixed, [low], factors[6:], needs_factors[6:])
        if not any(needs._replace(w_o=False)) and not any(needs_factors[:6]):
            return *[None] * 7, d_w_out, *[None] * 11, *d_factors_out
        d_mixed = _product(low, w_out)
        del low, low_t
        query_size = ctx.sizes[0]
        kv_rows = projected[:, query_size:] if batch.output_rows is None else projected
        d_seated = kernels.pad_heads(d_mixed, plan.queries, heads.query, heads.group, heads.dim)
        q, k, v = _seat_all(batch, q_rows, kv_rows, q_norm, k_norm)
        d_q, d_k, d_v = attention_backward(kernels, q, k, v, d_seated, log_zs, plan, heads)
        d_projected = empty(*projected.shape, dtype=projected.dtype)
        d_projected[batch.num_rows :].zero_()
        d_q_rows, d_kv_rows = d_projected, d_projected[:, query_size:]
        if batch.output_rows is not None:
            d_q_rows, d_kv_rows = empty(*q_rows.shape, dtype=q_rows.dtype), d_projected
            d_q_rows[batch.num_output_rows :].zero_()
        d_q_norm, d_k_norm = _unpad_all(
            batch, (d_q, d_k, d_v), (q_rows, kv_rows), (d_q_rows, d_kv_rows), q_norm, k_norm
        )
        d_weights = _d_qkv(batch, needs, (hidden, norm, rstd), (d_q_rows, d_projected), ctx.sizes)
        d_biases = _d_biases(needs, (d_q_rows, d_kv_rows), ctx.sizes)
        d_factors_qkv = _d_factors_qkv(batch, needs_factors, (hidden, norm), (d_q_rows, d_kv_rows), ctx.sizes, factors)
        d_hidden = d_norm = None
        if needs.hidden or needs.norm:
            if batch.output_rows is None:
                d_x, d_residual = _product(d_projected, w_qkv), d_out
            else:
                d_x = _product(d_projected, w_qkv[query_size:])
                d_x.index_add_(0, batch.output_rows, torch.mm(d_q_rows, w_qkv[:query_size])[: batch.num_output_rows])
                d_residual = torch.zeros_like(hidden).index_copy_(0, batch.output_rows, d_out[: batch.num_output_rows])
            d_hidden, d_norm = kernels.norm_backward(d_x, hidden, norm, rstd, d_residual)
        d_all = (d_hidden, d_norm, *d_weights, d_w_out, d_q_norm, d_k_norm, *d_biases, *d_factors_qkv, *d_factors_out)
        return None, None, *d_all


class _AttentionNeeds(NamedTuple):
    """Which inputs of an attention block want a gradient."""

    hidden: bool
    norm: bool
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
    normed: tuple[Tensor, Tensor],
    d_rows: tuple[Tensor, Tensor],
    sizes: list[int],
    factors: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the factors of q, k and v from those of their rows; `normed`: hidden states, norm."""
    if not any(needs[:6]):
        return [None] * 6
    hidden, norm = normed
    d_q_rows, d_kv_rows = d_rows
    x_ND = x_MD = batch.kernels.norm_forward(hidden, norm, batch.eps)[0]
    if batch.output_rows is not None:
        x_MD = _rows(x_ND, batch.output_rows, d_q_rows.shape[0])
    of_q = d_factors(x_MD, [d_q_rows[:, : sizes[0]]], factors[:2], needs[:2])
    return of_q + d_factors(x_ND, torch.split(d_kv_rows, sizes[1:], 1), factors[2:6], needs[2:6])


def _d_qkv(
    batch: CpuBatch,
    needs: _AttentionNeeds,
    normed: tuple[Tensor, Tensor, Tensor],
    d_rows: tuple[Tensor, Tensor],
    sizes: list[int],
) -> list[Tensor | None]:
    """The gradients of the matrices of q, k and v from those of their rows; `normed`: hidden states, norm, 1 / rms."""
    hidden, norm, rstd = normed
    d_q_rows, d_projected = d_rows
    wanted = needs[2:5]
    if batch.output_rows is None:
        return _d_weights(batch, (hidden, norm, rstd), d_projected, sizes, wanted)
    m = d_q_rows.shape[0]
    of_output = _rows(hidden, batch.output_rows, m), norm, _rows(rstd, batch.output_rows, m)
    of_q = _d_weights(batch, of_output, d_q_rows, sizes[:1], wanted[:1]) if wanted[0] else [None]
    return of_q + _d_weights(batch, (hidden, norm, rstd), d_projected, sizes[1:], wanted[1:])


def _d_weights(
    batch: CpuBatch,
    normed: tuple[Tensor, Tensor, Tensor],
    d_rows: Tensor,
    sizes: list[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Of matrices that read the same normalized rows, one beside the other in `d_rows`: at once if all are wanted."""
    if not any(wanted):
        return [None] * len(sizes)
    hidden, norm, rstd = normed
    x_t = batch.kernels.norm_transposed(hidden, norm, rstd)
    if all(wanted):
        d_all = empty(d_rows.shape[1], x_t.shape[0], dtype=norm.dtype)
        batch.kernels.widen_transposed(torch.mm(x_t, d_rows), d_all)
        return [*torch.split(d_all, sizes)]
    out: list[Tensor | None] = []
    for rows, wants in zip(torch.split(d_rows, sizes, 1), wanted, strict=True):
        out.append(None)
        if wants:
            d_weight = empty(rows.shape[1], x_t.shape[0], dtype=norm.dtype)
            out[-1] = batch.kernels.widen_transposed(torch.mm(x_t, rows), d_weight)
    return out


def _rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Those of `index`, followed by zeros."""
    out = empty(rows, *x.shape[1:], dtype=x.dtype)
    torch.index_select(x, 0, index, out=out[: index.shape[0]])
    out[index.shape[0] :].zero_()
    return out


def _seat_all(
    batch: CpuBatch, q_rows: Tensor, kv_rows: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalized and turned, all in attention's layout."""
    heads, plan = batch.heads, batch.plan
    seat = partial(batch.kernels.pad_heads, angles=batch.angles, eps=batch.eps)
    q = seat(q_rows, plan.queries, heads.query, heads.group, heads.dim, norm=q_norm)
    k = seat(kv_rows, plan.keys, heads.kv, 1, heads.dim, norm=k_norm)
    v = batch.kernels.pad_heads(kv_rows[:, heads.kv * heads.dim :], plan.keys, heads.kv, 1, heads.dim)
    return q, k, v


def _unpad_all(
    batch: CpuBatch,
    gradients: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    to: tuple[Tensor, Tensor],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `_seat_all`'s rows, written to `to`; returns those of the two norms."""
    heads, plan = batch.heads, batch.plan
    unpad = partial(batch.kernels.unpad_heads, angles=batch.angles, eps=batch.eps)
    (d_q, d_k, d_v), (q_rows, kv_rows), (to_q, to_kv) = gradients, rows, to
    d_q_norm = unpad(d_q, to_q, plan.queries, heads.query, heads.group, heads.dim, x=q_rows, norm=q_norm)
    d_k_norm = unpad(d_k, to_kv, plan.keys, heads.kv, 1, heads.dim, x=kv_rows, norm=k_norm)
    to_v = to_kv[:, heads.kv * heads.dim :]
    batch.kernels.unpad_heads(d_v, to_v, plan.keys, heads.kv, 1, heads.dim)
    return d_q_norm, d_k_norm


def mlp_block(hidden: Tensor, norm: nn.RMSNorm, projections: Sequence[nn.Linear], batch: CpuBatch) -> Tensor:
    """hidden + mlp(norm(hidden)); projections of gate, up and down."""
    weights = [p.weight for p in projections]
    low = batch.cast(projections[:2]), batch.cast(projections[2:])
    inputs = (hidden, norm.weight, *weights, *factors_of(projections))
    out: Tensor = _MLPBlock.apply(batch, low, *inputs)  # type: ignore[no-untyped-call]
    return out


class _MLPBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: CpuBatch,
        low: tuple[Tensor, Tensor],
        hidden: Tensor,
        norm: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        *factors: Tensor | None,
    ) -> Tensor:
        kernels = batch.kernels
        w_gate_up, w_low_down = low
        x_ND, rstd = kernels.norm_forward(hidden, norm, batch.eps)
        gate_up = _product(x_ND, w_gate_up.t())
        out = kernels.add_residual(hidden, _product(kernels.swiglu_forward(gate_up), w_low_down.t()))
        ctx.save_for_backward(hidden, norm, rstd, gate_up, w_gate_up, w_low_down, *factors)
        ctx.batch = batch
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first_order_only()
        hidden, norm, rstd, gate_up, w_gate_up, w_down, *factors = ctx.saved_tensors
        batch: CpuBatch = ctx.batch
        kernels = batch.kernels
        needs_hidden, needs_norm, *needs_gate_up, needs_down = ctx.needs_input_grad[2:7]
        needs_factors = ctx.needs_input_grad[7:]
        d_out = grads[0].contiguous()
        low, low_t = kernels.cast_and_transpose(d_out) if needs_down else (d_out.to(kernels.dtype), None)
        if not any(ctx.needs_input_grad[2:6]) and not any(needs_factors[:4]):
            activated = kernels.swiglu_forward(gate_up)
            d_w_down = None if low_t is None else _widened(torch.mm(low_t, activated))
            return *[None] * 6, d_w_down, *[None] * 4, *d_factors(activated, [low], factors[4:], needs_factors[4:])
        activated = kernels.swiglu_backward(gate_up, _product(low, w_down))  # gate_up is its gradient from here on
        torch.autograd.graph.increment_version(gate_up)  # so that a second backward pass is refused
        d_w_down = None if low_t is None else _widened(torch.mm(low_t, activated))
        d_factors_down = d_factors(activated, [low], factors[4:], needs_factors[4:])
        del low, low_t, activated
        sizes = [w_gate_up.shape[0] // 2] * 2
        d_gate, d_up = _d_weights(batch, (hidden, norm, rstd), gate_up, sizes, needs_gate_up)
        d_factors_gate_up: list[Tensor | None] = [None] * 4
        if any(needs_factors[:4]):
            x_ND, _ = kernels.norm_forward(hidden, norm, batch.eps)
            d_factors_gate_up = d_factors(x_ND, torch.split(gate_up, sizes, 1), factors[:4], needs_factors[:4])
        d_hidden = d_norm = None
        if needs_hidden or needs_norm:
            d_hidden, d_norm = kernels.norm_backward(_product(gate_up, w_gate_up), hidden, norm, rstd, d_out)
        return None, None, d_hidden, d_norm, d_gate, d_up, d_w_down, *d_factors_gate_up, *d_factors_down
