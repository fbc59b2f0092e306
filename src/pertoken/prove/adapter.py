"""What the proof does with a recipe's adapter."""

from __future__ import annotations

import torch

from pertoken.model.lora import is_of_adapter
from pertoken.model.protocol import LanguageModel

__all__ = ["fill_b"]

_STD = 0.02


@torch.no_grad()
def fill_b(model: LanguageModel, seed: int) -> str | None:
    """Give each B that is zero, as a new adapter's are, random numbers, or no A would have a gradient to compare. What
    the user should know of that; None where nothing was done."""
    generator, filled = torch.Generator().manual_seed(seed), False
    for name, parameter in model.named_parameters():
        if is_of_adapter(name) and ".lora_B." in name and not parameter.any():
            parameter.copy_(_STD * torch.randn(parameter.shape, generator=generator))
            filled = True
    return "a new adapter's B are zero, and A has no gradient then; here they are random." if filled else None
