"""The decoder on a CPU: matrix products by oneDNN or MKL, everything between them by the kernels, gradients by hand.

The same function of the same parameters as the plain modules of transformer.py, and tested against them. Activations
are in the kernels' dtype, the residual stream and the gradients of weights in float32. A block is two autograd
functions, attention and MLP, each with its norm and its residual sum.

Matrix products run on a number of rows rounded up, since oneDNN generates code for each shape; the rows added are zero,
and stay so. Of the gradients of weights, d^T x and (x^T d)^T, the one is computed that has the narrower of d and x
transposed, by a kernel: oneDNN multiplies by a transposed left matrix at half of its rate.

Shape suffixes: N rows (rounded up), M rows asked for (rounded up), D hidden size, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.kernels.memory import empty
from pertoken.kernels.ops import MAX_HEAD_DIM, Kernels
from pertoken.loss import TiedGradient
from pertoken.model.native_attention import AttentionPlan, Heads, attention_backward, attention_forward, round_up
from pertoken.model_config import ResolvedModelConfig

__all__ = ["Casts", "NativeBatch", "attention_block", "embed", "final_norm", "mlp_block"]

Casts = dict[int, Tensor]  # id of a parameter -> it, and those that read the same input, in the kernels' dtype as one


@dataclass(frozen=True)
class NativeBatch:
    """What the blocks of one forward pass share; the last block has one of its own, if not every row is asked for."""

    kernels: Kernels
    heads: Heads
    eps: float
    plan: AttentionPlan
    angles: Tensor  # [positions, head_dim] float32, cosines and then sines
    lengths: tuple[int, ...]  # of the documents
    num_rows: int  # real ones
    exact_rows: bool = False  # add none: experts would be given them
    asked: Tensor | None = None  # int64, the rows whose hidden states are needed after this block; None: all
    casts: Casts | None = None  # kept from one micro-batch to the next; None: cast anew

    @classmethod
    def of(
        cls,
        config: ResolvedModelConfig,
        kernels: Kernels,
        lengths: Sequence[int],
        *,
        casts: Casts | None = None,
    ) -> NativeBatch:
        """For consecutive documents of `lengths`."""
        heads = Heads(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, float(config.head_dim) ** -0.5
        )
        return cls(
            kernels,
            heads,
            config.rms_norm_eps,
            AttentionPlan.of(lengths, heads),
            _angles(max(lengths), config.head_dim, config.rope_theta),
            num_rows=sum(lengths),
            exact_rows=config.use_moe,
            casts=casts,
            lengths=tuple(lengths),
        )

    def asking(self, asked: Tensor) -> NativeBatch:
        """The same for the last block, whose hidden states are needed in some rows [M] only."""
        return replace(self, plan=AttentionPlan.of(self.lengths, self.heads, asked), asked=asked)

    @staticmethod
    def supports(config: ResolvedModelConfig) -> bool:
        return config.head_dim <= MAX_HEAD_DIM

    @property
    def num_asked(self) -> int:
        return self.num_rows if self.asked is None else self.asked.shape[0]

    def padded(self, rows: int) -> int:
        """How many rows a matrix product gets."""
        if self.exact_rows or self.kernels.dtype == torch.float32:  # MKL generates no code
            return rows
        # At most sixteen sizes from one power of two to the next, and 3% of zero rows on average.
        return round_up(rows, max(16, 2 ** (rows.bit_length() - 5)))

    def cast(self, weights: Sequence[Tensor]) -> Tensor:
        """Matrices, one below the other, in the kernels' dtype."""
        key = id(weights[0])
        if self.casts is not None and key in self.casts:
            return self.casts[key]
        low = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=self.kernels.dtype)
        start = 0
        for weight in weights:
            low[start : start + len(weight)].copy_(weight.detach())
            start += len(weight)
        if self.casts is not None:
            self.casts[key] = low
        return low


def _angles(positions: int, head_dim: int, theta: float) -> Tensor:
    """Cosines and sines of the rotary angles (Su et al., "RoFormer", 3.2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * (1.0 / theta**exponents)
    return torch.cat((angles.cos(), angles.sin()), 1)


def embed(weight: Tensor, input_ids: Tensor, batch: NativeBatch, tied: TiedGradient | None) -> Tensor:
    """[N, D] float32; rows beyond the real ones are zero."""
    out: Tensor = _Embed.apply(weight, input_ids, batch, tied)  # type: ignore[no-untyped-call]
    return out


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, input_ids: Tensor, batch: NativeBatch, tied: TiedGradient | None) -> Tensor:
        n = batch.num_rows
        out = empty(batch.padded(n), weight.shape[1], dtype=weight.dtype)
        torch.index_select(weight, 0, input_ids, out=out[:n])
        out[n:].zero_()
        ctx.save_for_backward(input_ids)
        ctx.shape, ctx.tied, ctx.kernels = weight.shape, tied, batch.kernels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (input_ids,) = ctx.saved_tensors
        d_weight = None
        if ctx.tied is not None:
            d_weight, ctx.tied.of_head = ctx.tied.of_head, None
        if d_weight is None:
            d_weight = grads[0].new_zeros(ctx.shape)
        ctx.kernels.add_rows(grads[0][: input_ids.shape[0]].contiguous(), input_ids, d_weight)
        return d_weight, None, None, None


def final_norm(hidden: Tensor, norm: nn.RMSNorm, batch: NativeBatch) -> Tensor:
    """The rows asked for, normalised, in the kernels' dtype."""
    out: Tensor = _Norm.apply(hidden, norm.weight, batch)  # type: ignore[no-untyped-call]
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, batch: NativeBatch) -> Tensor:
        out, rstd = batch.kernels.norm_forward(hidden[: batch.num_asked], weight, batch.eps)
        ctx.save_for_backward(hidden, weight, rstd)
        ctx.batch = batch
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, rstd = ctx.saved_tensors
        m = ctx.batch.num_asked
        d_hidden, d_weight = ctx.batch.kernels.norm_backward(grads[0].contiguous(), hidden[:m], weight, rstd, None)
        return _with_zero_rows(d_hidden, hidden.shape[0]), d_weight, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out=empty(a.shape[0], b.shape[1], dtype=a.dtype))


def _widened(x: Tensor) -> Tensor:
    return empty(*x.shape, dtype=torch.float32).copy_(x)


def _with_zero_rows(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x
    out = x.new_empty(rows, x.shape[1])
    out[: x.shape[0]] = x
    out[x.shape[0] :].zero_()
    return out


def attention_block(
    hidden: Tensor,
    norm: nn.RMSNorm,
    projections: Sequence[nn.Linear],
    head_norms: Sequence[nn.RMSNorm | None],
    batch: NativeBatch,
) -> Tensor:
    """hidden + attention(norm(hidden)), of the rows asked for; projections of q, k, v and out, norms of q and k."""
    weights = [p.weight for p in projections]
    low = batch.cast(weights[:3]), batch.cast(weights[3:])
    norms = [None if n is None else n.weight for n in head_norms]
    out: Tensor = _AttentionBlock.apply(batch, low, hidden, norm.weight, *weights, *norms)  # type: ignore[no-untyped-call]
    return out


class _AttentionBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: NativeBatch,
        low: tuple[Tensor, Tensor],
        hidden: Tensor,
        norm: Tensor,
        w_q: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        w_o: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> Tensor:
        kernels, heads = batch.kernels, batch.heads
        w_qkv, w_out = low
        x_ND, rstd = kernels.norm_forward(hidden, norm, batch.eps)
        if batch.asked is None:
            residual = hidden
            projected = _product(x_ND, w_qkv.t())
            q_rows, kv_rows = projected, projected[:, w_q.shape[0] :]
        else:
            m = batch.padded(batch.num_asked)
            residual = _rows(hidden, batch.asked, m)
            q_rows = _product(_rows(x_ND, batch.asked, m), w_qkv[: w_q.shape[0]].t())
            kv_rows = projected = _product(x_ND, w_qkv[w_q.shape[0] :].t())
        q, k, v = _seat_all(batch, q_rows, kv_rows, q_norm, k_norm)
        seated, log_zs = attention_forward(kernels, q, k, v, batch.plan, heads)
        mixed = empty(q_rows.shape[0], heads.query * heads.dim, dtype=q_rows.dtype)
        mixed[batch.num_asked :].zero_()
        kernels.unseat_heads(seated, mixed, batch.plan.queries, heads.query, heads.share, heads.dim)
        out = kernels.add_residual(residual, _product(mixed, w_out.t()))
        ctx.save_for_backward(hidden, norm, rstd, q_rows, projected, mixed, w_qkv, w_out, q_norm, k_norm, *log_zs)
        ctx.batch, ctx.sizes = batch, [w.shape[0] for w in (w_q, w_k, w_v)]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, norm, rstd, q_rows, projected, mixed, w_qkv, w_out, q_norm, k_norm, *log_zs = ctx.saved_tensors
        batch: NativeBatch = ctx.batch
        kernels, heads, plan = batch.kernels, batch.heads, batch.plan
        d_out = grads[0].contiguous()
        low, low_t = kernels.lower_both_ways(d_out)
        d_w_out = _widened(torch.mm(low_t, mixed))
        d_mixed = _product(low, w_out)
        del low, low_t
        query_size = ctx.sizes[0]
        kv_rows = projected[:, query_size:] if batch.asked is None else projected
        d_seated = kernels.seat_heads(d_mixed, plan.queries, heads.query, heads.share, heads.dim)
        q, k, v = _seat_all(batch, q_rows, kv_rows, q_norm, k_norm)
        d_q, d_k, d_v = attention_backward(kernels, q, k, v, d_seated, log_zs, plan, heads)
        d_projected = empty(*projected.shape, dtype=projected.dtype)
        d_projected[batch.num_rows :].zero_()
        d_q_rows, d_kv_rows = d_projected, d_projected[:, query_size:]
        if batch.asked is not None:
            d_q_rows, d_kv_rows = empty(*q_rows.shape, dtype=q_rows.dtype), d_projected
            d_q_rows[batch.num_asked :].zero_()
        d_q_norm, d_k_norm = _unseat_all(
            batch, (d_q, d_k, d_v), (q_rows, kv_rows), (d_q_rows, d_kv_rows), q_norm, k_norm
        )

        x_t = kernels.norm_transposed(hidden, norm, rstd)
        d_w_qkv = empty(*w_qkv.shape, dtype=norm.dtype)
        if batch.asked is None:
            d_x, d_residual = _product(d_projected, w_qkv), d_out
            kernels.widen_transposed(torch.mm(x_t, d_projected), d_w_qkv)
        else:
            m = q_rows.shape[0]
            d_x = _product(d_projected, w_qkv[query_size:])
            d_x.index_add_(0, batch.asked, torch.mm(d_q_rows, w_qkv[:query_size])[: batch.num_asked])
            d_residual = torch.zeros_like(hidden).index_copy_(0, batch.asked, d_out[: batch.num_asked])
            asked_t = kernels.norm_transposed(_rows(hidden, batch.asked, m), norm, _rows(rstd, batch.asked, m))
            kernels.widen_transposed(torch.mm(asked_t, d_q_rows), d_w_qkv[:query_size])
            kernels.widen_transposed(torch.mm(x_t, d_projected), d_w_qkv[query_size:])
        d_hidden, d_norm = kernels.norm_backward(d_x, hidden, norm, rstd, d_residual)
        return None, None, d_hidden, d_norm, *torch.split(d_w_qkv, ctx.sizes), d_w_out, d_q_norm, d_k_norm


def _rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """Those of `index`, followed by zeros."""
    out = empty(rows, *x.shape[1:], dtype=x.dtype)
    torch.index_select(x, 0, index, out=out[: index.shape[0]])
    out[index.shape[0] :].zero_()
    return out


def _seat_all(
    batch: NativeBatch, q_rows: Tensor, kv_rows: Tensor, q_norm: Tensor | None, k_norm: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised and turned, all in attention's layout."""
    heads, plan = batch.heads, batch.plan
    seat = partial(batch.kernels.seat_heads, angles=batch.angles, eps=batch.eps)
    q = seat(q_rows, plan.queries, heads.query, heads.share, heads.dim, norm=q_norm)
    k = seat(kv_rows, plan.keys, heads.kv, 1, heads.dim, norm=k_norm)
    v = batch.kernels.seat_heads(kv_rows[:, heads.kv * heads.dim :], plan.keys, heads.kv, 1, heads.dim)
    return q, k, v


def _unseat_all(
    batch: NativeBatch,
    gradients: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    to: tuple[Tensor, Tensor],
    q_norm: Tensor | None,
    k_norm: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `_seat_all`'s rows, written to `to`; returns those of the two norms."""
    heads, plan = batch.heads, batch.plan
    unseat = partial(batch.kernels.unseat_heads, angles=batch.angles, eps=batch.eps)
    (d_q, d_k, d_v), (q_rows, kv_rows), (to_q, to_kv) = gradients, rows, to
    d_q_norm = unseat(d_q, to_q, plan.queries, heads.query, heads.share, heads.dim, x=q_rows, norm=q_norm)
    d_k_norm = unseat(d_k, to_kv, plan.keys, heads.kv, 1, heads.dim, x=kv_rows, norm=k_norm)
    to_v = to_kv[:, heads.kv * heads.dim :]
    batch.kernels.unseat_heads(d_v, to_v, plan.keys, heads.kv, 1, heads.dim)
    return d_q_norm, d_k_norm


def mlp_block(hidden: Tensor, norm: nn.RMSNorm, projections: Sequence[nn.Linear], batch: NativeBatch) -> Tensor:
    """hidden + mlp(norm(hidden)); projections of gate, up and down."""
    weights = [p.weight for p in projections]
    low = batch.cast(weights[:2]), batch.cast(weights[2:])
    out: Tensor = _MLPBlock.apply(batch, low, hidden, norm.weight, *weights)  # type: ignore[no-untyped-call]
    return out


class _MLPBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: NativeBatch,
        low: tuple[Tensor, Tensor],
        hidden: Tensor,
        norm: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
    ) -> Tensor:
        kernels = batch.kernels
        w_gate_up, w_low_down = low
        x_ND, rstd = kernels.norm_forward(hidden, norm, batch.eps)
        gate_up = _product(x_ND, w_gate_up.t())
        out = kernels.add_residual(hidden, _product(kernels.swiglu_forward(gate_up), w_low_down.t()))
        ctx.save_for_backward(hidden, norm, rstd, gate_up, w_gate_up, w_low_down)
        ctx.kernels = kernels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, norm, rstd, gate_up, w_gate_up, w_down = ctx.saved_tensors
        kernels: Kernels = ctx.kernels
        d_out = grads[0].contiguous()
        low, low_t = kernels.lower_both_ways(d_out)
        activated = kernels.swiglu_backward(gate_up, _product(low, w_down))  # gate_up is its gradient from here on
        torch.autograd.graph.increment_version(gate_up)  # so that a second backward pass is refused
        d_w_down = _widened(torch.mm(low_t, activated))
        del low, low_t, activated
        d_w_gate_up = empty(*w_gate_up.shape, dtype=norm.dtype)
        kernels.widen_transposed(torch.mm(kernels.norm_transposed(hidden, norm, rstd), gate_up), d_w_gate_up)
        d_hidden, d_norm = kernels.norm_backward(_product(gate_up, w_gate_up), hidden, norm, rstd, d_out)
        return None, None, d_hidden, d_norm, *d_w_gate_up.chunk(2), d_w_down
