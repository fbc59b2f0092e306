"""The decoder on a CPU: matrix products by oneDNN or MKL, everything between them by the kernels, gradients by hand.

The same function of the same parameters as the plain modules of model/, and tested against them. Activations
are in the kernels' dtype, the residual stream and the gradients of weights in float32. A block is two autograd
functions (blocks.py). All of them read weights past the modules that hold them, so `unsupported` must have found
nothing else there.

Matrix products run on a number of rows rounded up, since oneDNN generates code for each shape; the rows added are zero,
and stay so.

Shape suffixes: N rows (rounded up), M rows asked for (rounded up), D hidden size, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pertoken.engines.cpu.adapters import weight_to_read
from pertoken.engines.cpu.attention import AttentionPlan, Heads, round_up
from pertoken.kernels.memory import empty
from pertoken.kernels.ops import Kernels
from pertoken.model.execution import Casts
from pertoken.model.norms import norm_factors
from pertoken.model.rope import frequencies, rotary_scale
from pertoken.objective.cross_entropy import TiedGradient, first_order_only
from pertoken.recipe.model import LayerKind, ResolvedModelConfig

__all__ = ["CpuBatch", "embed", "final_norm"]


@dataclass(frozen=True)
class CpuBatch:
    """What the blocks of one forward pass share; the last block has one of its own, if not every row is asked for."""

    kernels: Kernels
    heads: Heads
    eps: float
    plan: AttentionPlan
    angles: Tensor  # [positions, head_dim] float32, cosines and then sines
    lengths: tuple[int, ...]  # of the documents
    num_rows: int  # real ones
    residual_multiplier: float
    norms_all_heads: bool  # of queries and keys, where they are normalized
    exact_rows: bool = False  # add none: experts would be given them
    output_rows: Tensor | None = None  # int64, the rows whose hidden states are needed after this block; None: all
    window: int | None = None  # of attention
    casts: Casts | None = None  # kept from one micro-batch to the next; None: cast anew

    @classmethod
    def of(
        cls,
        config: ResolvedModelConfig,
        kernels: Kernels,
        lengths: Sequence[int],
        *,
        casts: Casts | None = None,
    ) -> CpuBatch:
        """For consecutive documents of `lengths`, in a layer that sees all of them and turns by `rope_theta`."""
        scale = config.attention_scale or float(config.head_dim) ** -0.5
        softcap = config.attn_logit_softcapping
        heads = Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim, scale, softcap)
        return cls(
            kernels,
            heads,
            config.rms_norm_eps,
            AttentionPlan.of(lengths, heads),
            _angles(max(lengths), config),
            num_rows=sum(lengths),
            residual_multiplier=config.residual_multiplier,
            norms_all_heads=config.qk_norm_of_all_heads,
            exact_rows=config.use_moe,
            casts=casts,
            lengths=tuple(lengths),
        )

    def with_output_rows(self, output_rows: Tensor) -> CpuBatch:
        """The same for the last block, whose hidden states are needed in some rows [M] only."""
        plan = AttentionPlan.of(self.lengths, self.heads, output_rows, window=self.window)
        return replace(self, plan=plan, output_rows=output_rows)

    def in_layers_of(self, kind: LayerKind, config: ResolvedModelConfig) -> CpuBatch:
        """The same for layers whose attention is of another kind."""
        batch = self
        if kind.rope != "global":
            batch = replace(batch, angles=_angles(max(self.lengths), config, kind.rope))
        if kind.window is not None and kind.window < max(self.lengths):
            plan = AttentionPlan.of(self.lengths, self.heads, window=kind.window)
            batch = replace(batch, plan=plan, window=kind.window)
        return batch

    @property
    def num_output_rows(self) -> int:
        return self.num_rows if self.output_rows is None else self.output_rows.shape[0]

    def padded(self, rows: int) -> int:
        """How many rows a matrix product gets."""
        if self.exact_rows or self.kernels.dtype == torch.float32:  # MKL generates no code
            return rows
        # At most sixteen sizes from one power of two to the next, and 3% of zero rows on average.
        return round_up(rows, max(16, 2 ** (rows.bit_length() - 5)))

    def cast(self, layers: Sequence[nn.Linear]) -> Tensor:
        """The layers' matrices, one below the other, in the kernels' dtype."""
        weights = [layer.weight for layer in layers]
        key = tuple(map(id, weights))
        kept = None if self.casts is None else self.casts.get(key)
        if kept is not None:
            return kept
        low = torch.empty(sum(map(len, weights)), weights[0].shape[1], dtype=self.kernels.dtype)
        start = 0
        for layer in layers:
            weight = weight_to_read(layer)
            low[start : start + len(weight)].copy_(weight)
            start += len(weight)
        if self.casts is not None:
            self.casts.put(key, low)
        return low


def _angles(positions: int, config: ResolvedModelConfig, kind: Literal["global", "local", "none"] = "global") -> Tensor:
    """Cosines and sines of the rotary angles, times `rotary_scale`, [positions, head_dim]."""
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies(config, torch.float32, kind=kind)
    return torch.cat((angles.cos(), angles.sin()), 1) * rotary_scale(config, kind)


def embed(weight: Tensor, input_ids: Tensor, batch: CpuBatch, tied: TiedGradient | None) -> Tensor:
    """[N, D] float32; rows beyond the real ones are zero."""
    out: Tensor = _Embed.apply(weight, input_ids, batch, tied)  # type: ignore[no-untyped-call]
    return out


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, input_ids: Tensor, batch: CpuBatch, tied: TiedGradient | None) -> Tensor:
        n = batch.num_rows
        out = empty(batch.padded(n), weight.shape[1], dtype=weight.dtype)
        torch.index_select(weight, 0, input_ids, out=out[:n])
        out[n:].zero_()
        ctx.save_for_backward(input_ids)
        ctx.shape, ctx.tied, ctx.kernels = weight.shape, tied, batch.kernels
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        first_order_only()
        (input_ids,) = ctx.saved_tensors
        d_weight = None
        if ctx.tied is not None:
            d_weight, ctx.tied.of_head = ctx.tied.of_head, None
        if d_weight is None:
            d_weight = grads[0].new_zeros(ctx.shape)
        ctx.kernels.add_rows(grads[0][: input_ids.shape[0]].contiguous(), input_ids, d_weight)
        return d_weight, None, None, None


def final_norm(hidden: Tensor, norm: nn.RMSNorm, batch: CpuBatch) -> Tensor:
    """The rows asked for, normalized, in the kernels' dtype."""
    out: Tensor = _Norm.apply(hidden, norm_factors(norm), batch)  # type: ignore[no-untyped-call]
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, batch: CpuBatch) -> Tensor:
        out, rstd = batch.kernels.norm_forward(hidden[: batch.num_output_rows], weight, batch.eps)
        ctx.save_for_backward(hidden, weight, rstd)
        ctx.batch = batch
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        first_order_only()
        hidden, weight, rstd = ctx.saved_tensors
        m = ctx.batch.num_output_rows
        d_hidden, d_weight = ctx.batch.kernels.norm_backward(grads[0].contiguous(), hidden[:m], weight, rstd, None)
        return _with_zero_rows(d_hidden, hidden.shape[0]), d_weight, None


def _with_zero_rows(x: Tensor, rows: int) -> Tensor:
    if x.shape[0] == rows:
        return x
    out = x.new_empty(rows, x.shape[1])
    out[: x.shape[0]] = x
    out[x.shape[0] :].zero_()
    return out
