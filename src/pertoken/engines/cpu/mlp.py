"""The second half of a block through the kernels, with its gradient by hand: the MLP, its norms, its residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.engines.cpu.adapters import d_factors, factors_of
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
    low = batch.cast(projections[:2]), batch.cast(projections[2:])
    before, after = (None if n is None else norm_factors(n) for n in norms)
    inputs = (hidden, before, after, *weights, *factors_of(projections))
    out: Tensor = _MLPBlock.apply(batch, low, gelu, *inputs)  # type: ignore[no-untyped-call]
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
        *factors: Tensor | None,
    ) -> Tensor:
        kernels = batch.kernels
        w_gate_up, w_low_down = low
        x_ND, rstd = normed(batch, hidden, before)
        gate_up = product(x_ND, w_gate_up.t())
        update = product(kernels.glu_forward(gate_up, gelu=gelu), w_low_down.t())
        out, rstd_after = add_update(batch, hidden, update, after)
        of_sum = (None, None, None) if after is None else (update, after, rstd_after)
        ctx.save_for_backward(hidden, before, rstd, gate_up, w_gate_up, w_low_down, *of_sum, *factors)
        ctx.batch, ctx.gelu = batch, gelu
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first_order_only()
        hidden, before, rstd, gate_up, w_gate_up, w_down, *rest = ctx.saved_tensors
        of_sum, factors, given = rest[:3], rest[3:], Normed(hidden, before, rstd)
        batch: CpuBatch = ctx.batch
        kernels = batch.kernels
        needs_hidden, needs_before, _, *needs_gate_up, needs_down = ctx.needs_input_grad[3:9]
        needs_factors = ctx.needs_input_grad[9:]
        d_out = grads[0].contiguous()
        d_update, d_after = d_add_update(batch, d_out, *of_sum)
        low, low_t = kernels.cast_and_transpose(d_update) if needs_down else (d_update.to(kernels.dtype), None)
        del d_update
        if not any((needs_hidden, needs_before, *needs_gate_up, *needs_factors[:4])):
            activated = kernels.glu_forward(gate_up, gelu=ctx.gelu)
            d_w_down = None if low_t is None else widened(torch.mm(low_t, activated))
            d_factors_down = d_factors(activated, [low], factors[4:], needs_factors[4:])
            return *[None] * 5, d_after, None, None, d_w_down, *[None] * 4, *d_factors_down
        # In place: gate_up is its own gradient from here on.
        activated = kernels.glu_backward(gate_up, product(low, w_down), gelu=ctx.gelu)
        torch.autograd.graph.increment_version(gate_up)  # so that a second backward pass is refused
        d_w_down = None if low_t is None else widened(torch.mm(low_t, activated))
        d_factors_down = d_factors(activated, [low], factors[4:], needs_factors[4:])
        del low, low_t, activated
        sizes = [w_gate_up.shape[0] // 2] * 2
        d_gate, d_up = d_weights(batch, given, gate_up, sizes, needs_gate_up)
        d_factors_gate_up: list[Tensor | None] = [None] * 4
        if any(needs_factors[:4]):
            x_ND, _ = normed(batch, hidden, before)
            d_factors_gate_up = d_factors(x_ND, torch.split(gate_up, sizes, 1), factors[:4], needs_factors[:4])
        d_hidden = d_before = None
        if needs_hidden or needs_before:
            d_hidden, d_before = d_normed(batch, product(gate_up, w_gate_up), given, d_out)
        of_inputs = (d_hidden, d_before, d_after, d_gate, d_up, d_w_down)
        return *[None] * 3, *of_inputs, *d_factors_gate_up, *d_factors_down
