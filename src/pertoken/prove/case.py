"""What every class of ways is about, and the gradient that `train_step` computes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pertoken.data.batch.sample import Sample
from pertoken.data.batch.share import Share, share_of
from pertoken.engines.cuda_graphs import graphs_for
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.protocol import BalanceLoss, LanguageModel, TorchModule
from pertoken.objective.choose import objective_of
from pertoken.objective.terms import Objective
from pertoken.prove.reference import reference_gradient
from pertoken.prove.report import Gradient
from pertoken.prove.samples import Chosen, InMemory
from pertoken.recipe.schema import Recipe
from pertoken.recipe.train import TrainConfig
from pertoken.training.parallel import World, whole
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

__all__ = [
    "EXACT",
    "FLOAT32",
    "FLOAT32_FACTOR",
    "FLOAT64",
    "Case",
    "balance_loss_of",
    "gradient_of_step",
    "set_balance_loss",
]

# Relative, in float64: a million times its rounding, and a ten-millionth of the smallest mistake worth the name.
EXACT = 1e-10
FLOAT64 = Precision("float64", torch.device("cpu"))
FLOAT32 = Precision("float32", torch.device("cpu"))
FLOAT32_FACTOR = 4.0  # a way may round four times as badly as the plain one does in the same precision


@dataclass
class Case:
    """What every class is about."""

    model: LanguageModel  # float64, on the CPU
    chosen: Chosen
    later: tuple[InMemory, ...]  # chosen alike from the recipe's first steps, for training over several of them
    long: Sample | None  # of several blocks of queries; None where the store has none so long
    aux_loss_coef: float  # of the per-document balance loss; 0 without one
    recipe: Recipe
    total_steps: int  # of the recipe's run
    tokenizer: Any
    reference: Gradient  # over all chosen samples, float64
    float32_error: float  # of the plain way in float32, against the reference

    @property
    def train(self) -> TrainConfig:
        return self.recipe.train

    @property
    def all_ids(self) -> np.ndarray:
        return np.arange(len(self.chosen.samples))

    @property
    def num_inputs(self) -> int:
        return int(self.chosen.samples.lengths.sum())

    def share(self, *, token_budget: int, ids: np.ndarray | None = None) -> Share:
        return share_of(self.chosen.samples, self.all_ids if ids is None else ids, token_budget=token_budget)

    @property
    def objective(self) -> Objective:
        return objective_of(self.train)

    def plain_gradient(
        self, samples: Sequence[Sample], *, model: LanguageModel | None = None, scale: float = 1.0
    ) -> Gradient:
        """`reference_gradient` of the run's objective; of the case's own model where none is given."""
        return reference_gradient(
            model or self.model,
            samples,
            aux_loss_coef=self.aux_loss_coef,
            z_loss_coef=self.train.z_loss_coef,
            scale=scale,
        )

    def split(self) -> Share:
        """The step in about three micro-batches."""
        return self.share(token_budget=self.split_budget)

    @property
    def split_budget(self) -> int:
        return max(self.num_inputs // 3, int(self.chosen.samples.lengths.max()))

    @property
    def float32_tolerance(self) -> float:
        return FLOAT32_FACTOR * self.float32_error


def gradient_of_step(
    model: LanguageModel,
    share: Share,
    *,
    precision: Precision,
    world: World | None = None,
    wrapped: TorchModule | None = None,
    execution: Execution = PLAIN,
    objective: Objective,
    graphs: bool = False,
) -> Gradient:
    """What `train_step` would update by (on rank 0 of several). `model` holds the parameters, `wrapped` is called. With
    `graphs` it is the third of three equal steps: the first is computed, the second recorded, the third replayed."""
    vocab_size = model.facts.vocab_size
    for micro_batch in share.micro_batches:
        labels = micro_batch.labels
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
            raise ValueError(f"labels {int(labels.min())} to {int(labels.max())}: not all are tokens")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    state = TrainState(
        wrapped or model,
        optimizer,
        precision.new_scaler(),
        precision,
        world or World(),
        objective=objective,
        execution=execution,
        graphs=graphs_for(model, objective, precision.device, execution, precision.autocast) if graphs else None,
    )
    kept: dict[str, torch.Tensor] = {}

    def keep() -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradient = whole(parameter.grad)  # which every rank must ask for
                if state.world.is_main:
                    kept[name] = gradient.clone()

    for _ in range(3 if graphs else 1):
        metrics = train_step(state, share, lr=0.0, max_norm=0.0, on_gradients=keep)
    return Gradient(metrics.loss_sum / metrics.num_tokens, kept)


def balance_loss_of(model: LanguageModel) -> dict[str, Any]:
    """What of a mixture's objective its saved configuration does not say; nothing for a dense model."""
    balance_loss = model.facts.balance_loss
    return {} if balance_loss is None else asdict(balance_loss)


def set_balance_loss(model: LanguageModel, settings: dict[str, Any]) -> None:
    """Give a model that was read back what `balance_loss_of` told."""
    if settings:
        model.set_balance_loss(BalanceLoss(**settings))
