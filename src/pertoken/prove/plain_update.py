"""The recipe's update by the textbook, in float64: schedule, clipping, AdamW, Muon.

Nothing of `training` or of `torch.optim` is used here, so that a mistake there cannot hide. The formulas are those that
the docstrings of `training/optimizers/` and `training/schedule.py` promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal

import torch
from torch import Tensor, nn

from pertoken.model.protocol import LanguageModel
from pertoken.prove.case import EXACT
from pertoken.recipe.train import TrainConfig

__all__ = [
    "UPDATE_ERROR",
    "Expected",
    "PlainOptimizer",
    "clip_factor",
    "roles_of",
    "scheduled_lr",
    "total_steps_of",
    "update_error",
    "warm_steps_of",
    "why_not_proved",
]

_ADAM_EPS = 1e-8
_CLIP_EPS = 1e-6  # added to the norm, so that a zero norm divides nothing
_MOMENTUM = 0.95
_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan et al., "Muon", 2024
_ITERATIONS = 5
# Relative. A hundred times a gradient's: AdamW's second step starts from weights that differ already, by what rounding
# has done to those whose gradients are nearly zero (4e-11 seen in a model of 30M parameters).
UPDATE_ERROR = 1e-8
_WEIGHT_ROUNDING = 2 * torch.finfo(torch.float64).eps


def total_steps_of(train: TrainConfig, num_samples: int) -> int:
    """Of a run over `num_samples` samples an epoch; each epoch's last step takes what is left."""
    return train.max_steps or _rounded_up(Decimal(str(train.epochs)) * math.ceil(num_samples / train.batch_size))


def warm_steps_of(train: TrainConfig, total_steps: int) -> int:
    """How many steps warm up."""
    if train.warmup_ratio is None:
        return train.warmup_steps
    return _rounded_up(Decimal(str(train.warmup_ratio)) * total_steps)


def _rounded_up(number: Decimal) -> int:
    return int(number.to_integral_value(ROUND_CEILING))


def scheduled_lr(step: int, train: TrainConfig, total_steps: int) -> float:
    """The learning rate of step `step`, which counts from 1."""
    assert train.learning_rate is not None, "the recipe fills it in"
    peak, warm = train.learning_rate, warm_steps_of(train, total_steps)
    if step <= warm:
        return peak * (step / warm)
    lowest = train.min_lr_ratio * peak
    done = min(1.0, (step - warm) / max(1, total_steps - warm))
    if train.schedule == "cosine":
        return lowest + (peak - lowest) * math.cos(math.pi * done / 2) ** 2
    if train.schedule == "linear":
        return done * lowest + (1 - done) * peak
    if train.schedule == "wsd":
        decaying, left = max(1.0, train.decay_ratio * total_steps), total_steps - step
        return lowest + (peak - lowest) * min(1.0, left / decaying)
    return peak


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of norm `norm` are multiplied by; `max_norm` 0 means that they are not clipped."""
    return min(1.0, max_norm / (norm + _CLIP_EPS)) if max_norm > 0 else 1.0


def _all_by_adamw(model: LanguageModel) -> dict[str, str]:
    return {name: "decays" if parameter.ndim > 1 else "stays" for name, parameter in model.named_parameters()}


def _matrices_of_blocks_by_muon(model: LanguageModel) -> dict[str, str]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    in_blocks = {id(p) for layer in model.layers for p in layer.parameters()} - embeddings
    roles = _all_by_adamw(model)
    for name, parameter in model.named_parameters():
        router = name.endswith(".mlp.gate.weight")
        if parameter.ndim == 2 and id(parameter) in in_blocks and not router:
            roles[name] = "muon"
    return roles


# By `train.optimizer`: how each parameter is updated, from the model. An optimizer that is missing here can be trained
# with; its updates are not proved.
_ROLES: dict[str, Callable[[LanguageModel], dict[str, str]]] = {
    "adamw": _all_by_adamw,
    "muon": _matrices_of_blocks_by_muon,
}


def why_not_proved(train: TrainConfig) -> str | None:
    """In words, where the updates of the recipe's optimizer have no textbook here; None where they have."""
    return None if train.optimizer in _ROLES else f"no plain update of {train.optimizer} is known"


def roles_of(model: LanguageModel, train: TrainConfig) -> dict[str, str]:
    """Each parameter's: "muon", "decays" (AdamW with weight decay), "stays" (AdamW without)."""
    return _ROLES[train.optimizer](model)


@dataclass(frozen=True)
class Expected:
    """One parameter's change in one step, and what its error is measured by.

    AdamW divides each entry by its own size, so where a gradient is near zero its rounding is all there is to see. Its
    entries are measured by the parameter's largest change plus what a gradient that is off by `EXACT` of its largest
    entry could do to the entry. Muon mixes all entries of a matrix and magnifies at most 500 times, so its matrices are
    measured as a whole, by the norm. Both add what float64 rounds off the weight itself.
    """

    change: Tensor
    scale: Tensor  # of each entry; 0-d: of the norm over all

    def error_of(self, change: Tensor) -> float:
        """Relative; infinite for NaN."""
        apart = change.double() - self.change
        error = float(((apart.norm() if self.scale.ndim == 0 else apart.abs()) / self.scale).max())
        return error if math.isfinite(error) else math.inf


def update_error(changes: dict[str, Tensor], expected: dict[str, Expected]) -> tuple[float, str]:
    """The largest error over parameters, and whose it is."""
    errors = {
        name: one.error_of(changes[name].reshape(one.change.shape)) if name in changes else math.inf
        for name, one in expected.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


@dataclass
class PlainOptimizer:
    """Steps from the start, by `roles` of `roles_of`."""

    train: TrainConfig
    roles: dict[str, str]
    steps: int = 0
    means: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)  # entry of any gradient so far

    def changes(
        self, weights: dict[str, Tensor], gradients: dict[str, Tensor], *, lr: float, factor: float
    ) -> dict[str, Expected]:
        """What the step adds to each of `weights`; `gradients` are multiplied by `factor` first."""
        self.steps += 1
        changes = {}
        for name, unclipped in gradients.items():
            gradient, weight = unclipped * factor, weights[name].double()
            self.largest[name] = max(self.largest.get(name, 0.0), float(gradient.abs().max()))
            if self.roles[name] == "muon":
                changes[name] = self._muon(name, weight, gradient, lr)
            else:
                changes[name] = self._adamw(name, weight, gradient, lr)
        return changes

    def _adamw(self, name: str, weight: Tensor, gradient: Tensor, lr: float) -> Expected:
        """Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2."""
        beta1, beta2 = self.train.betas
        mean = beta1 * self.means.get(name, torch.zeros_like(gradient)) + (1 - beta1) * gradient
        square = beta2 * self.squares.get(name, torch.zeros_like(gradient)) + (1 - beta2) * gradient**2
        self.means[name], self.squares[name] = mean, square
        size = (square / (1 - beta2**self.steps)).sqrt() + _ADAM_EPS
        direction = mean / (1 - beta1**self.steps) / size
        decay = self.train.weight_decay if self.roles[name] == "decays" else 0.0
        change = -lr * direction - lr * decay * weight
        by_rounding = lr * (1 + direction.abs()) / size * self.largest[name] * EXACT
        scale = change.abs().max() + (by_rounding + weight.abs() * _WEIGHT_ROUNDING) / UPDATE_ERROR
        return Expected(change, scale + torch.finfo(torch.float64).tiny)

    def _muon(self, name: str, weight: Tensor, gradient: Tensor, lr: float) -> Expected:
        """Decay and shape factor of Liu et al., "Muon is Scalable for LLM Training", 2025, section 2.2."""
        assert self.train.learning_rate is not None, "the recipe fills it in"
        lr *= (self.train.muon_learning_rate or self.train.learning_rate) / self.train.learning_rate
        mean = _MOMENTUM * self.means.get(name, torch.zeros_like(gradient)) + (1 - _MOMENTUM) * gradient
        self.means[name] = mean
        direction = _orthogonal(_MOMENTUM * mean + (1 - _MOMENTUM) * gradient)
        change = -lr * self.train.weight_decay * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * direction
        scale = change.norm() + weight.norm() * _WEIGHT_ROUNDING / UPDATE_ERROR
        return Expected(change, scale + torch.finfo(torch.float64).tiny)


def _orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz: s -> a s + b s^3 + c s^5 for each singular value s of the matrix over its Frobenius norm."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / max(float(x.square().sum().sqrt()), 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
