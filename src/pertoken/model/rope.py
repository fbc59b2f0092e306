"""Rotary position embeddings (Su et al., "RoFormer", 2021, section 3.2): frequencies, angles, and turning by them.

Shape suffixes: N flat tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["Rope", "frequencies", "rope_angles", "rotate"]

Rope = tuple[Tensor, Tensor]  # cos and sin, [N, 1, D / 2] each


def frequencies(
    config: ResolvedModelConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    kind: Literal["global", "local", "none"] = "global",
) -> Tensor:
    """By how many radians each pair of dimensions turns from one position to the next: [D / 2], falling.

    `kind` is a layer's (`LayerKind.rope`): by `rope_theta`, by `rope_local_base_freq`, or zero, which turns nothing.
    With `rope_scaling` (Llama 3.1, "The Llama 3 Herd of Models", 2024, section 3.4.2, in the form of Meta's
    `apply_scaling`): let n be the number of turns within the original length. A frequency with n at least
    `high_freq_factor` stays, one with n at most `low_freq_factor` is divided by `factor`, and between the two the
    result goes linearly with n from the one to the other.
    """
    if kind == "none":
        return torch.zeros(config.head_dim // 2, dtype=dtype, device=device)
    exponents = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    if kind == "local":
        assert config.rope_local_base_freq is not None, "layer_kinds has such layers only where there is one"
        return 1.0 / config.rope_local_base_freq**exponents
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    turns = plain * (scaling.original_max_position_embeddings / (2 * math.pi))
    width = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def rope_angles(
    position_ids: Tensor,
    config: ResolvedModelConfig,
    dtype: torch.dtype,
    kind: Literal["global", "local", "none"] = "global",
) -> Rope:
    """Cosine and sine of the rotary angles: [N, 1, D / 2], at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    angles = position_ids.to(dtype)[:, None] * frequencies(config, dtype, position_ids.device, kind=kind)
    return angles[:, None, :].cos(), angles[:, None, :].sin()


def rotate(x_NHD: Tensor, rope: Rope) -> Tensor:
    """Turned by the angles, in Hugging Face's convention: dimension i turns with dimension i + D / 2."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain code, and trips over writes into views
        (a, b), (cos, sin) = x_NHD.chunk(2, -1), rope
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    turned: Tensor = _Rotate.apply(x_NHD, *rope)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """Plain code would be `torch.cat((a * cos - b * sin, b * cos + a * sin), -1)` for halves a and b. Turning back by
    the same angle is its gradient, so both directions are four passes over half the data and keep nothing but the
    angles: about half the time of the plain code on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return out
