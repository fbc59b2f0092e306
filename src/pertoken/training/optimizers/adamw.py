"""AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pertoken.model.protocol import LanguageModel, TorchModule
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers.optimizer import Optimizer, OptimizerKind, decay_groups

__all__ = ["ADAMW", "AdamW", "build_adamw"]


def build_adamw(model: TorchModule, *, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """AdamW; matrices (the embedding among them) decay, vectors (norms) do not.

    The learning rate is set at every step from `lr_at`, so none is given here.
    """
    return AdamW(decay_groups(model.parameters(), weight_decay), betas=betas)


class AdamW(Optimizer, torch.optim.AdamW):
    """`torch.optim.AdamW(groups, fused=True)`, to the bit: by the function that it is made of."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(groups, lr=0.0, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = self.new_state(parameter)
            states = [self.state[p] for p in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A step count, and two moments of the parameter's shape."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def _build(model: LanguageModel, train: TrainConfig) -> AdamW:
    # In float64 (as `prove` computes the updates of any recipe) the moments are float64 too.
    if train.optimizer_dtype == "bfloat16" and train.dtype != "float64":
        from pertoken.training.optimizers.adamw_bfloat16 import AdamWBfloat16

        groups = decay_groups(model.parameters(), train.weight_decay)
        return AdamWBfloat16(groups, betas=train.betas, seed=train.seed)
    return build_adamw(model, weight_decay=train.weight_decay, betas=train.betas)


ADAMW = OptimizerKind("adamw", build=_build, state_numbers=2)
