"""Rotary position embeddings (Su et al., "RoFormer", 2021, section 3.2): frequencies, angles, and turning by them.

Shape suffixes: N flat tokens, H heads, D head dimension.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pertoken.recipe.model import ResolvedModelConfig
from pertoken.recipe.rope import RopeScaling

__all__ = ["Rope", "frequencies", "rope_angles", "rotary_scale", "rotate"]

Rope = tuple[Tensor, Tensor]  # cos and sin, [N, 1, D / 2] each


def frequencies(
    config: ResolvedModelConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    kind: Literal["global", "local", "none"] = "global",
) -> Tensor:
    """By how many radians each pair of dimensions turns from one position to the next: [D / 2], falling, and zero for
    pairs beyond `partial_rotary_factor`.

    `kind` is a layer's (`LayerKind.rope`): by `rope_theta`, by `rope_local_base_freq`, or zero, which turns nothing.
    `rope_scaling` is of the first kind alone: a frequency is kept, divided by `factor`, or goes from the one to the
    other (`_kept_share`).
    """
    if kind == "none":
        return torch.zeros(config.head_dim // 2, dtype=dtype, device=device)
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=dtype, device=device) / config.rotary_dim
    if kind == "local":
        assert config.rope_local_base_freq is not None, "layer_kinds has such layers only where there is one"
        return 1.0 / config.rope_local_base_freq**exponents
    plain = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return F.pad(plain, (0, (config.head_dim - config.rotary_dim) // 2))
    assert config.rotary_dim == config.head_dim, "no family has both"
    kept = _kept_share(plain, scaling, config.rope_theta)
    return plain * kept + plain / scaling.factor * (1 - kept)


def _kept_share(plain: Tensor, scaling: RopeScaling, base: float) -> Tensor:
    """How much of each frequency [D / 2] stays as it is: 1, 0, or between.

    "linear" (Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023): 0.
    Otherwise it goes by the turns within the original length. "llama3" ("The Llama 3 Herd of Models", 2024, section
    3.4.2, in the form of Meta's `apply_scaling`) is linear in their number, from `low_freq_factor` to
    `high_freq_factor`; "yarn" (Peng et al., "YaRN", 2023, section 3.2) in the dimension, from that of `beta_slow`
    turns to that of `beta_fast`.
    """
    if scaling.rope_type == "linear":
        return torch.zeros_like(plain)
    original = scaling.original_max_position_embeddings
    assert original is not None, "RopeScaling requires it"
    if scaling.rope_type == "llama3":
        assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None, "RopeScaling requires them"  # noqa: PT018
        turns = plain * (original / (2 * math.pi))
        width = scaling.high_freq_factor - scaling.low_freq_factor
        return ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
    size = 2 * len(plain)

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    fast, slow = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, size - 1)
    if fast == slow:
        slow += 0.001
    places = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
    return 1 - ((places - fast) / (slow - fast)).clamp(0, 1)


def rotary_scale(config: ResolvedModelConfig, kind: Literal["global", "local", "none"] = "global") -> float:
    """What cosine and sine are multiplied by: YaRN's sqrt(1 / t) (section 3.3), else 1."""
    scaling = config.rope_scaling
    if kind != "global" or scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    by_length = math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:  # as DeepSeek has it
        return (0.1 * scaling.mscale * by_length + 1.0) / (0.1 * scaling.mscale_all_dim * by_length + 1.0)
    return 0.1 * by_length + 1.0


def rope_angles(
    position_ids: Tensor,
    config: ResolvedModelConfig,
    dtype: torch.dtype,
    kind: Literal["global", "local", "none"] = "global",
) -> Rope:
    """Cosine and sine of the rotary angles, times `rotary_scale`: [N, 1, D / 2], at least float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    angles = position_ids.to(dtype)[:, None] * frequencies(config, dtype, position_ids.device, kind=kind)
    cos, sin = angles[:, None, :].cos(), angles[:, None, :].sin()
    scale = rotary_scale(config, kind)
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rotate(x_NHD: Tensor, rope: Rope) -> Tensor:
    """Turned by the angles, and scaled, in Hugging Face's convention: dimension i turns with dimension i + D / 2."""
    if torch.compiler.is_compiling():  # the compiler fuses the plain code, and trips over writes into views
        (a, b), (cos, sin) = x_NHD.chunk(2, -1), rope
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    turned: Tensor = _Rotate.apply(x_NHD, *rope)  # type: ignore[no-untyped-call]
    return turned


class _Rotate(torch.autograd.Function):
    """Plain code would be `torch.cat((a * cos - b * sin, b * cos + a * sin), -1)` for halves a and b. Turning back by
    the same angle, with the same scale, is its gradient, so both directions are four passes over half the data and keep
    nothing but the angles: about half the time of the plain code on a CPU.
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
