"""Low precision: not the gradient of one step, but the losses of several."""

from __future__ import annotations

import copy

import numpy as np
import torch

from pertoken.data.batch.share import share_of
from pertoken.engines.choose import choose_engine
from pertoken.prove.case import Case
from pertoken.prove.report import Result
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

__all__ = ["STEPS", "bfloat16"]

STEPS = 20
_MEAN = 1e-3  # nats
_FALL = 0.01  # nats that each step is worth


def bfloat16(name: str, case: Case) -> Result:
    """Twenty steps of the recipe's order by one micro-batch each, and by several: the curves are apart by noise alone.

    "No trend" means that a line through the differences does not rise or fall by more than the bound, or by more than
    three of its own standard errors.
    """
    difference = _curve(case, in_one=False) - _curve(case, in_one=True)
    time = np.linspace(-0.5, 0.5, len(difference))
    mean, drift = float(difference.mean()), float(difference @ time / (time @ time))
    noise = difference - mean - drift * time
    error = float(np.sqrt(noise @ noise / (len(time) - 2) / (time @ time)))
    passed = abs(mean) < _MEAN and abs(drift) < max(_MEAN, 3 * error)
    return Result(
        name,
        "bfloat16",
        "passed" if passed else "failed",
        _MEAN,
        loss_difference=mean,
        note=f"loss apart by {mean:+.1e} nats on average (at most {_MEAN:g}); trend {drift:+.1e} +- {error:.1e}",
    )


def _curve(case: Case, *, in_one: bool) -> np.ndarray:
    """[steps] losses of plain gradient descent in bfloat16, a step of it worth `_FALL` on its own samples.

    Not AdamW's: it divides small gradients by their own size, rounding too. With it, on the same samples over and over,
    two correct splits of a 30M model were 2e-3 nats apart after 20 steps at 2e-5.
    """
    model = copy.deepcopy(case.model).float()
    precision = Precision("bfloat16", torch.device("cpu"))
    how = "plain" if case.train.engine == "plain" else "auto"
    choice = choose_engine(model, how, dtype=precision.dtype, device=precision.device, total_steps=STEPS)
    learning_rate = _FALL / case.reference.norm**2
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    state = TrainState(
        model, optimizer, precision.new_scaler(), precision, objective=case.objective, execution=choice.execution
    )
    losses = []
    for samples in case.later:
        tokens = int(samples.lengths.sum())
        budget = tokens if in_one else max(tokens // 3, int(samples.lengths.max()))
        share = share_of(samples, np.arange(len(samples)), token_budget=budget)
        metrics = train_step(
            state,
            share,
            lr=learning_rate,
            max_norm=0.0,
        )
        losses.append(metrics.loss_sum / metrics.num_tokens)
    return np.array(losses)
