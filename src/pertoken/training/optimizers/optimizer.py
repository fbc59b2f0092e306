"""What all optimizers have: a record, the names and shapes of their state, weight-decay groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.model.protocol import LanguageModel
from pertoken.recipe.train import TrainConfig

__all__ = ["Optimizer", "OptimizerKind", "decay_groups"]


class Optimizer(torch.optim.Optimizer):
    """What every optimizer here is: torch's, with a state that is known before the first step.

    Overridden are also the two methods of every optimizer in torch that import its compiler, a second's work, only to
    keep it away.
    """

    def new_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of `parameter` before its first update, which is not kept: names, shapes, and how it is sharded.

        A checkpoint's state must have the same names and shapes to be read back.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for key, value in self.defaults.items():
            param_group.setdefault(key, value)
        self.param_groups.append(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        assert set_to_none
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


@dataclass(frozen=True)
class OptimizerKind:
    """One kind of optimizer. What a recipe must know of it is an `OptimizerHome` (`recipe/homes.py`)."""

    name: str  # as in `train.optimizer`
    build: Callable[[LanguageModel, TrainConfig], Optimizer]
    state_numbers: int  # that it keeps of each number of a parameter: at least
    item_bytes: float | None = None  # of one of these; None: as in the parameter's dtype, or `train.optimizer_dtype`
    check_installed: Callable[[], object] = lambda: None  # raises RecipeError where a library is missing


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trainable `parameters`: matrices (the embedding among them) decay, vectors (norms) do not."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
