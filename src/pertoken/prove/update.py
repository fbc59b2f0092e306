"""Two updates of the weights by the training loop's own `update`, against the textbook's in float64.

The first takes all chosen samples, the second every other one, so that its gradient is another. Their step numbers are
the warm-up's last and the next, where the schedule bends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pertoken.data.batch.order import Step
from pertoken.data.store.dataset import Dataset
from pertoken.model.protocol import LanguageModel
from pertoken.prove.case import EXACT, FLOAT64, Case
from pertoken.prove.plain_update import (
    UPDATE_ERROR,
    Expected,
    PlainOptimizer,
    clip_factor,
    roles_of,
    scheduled_lr,
    update_error,
    warm_steps_of,
    why_not_proved,
)
from pertoken.prove.report import Result, Verdict
from pertoken.prove.samples import InMemory
from pertoken.recipe.schema import Recipe
from pertoken.recipe.train import TrainConfig
from pertoken.runs.computation import Computation, update
from pertoken.tracking.reporter import Reporter
from pertoken.training.optimizers import build_optimizer
from pertoken.training.parallel import whole
from pertoken.training.schedule import count_warmup_steps, lr_at
from pertoken.training.step import TrainState

__all__ = ["UPDATE_CLASSES", "Planned", "judge_updates", "named", "plan_updates", "updates_of", "with_settings"]

_MOST_STEPS = 5_000  # whose learning rates are compared
_LR_ERROR = 1e-12  # of the peak; the two formulas round differently, and near a rate of 0 that is all there is


@dataclass(frozen=True)
class Planned:
    """One step of the two, and what must come of it."""

    number: int
    ids: tuple[int, ...]  # of the chosen samples
    lr: float
    peak: float  # of the schedule
    max_norm: float
    norm: float  # before clipping
    loss: float
    changes: dict[str, Expected]  # on rank 0


_Between = Callable[[LanguageModel, TrainState], tuple[LanguageModel, TrainState]]


@dataclass(frozen=True)
class Taken:
    """What came of it. `changes` are rank 0's alone."""

    lr: float
    norm: float
    loss: float
    changes: dict[str, Tensor]


def plan_updates(case: Case, *, clipped: bool) -> list[Planned]:
    """Both steps. The recipe's own `grad_clip` is used where it clips, or does not, as asked."""
    max_norm = _max_norm(case, clipped=clipped)
    count, warm = len(case.chosen.samples), max(1, warm_steps_of(case.train, case.total_steps))
    numbers = (warm, warm + 1) if warm < case.total_steps else (1, case.total_steps)
    optimizer = PlainOptimizer(case.train, roles_of(case.model, case.train))
    start = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    planned: list[Planned] = []
    for number, ids in zip(numbers, (range(count), range(0, count, 2)), strict=True):
        gradient = case.reference
        if planned:
            samples = [case.chosen.samples[i] for i in ids]
            gradient = case.plain_gradient(samples)
        weights = {name: p.detach() for name, p in case.model.named_parameters()}
        lr = scheduled_lr(number, case.train, case.total_steps)
        factor = clip_factor(gradient.norm, max_norm)
        changes = optimizer.changes(weights, gradient.gradients, lr=lr, factor=factor)
        peak = case.train.learning_rate or 0.0
        planned.append(Planned(number, tuple(ids), lr, peak, max_norm, gradient.norm, gradient.loss, changes))
        with torch.no_grad():
            for name, expected in changes.items():
                weights[name].add_(expected.change)
    case.model.load_state_dict(start, strict=False)
    return planned


def _max_norm(case: Case, *, clipped: bool) -> float:
    asked, norm = case.train.grad_clip, case.reference.norm
    if clipped:
        return asked if 0 < asked < 0.9 * norm else norm / 4
    return asked if asked == 0 or asked > 4 * norm else 4 * norm


def with_settings(recipe: Recipe, **train: Any) -> Recipe:
    """The recipe with other settings under [train]."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def named(train: TrainConfig) -> str:
    """The optimizer that is proved, and what of the run's is not."""
    if train.optimizer_dtype == "float32":
        return train.optimizer
    return f"{train.optimizer} without its moments' rounding to {train.optimizer_dtype}"


def updates_of(
    recipe: Recipe,
    planned: Sequence[Planned],
    samples: InMemory,
    model: LanguageModel,
    state: TrainState,
    *,
    total_steps: int,
    token_budget: int,
    between: _Between = lambda model, state: (model, state),
) -> list[Taken]:
    """The loop's own updates of `model`; `between` may replace model and state after the first."""
    taken: list[Taken] = []
    for step in planned:
        if taken:
            model, state = between(model, state)
        before = _weights(model, state)
        settings = with_settings(recipe, dtype="float64", grad_clip=step.max_norm)
        store = cast(Dataset, samples)
        computation = Computation(settings, model, state, store, total_steps, token_budget, Reporter())
        ids = np.array(step.ids)
        row = update(computation, Step(step.number, 1, ids, 0, len(ids), False), skips=lambda norm: False)
        after = _weights(model, state)
        changes = {name: after[name] - before[name] for name in after}
        taken.append(Taken(row.lr, row.grad_norm, row.loss, changes))
    return taken


def _weights(model: LanguageModel, state: TrainState) -> dict[str, Tensor]:
    weights = {}
    for name, parameter in model.named_parameters():
        full = whole(parameter.detach())  # which every rank must ask for
        if state.world.is_main:
            weights[name] = full.clone()
    return weights


def judge_updates(name: str, taken: Sequence[Taken], planned: Sequence[Planned], note: str) -> Result:
    """The worse of the two steps."""
    of_steps = []
    for got, expected in zip(taken, planned, strict=True):
        error, worst = update_error(got.changes, expected.changes)
        if not abs(got.lr - expected.lr) <= _LR_ERROR * expected.peak:
            error, worst = abs(got.lr - expected.lr) / expected.peak, f"the learning rate of step {expected.number}"
        of_steps.append((error, worst, got.norm / expected.norm, (got.loss - expected.loss) / max(1.0, expected.loss)))
    error, worst, *_ = max(of_steps, key=lambda step: step[0])
    ratio = max((step[2] for step in of_steps), key=lambda ratio: abs(ratio - 1))
    difference = max((step[3] for step in of_steps), key=abs)
    passed = error <= UPDATE_ERROR and abs(ratio - 1) <= EXACT and abs(difference) <= EXACT  # not so for NaN
    verdict: Verdict = "passed" if passed else "failed"
    return Result(name, "float64", verdict, UPDATE_ERROR, error, worst, ratio, difference, note)


def _updated(name: str, case: Case, *, clipped: bool) -> Result:
    why = why_not_proved(case.train)
    if why is not None:
        return Result(name, "float64", "skipped", note=why)
    planned = plan_updates(case, clipped=clipped)
    optimizer = build_optimizer(case.model, with_settings(case.recipe, dtype="float64").train)
    # A scale that grows after each step: one that is out of date is off by a factor of two.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, enabled=clipped)
    state = TrainState(case.model, optimizer, scaler, FLOAT64, objective=case.objective)
    start = {key: p.detach().clone() for key, p in case.model.named_parameters()}
    try:
        taken = updates_of(
            case.recipe,
            planned,
            case.chosen.samples,
            case.model,
            state,
            total_steps=case.total_steps,
            token_budget=case.split_budget,
        )
    finally:
        case.model.load_state_dict(start, strict=False)
    first, second = planned
    limit = f"clipped to {first.max_norm:.3g}" if clipped else "not clipped"
    own = "" if first.max_norm == case.train.grad_clip else ", not the recipe's limit"
    what = f"{named(case.train)}, steps {first.number} and {second.number}"
    return judge_updates(name, taken, planned, f"{what}; norm {first.norm:.3g} {limit}{own}")


def update_clipped(name: str, case: Case) -> Result:
    return _updated(name, case, clipped=True)


def update_not_clipped(name: str, case: Case) -> Result:
    return _updated(name, case, clipped=False)


def learning_rates(name: str, case: Case) -> Result:
    """The schedule of the whole run."""
    train, total = case.train, case.total_steps
    steps = np.unique(np.linspace(1, total, min(total, _MOST_STEPS)).astype(int)).tolist()
    warm = count_warmup_steps(total, warmup_steps=train.warmup_steps, warmup_ratio=train.warmup_ratio)
    worst, at = 0.0, 1
    for step in steps:
        got = lr_at(
            step,
            peak=train.learning_rate or 0.0,
            warmup_steps=warm,
            total_steps=total,
            schedule=train.schedule,
            min_lr_ratio=train.min_lr_ratio,
            decay_ratio=train.decay_ratio,
        )
        expected = scheduled_lr(step, train, total)
        error = abs(got - expected) / (train.learning_rate or 1.0)
        if not error <= worst:
            worst, at = (error, step) if math.isfinite(error) else (math.inf, step)
    passed = worst <= _LR_ERROR
    note = f"{train.schedule}, {len(steps):,} of {total:,} steps" if passed else f"step {at} of {total:,}"
    return Result(name, "float64", "passed" if passed else "failed", _LR_ERROR, worst, f"step {at}", note=note)


UPDATE_CLASSES: dict[str, Callable[[str, Case], Result]] = {
    "learning rate": learning_rates,
    "update, clipped": update_clipped,
    "update, not clipped": update_not_clipped,
}
