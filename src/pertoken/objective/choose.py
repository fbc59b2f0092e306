"""From a recipe to the objective of its run."""

from __future__ import annotations

from pertoken.objective.row_terms import RowFunction, RowTerm
from pertoken.objective.terms import Objective
from pertoken.objective.z_loss import z_loss
from pertoken.recipe.train import TrainConfig

__all__ = ["ROW_TERMS", "objective_of"]

ROW_TERMS: dict[str, RowFunction] = {"z_loss": z_loss}  # the recipe key is train.NAME_coef


def objective_of(train: TrainConfig) -> Objective:
    """The terms whose coefficient is not 0. One of 0 is left out, and costs nothing."""
    coefficients = {name: float(getattr(train, f"{name}_coef")) for name in ROW_TERMS}
    return Objective(tuple(RowTerm(name, ROW_TERMS[name], c) for name, c in coefficients.items() if c))
