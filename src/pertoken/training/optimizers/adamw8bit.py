"""AdamW with moments in eight bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pertoken.errors import RecipeError
from pertoken.model.protocol import LanguageModel
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers.adamw import AdamW
from pertoken.training.optimizers.optimizer import OptimizerKind, decay_groups

__all__ = ["ADAMW8BIT", "AdamW8bit"]

_SCALED = 256  # numbers with one scale, bitsandbytes' own
_BLOCK = 2**20  # numbers of a parameter that are updated together: on a CPU they are in float32 meanwhile
_SMALLEST = 4096  # numbers of a parameter; smaller ones (norms, biases) keep float32 moments, as bitsandbytes' own do


class AdamW8bit(AdamW):
    """AdamW by `bitsandbytes.functional.optimizer_update_8bit_blockwise`. The moments are rounded to the nearest of 256
    values for each 256 numbers, so that an update differs a little from AdamW's. It is the same for every split of the
    step up to the rounding that the gradient has there, and bitwise after a resume."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, betas=betas)
        self._library = _bitsandbytes()
        maps = (self._library.create_dynamic_map(signed=signed) for signed in (True, False))
        self._maps = [values.float() for values in maps]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        large = [(p, group) for group in self.param_groups for p in group["params"] if _is_large(p)]
        gradients = [parameter.grad for parameter, _ in large]
        for parameter, _ in large:
            parameter.grad = None
        super().step()
        for (parameter, group), gradient in zip(large, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient
                self._update(parameter, gradient, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        if not self.state[parameter]:
            self.state[parameter] = self.new_state(parameter)
        state = self.state[parameter]
        state["step"] += 1
        weights, gradient = parameter.detach().view(-1), gradient.reshape(-1)
        self._maps = [values.to(weights.device) for values in self._maps]
        for start in range(0, len(weights), _BLOCK):
            here = slice(start, start + _BLOCK)
            scales = slice(start // _SCALED, (start + _BLOCK) // _SCALED)
            self._library.optimizer_update_8bit_blockwise(
                "adam",
                gradient[here],
                weights[here],
                state["exp_avg_8bit"].view(-1)[here],
                state["exp_avg_sq_8bit"].view(-1)[here],
                *group["betas"],
                beta3=0.0,
                alpha=0.0,
                eps=group["eps"],
                step=int(state["step"]),
                lr=group["lr"],
                qmap1=self._maps[0],
                qmap2=self._maps[1],
                absmax1=state["exp_avg_scale"][scales],
                absmax2=state["exp_avg_sq_scale"][scales],
                weight_decay=group["weight_decay"],
            )

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A step count on the host, and each moment in eight bits, with its scales; AdamW's state of a small parameter.

        A moment of zero is the code 0 with a scale of 0."""
        if not _is_large(parameter):
            return super().new_state(parameter)
        scales = parameter.new_zeros(-(-parameter.numel() // _SCALED), dtype=torch.float32)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for name in ("exp_avg", "exp_avg_sq"):
            state[f"{name}_8bit"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{name}_scale"] = scales.clone()
        return state


def _is_large(parameter: nn.Parameter) -> bool:
    return parameter.numel() >= _SMALLEST


def _bitsandbytes() -> Any:
    """`bitsandbytes.functional`. Raises RecipeError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError:
        raise RecipeError(
            'train.optimizer="adamw8bit": needs bitsandbytes, which is not installed; install it: '
            "pip install 'pertoken[adamw8bit]', or set train.optimizer_dtype=\"bfloat16\" instead"
        ) from None
    return bitsandbytes.functional


def _build(model: LanguageModel, train: TrainConfig) -> AdamW8bit:
    return AdamW8bit(decay_groups(model.parameters(), train.weight_decay), betas=train.betas)


ADAMW8BIT = OptimizerKind(
    "adamw8bit", build=_build, state_numbers=2, item_bytes=1 + 4 / _SCALED, check_installed=_bitsandbytes
)
