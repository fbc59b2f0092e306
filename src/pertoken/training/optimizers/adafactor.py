"""Adafactor (Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018), by torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pertoken.model.protocol import LanguageModel
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers.optimizer import Optimizer, OptimizerKind, decay_groups

__all__ = ["ADAFACTOR", "Adafactor"]


class Adafactor(Optimizer, torch.optim.Adafactor):
    """`torch.optim.Adafactor` with its defaults. For a matrix W [A, B] with gradient G, at its update t:

        beta = t^-0.8
        R <- (1 - beta) R + beta * (mean of G^2 over each row)       [A, 1]
        C <- (1 - beta) C + beta * (mean of G^2 over each column)    [1, B]
        U = G / sqrt(R C / mean(R))
        W <- (1 - eta * weight_decay) W - min(eta, 1 / sqrt(t)) * max(0.001, rms(W)) * U / max(1, rms(U))

    A vector keeps the whole of its squares. The learning rate eta is relative to the size of a parameter, so it is some
    ten times AdamW's. R and C are of whole matrices: rows on several ranks (FSDP2) would each have their own.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, lr=0.0)

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """An update count on the host, and R and C of a matrix, or the squares of a vector."""
        count = torch.zeros((), dtype=torch.float32)
        if parameter.ndim < 2:
            return {"step": count, "variance": torch.zeros_like(parameter)}
        *outer, rows, columns = parameter.shape
        return {
            "step": count,
            "row_var": parameter.new_zeros((*outer, rows, 1)),
            "col_var": parameter.new_zeros((*outer, 1, columns)),
        }


def _build(model: LanguageModel, train: TrainConfig) -> Adafactor:
    return Adafactor(decay_groups(model.parameters(), train.weight_decay))


ADAFACTOR = OptimizerKind("adafactor", build=_build, state_numbers=0)
