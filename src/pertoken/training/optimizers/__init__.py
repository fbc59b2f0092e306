"""Optimizers. One is a file of this package and a line of `OPTIMIZERS` in `recipe/homes.py`."""

from __future__ import annotations

from pertoken.model.protocol import LanguageModel
from pertoken.recipe.homes import OPTIMIZERS, at_home
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers.optimizer import Optimizer, OptimizerKind

__all__ = ["Optimizer", "OptimizerKind", "build_optimizer", "optimizer_kind"]


def optimizer_kind(name: str) -> OptimizerKind:
    """That of `train.optimizer`."""
    kind: OptimizerKind = at_home(OPTIMIZERS[name].home)
    return kind


def build_optimizer(model: LanguageModel, train: TrainConfig) -> Optimizer:
    """The recipe's. Its learning rates are set at every step, by `set_lr`."""
    return optimizer_kind(train.optimizer).build(model, train)
