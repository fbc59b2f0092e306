"""The decoder's norms: RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019), and Gemma's form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pertoken.recipe.model import ResolvedModelConfig

__all__ = ["OffsetRMSNorm", "norm_factors", "norm_kind", "norm_of"]


class OffsetRMSNorm(nn.RMSNorm):
    """An RMSNorm that multiplies by 1 + weight, in at least float32."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.normalized_shape, norm_factors(self).to(wide.dtype), self.eps).to(x.dtype)


def norm_kind(config: ResolvedModelConfig) -> type[nn.RMSNorm]:
    """The class of all of a model's norms."""
    return OffsetRMSNorm if config.offset_norms else nn.RMSNorm


def norm_of(config: ResolvedModelConfig, size: int) -> nn.RMSNorm:
    """A norm over `size` numbers."""
    return norm_kind(config)(size, eps=config.rms_norm_eps)


def norm_factors(norm: nn.RMSNorm) -> Tensor:
    """What a norm multiplies by [size], differentiable."""
    return 1.0 + norm.weight if isinstance(norm, OffsetRMSNorm) else norm.weight
