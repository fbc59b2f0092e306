"""Adapters by the kernels: a block reads W + scale * B A, added once for all micro-batches of a step.

So an adapted layer costs what a plain one does, its frozen matrix no product for a gradient, and the factors two small
products each in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pertoken.model.lora import LoraLinear

__all__ = ["d_factors", "factors_of", "weight_to_read"]


def weight_to_read(layer: nn.Linear) -> Tensor:
    """What the layer's input is multiplied by, [out, in], apart from autograd."""
    return layer.merged_weight() if isinstance(layer, LoraLinear) else layer.weight.detach()


def factors_of(layers: Sequence[nn.Linear]) -> list[Tensor | None]:
    """A [r, in] and scale * B [out, r] of each layer; None where it has none."""
    factors: list[Tensor | None] = []
    for layer in layers:
        if isinstance(layer, LoraLinear):
            factors += [layer.lora_A.weight, layer.scale * layer.lora_B.weight]
        else:
            factors += [None, None]
    return factors


def d_factors(
    x_ND: Tensor, d_rows: Sequence[Tensor], factors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of `factors_of` layers that read the rows `x`, from those of the rows that each of them gave."""
    found: list[Tensor | None] = [None] * len(factors)
    for i, d_NF in enumerate(d_rows):
        a, b = factors[2 * i : 2 * i + 2]
        if a is None or b is None:
            continue
        if needs[2 * i]:
            d_rN = torch.mm(d_NF, b.detach().to(x_ND.dtype)).t().contiguous()
            found[2 * i] = torch.mm(d_rN, x_ND).to(a.dtype)
        if needs[2 * i + 1]:
            x_rN = torch.mm(x_ND, a.detach().to(x_ND.dtype).t()).t().contiguous()
            found[2 * i + 1] = torch.mm(x_rN, d_NF).t().to(b.dtype).contiguous()
    return found
