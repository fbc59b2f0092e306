"""The second half of a block through the kernels, with its gradient by hand: the MLP, its norms, its residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.engines.cpu.halves import Normed, add_update, d_add_update, d_normed, d_weights, normed, product, widened
from pertoken.engines.cpu.runner import CpuBatch
from pertoken.model.norms import norm_factors
from pertoken.objective.cross_entropy import first_order_only

__all__ = ["mlp_block"]


def mlp_block(
    hidden: Tensor,
    norms: tuple[nn.RMSNorm | None, nn.RMSNorm | None],
    projections: Sequence[nn.Linear],
    batch: CpuBatch,
    *,
    gelu: bool,
) -> Tensor:
    """hidden + mlp(hidden); norms as in `attention_block`, projections of gate, up and down; `gelu` or silu."""
    weights = [p.weight for p in projections]
    low = batch.cast(weights[:2]), batch.cast(weights[2:])
    before, after = (None if n is None else norm_factors(n) for n in norms)
    out: Tensor = _MLPBlock.apply(batch, low, gelu, hidden, before, after, *weights)  # type: ignore[no-untyped-call]
    return out


class _MLPBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        batch: CpuBatch,
        low: tuple[Tensor, Tensor],
        gelu: bool,
        hidden: Tensor,
        before: Tensor | None,
        after: Tensor | None,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
    ) -> Tensor:
        kernels = batch.kernels
        w_gate_up, w_low_down = low
        x_ND, rstd = normed(batch, hidden, before)
        gate_up = product(x_ND, w_gate_up.t())
        update = product(kernels.glu_forward(gate_up, gelu=gelu), w_low_down.t())
        out, rstd_after = add_update(batch, hidden, update, after)
        of_sum = (None, None, None) if after is None else (update, after, rstd_after)
        ctx.save_for_backward(hidden, before, rstd, gate_up, w_gate_up, w_low_down, *of_sum)
        ctx.batch, ctx.gelu = batch, gelu
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first_order_only()
        hidden, before, rstd, gate_up, w_gate_up, w_down, *of_sum = ctx.saved_tensors
        given = Normed(hidden, before, rstd)
        batch: CpuBatch = ctx.batch
        kernels = batch.kernels
        needs_hidden, needs_before, _, *needs_gate_up, needs_down = ctx.needs_input_grad[3:]
        d_out = grads[0].contiguous()
        d_update, d_after = d_add_update(batch, d_out, *of_sum)
        low, low_t = kernels.cast_and_transpose(d_update) if needs_down else (d_update.to(kernels.dtype), None)
        del d_update
        if not any((needs_hidden, needs_before, *needs_gate_up)):
            d_w_down = None
            if low_t is not None:
                d_w_down = widened(torch.mm(low_t, kernels.glu_forward(gate_up, gelu=ctx.gelu)))
            return *[None] * 5, d_after, None, None, d_w_down
        # In place: gate_up is its own gradient from here on.
        activated = kernels.glu_backward(gate_up, product(low, w_down), gelu=ctx.gelu)
        torch.autograd.graph.increment_version(gate_up)  # so that a second backward pass is refused
        d_w_down = None if low_t is None else widened(torch.mm(low_t, activated))
        del low, low_t, activated
        sizes = [w_gate_up.shape[0] // 2] * 2
        d_gate, d_up = d_weights(batch, given, gate_up, sizes, needs_gate_up)
        d_hidden = d_before = None
        if needs_hidden or needs_before:
            d_hidden, d_before = d_normed(batch, product(gate_up, w_gate_up), given, d_out)
        return *[None] * 3, d_hidden, d_before, d_after, d_gate, d_up, d_w_down
