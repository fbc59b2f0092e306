"""What both halves of a block have in common: the norm before, the residual sum after, gradients of matrices.

Of the gradients of weights, d^T x and (x^T d)^T, the one is computed that has the narrower of d and x transposed, by a
kernel: oneDNN multiplies by a transposed left matrix at half of its rate. A frozen weight costs no product and no
transpose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pertoken.engines.cpu.runner import CpuBatch
from pertoken.kernels.memory import empty

__all__ = ["Normed", "add_update", "d_add_update", "d_normed", "d_weights", "normed", "product", "widened"]


class Normed(NamedTuple):
    """What a half of a block reads: hidden states, and of the norm before it, if there is one, factors and 1 / rms."""

    hidden: Tensor
    factors: Tensor | None
    rstd: Tensor | None


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    out = empty(a.shape[0], b.shape[1], dtype=a.dtype)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def widened(x: Tensor) -> Tensor:
    return empty(*x.shape, dtype=torch.float32).copy_(x)


def normed(batch: CpuBatch, hidden: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a block's first matrices read, in the kernels' dtype, and 1 / rms; without a norm the hidden states."""
    if norm is None:
        return hidden.to(batch.kernels.dtype), None
    return batch.kernels.norm_forward(hidden, norm, batch.eps)


def d_normed(batch: CpuBatch, d_x: Tensor, given: Normed, d_residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of a block's input, `d_residual` among them, and of the norm before it."""
    hidden, norm, rstd = given
    if norm is None or rstd is None:
        return batch.kernels.add_residual(d_residual, d_x), None
    return batch.kernels.norm_backward(d_x, hidden, norm, rstd, d_residual)


def add_update(batch: CpuBatch, residual: Tensor, update: Tensor, norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """residual + residual_multiplier * norm(update), and the norm's 1 / rms."""
    rstd = None
    if norm is not None:
        update, rstd = batch.kernels.norm_forward(update.float(), norm, batch.eps)
    if batch.residual_multiplier != 1.0:
        return torch.add(residual, update, alpha=batch.residual_multiplier), rstd
    return batch.kernels.add_residual(residual, update), rstd


def d_add_update(
    batch: CpuBatch, d_out: Tensor, update: Tensor | None, norm: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `add_update`'s `update`, in float32, and of its norm."""
    if batch.residual_multiplier != 1.0:
        d_out = d_out * batch.residual_multiplier
    if update is None or norm is None or rstd is None:
        return d_out, None
    return batch.kernels.norm_backward(d_out.to(batch.kernels.dtype), update.float(), norm, rstd, None)


def d_weights(
    batch: CpuBatch,
    given: Normed,
    d_rows: Tensor,
    sizes: list[int],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Of matrices that read the same rows, one beside the other in `d_rows`: at once if all are wanted."""
    if not any(wanted):
        return [None] * len(sizes)
    hidden, norm, rstd = given
    if norm is None or rstd is None:
        x_t = batch.kernels.cast_and_transpose(hidden)[1]
    else:
        x_t = batch.kernels.norm_transposed(hidden, norm, rstd)
    if all(wanted):
        d_all = empty(d_rows.shape[1], x_t.shape[0], dtype=torch.float32)
        batch.kernels.widen_transposed(torch.mm(x_t, d_rows), d_all)
        return [*torch.split(d_all, sizes)]
    out: list[Tensor | None] = []
    for rows, wants in zip(torch.split(d_rows, sizes, 1), wanted, strict=True):
        out.append(None)
        if wants:
            d_weight = empty(rows.shape[1], x_t.shape[0], dtype=torch.float32)
            out[-1] = batch.kernels.widen_transposed(torch.mm(x_t, rows), d_weight)
    return out
