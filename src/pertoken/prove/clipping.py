"""What reaches the optimizer: gradients unscaled, then clipped by their true norm."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pertoken.data.batch.share import Share
from pertoken.engines.choose import choose_engine
from pertoken.model.protocol import LanguageModel
from pertoken.prove.case import EXACT, FLOAT64, Case
from pertoken.prove.plain_update import clip_factor
from pertoken.prove.report import Comparison, Gradient, Result, compare, largest_error
from pertoken.training.precision import Precision
from pertoken.training.step import StepMetrics, TrainState, train_step

__all__ = ["CLIPPING_CLASSES", "float16"]

_NORM_ERROR = 1e-6  # relative; float32 rounds off a tenth of it in each entry that is clipped
_MOST_OVERFLOWS = 40  # of float16's loss scale, each of which halves it
_FAR_BELOW = 100.0  # the norm of all samples: the norm of two of them, which are clipped to it, may be smaller
_FLOAT16_FACTOR = 4.0  # a step may round four times as badly as the plain computation does in float16


class _Recorder(torch.optim.SGD):
    """Tells what gradients it is given, and updates nothing."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self.given: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.given = {name: p.grad.clone() for p, name in self._names.items() if p.grad is not None}


def _step(
    case: Case,
    state: TrainState,
    max_norm: float,
    unclipped: dict[str, Tensor] | None = None,
    share: Share | None = None,
) -> StepMetrics:
    """One step over `share`, or all chosen samples in several micro-batches; `unclipped` gets the true gradients."""
    share = case.split() if share is None else share

    def keep() -> None:
        if unclipped is not None:
            grads = {name: p.grad for name, p in state.model.named_parameters() if p.grad is not None}
            unclipped.update({name: gradient.clone() for name, gradient in grads.items()})

    return train_step(
        state,
        share,
        lr=0.0,
        max_norm=max_norm,
        on_gradients=keep,
    )


def under_a_loss_scale(name: str, case: Case) -> Result:
    """What the optimizer is given, twice, clipped to half the norm; the loss scale doubles in between."""
    max_norm = case.reference.norm / 2
    optimizer = _Recorder(case.model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    state = TrainState(case.model, optimizer, scaler, FLOAT64, objective=case.objective)
    factor = clip_factor(case.reference.norm, max_norm)
    expected = Gradient(case.reference.loss, {n: g * factor for n, g in case.reference.gradients.items()})
    found = []
    for _ in range(2):
        metrics = _step(case, state, max_norm)
        of_step = compare(Gradient(metrics.loss_sum / metrics.num_tokens, optimizer.given), expected)
        found.append(replace(of_step, norm_ratio=metrics.grad_norm / case.reference.norm))
    worse = max(found, key=lambda c: max(c.gradient_error, abs(c.norm_ratio - 1)))
    return Result.judge(name, "float64", EXACT, worse, f"norm {case.reference.norm:.3g} clipped to {max_norm:.3g}")


def in_the_runs_dtype(name: str, case: Case) -> Result:
    """The reported norm and the clipped gradients, against the very gradients that the step has formed."""
    dtype = case.train.dtype
    precision = Precision(dtype, torch.device("cpu"))
    model = copy.deepcopy(case.model).to(precision.parameter_dtype)
    how = "plain" if case.train.engine == "plain" else "auto"
    choice = choose_engine(model, how, dtype=dtype, device=precision.device, total_steps=1)
    kernels = choice.kernels(dtype, precision.device)
    optimizer, max_norm = _Recorder(model), case.reference.norm / _FAR_BELOW
    unclipped: dict[str, Tensor] = {}
    state = TrainState(
        model,
        optimizer,
        precision.new_scaler(),
        precision,
        objective=case.objective,
        kernels=kernels,
        execution=choice.execution,
    )
    two = case.share(token_budget=case.num_inputs, ids=case.all_ids[:2])  # it is their own norm
    metrics = _until_it_updates(case, state, unclipped, two)
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in unclipped.values()))
    factor = clip_factor(norm, max_norm)
    if factor == 1.0:
        return Result(name, dtype, "failed", _NORM_ERROR, note=f"norm {norm:.3g} is not clipped to {max_norm:.3g}")
    errors = {}
    for key, gradient in unclipped.items():
        expected = gradient.double() * factor
        given = optimizer.given.get(key)
        apart = math.inf if given is None else float((given.double() - expected).abs().max())
        errors[key] = apart / (float(expected.abs().max()) or 1.0)
    worst = max(errors, key=errors.__getitem__)
    found = Comparison(errors[worst], worst, metrics.grad_norm / norm, 0.0)
    note = f"norm {norm:.3g} clipped to {max_norm:.3g}; {model.facts.vocab_size:,} tokens in the vocabulary"
    return Result.judge(name, dtype, _NORM_ERROR, found, note)


def _until_it_updates(
    case: Case, state: TrainState, unclipped: dict[str, Tensor], share: Share | None = None
) -> StepMetrics:
    """Steps clipped far below the norm, until float16's loss scale is one under which no gradient overflows."""
    for _ in range(_MOST_OVERFLOWS):
        metrics = _step(case, state, case.reference.norm / _FAR_BELOW, unclipped, share)
        if not metrics.skipped:
            return metrics
    raise ValueError(f"{_MOST_OVERFLOWS} steps, and each was skipped; the last loss scale was {metrics.loss_scale}")


def float16(name: str, case: Case) -> Result:
    """The unscaled gradient, by the run's own loss scale; a step whose gradient overflows changes nothing."""
    precision = Precision("float16", torch.device("cpu"))
    model = copy.deepcopy(case.model).float()
    if problem := _overflow(case, model, precision):
        return Result(name, "float16", "failed", note=problem)
    samples = [case.chosen.samples[i] for i in range(len(case.chosen.samples))]
    with precision.autocast():
        plain = case.plain_gradient(samples, model=model, scale=2.0**12)
    tolerance = _FLOAT16_FACTOR * largest_error(plain, case.reference)
    state = TrainState(model, _Recorder(model), precision.new_scaler(), precision, objective=case.objective)
    unclipped: dict[str, Tensor] = {}  # for clipping would hide a factor that all gradients have in common
    metrics = _until_it_updates(case, state, unclipped)
    found = compare(Gradient(metrics.loss_sum / metrics.num_tokens, unclipped), case.reference)
    found = replace(found, norm_ratio=metrics.grad_norm / case.reference.norm)
    return Result.judge(name, "float16", tolerance, found, f"loss scale {metrics.loss_scale:g}; an overflow is skipped")


def _overflow(case: Case, model: LanguageModel, precision: Precision) -> str | None:
    """What is wrong with a step whose loss scale is far too large."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    optimizer = _Recorder(model)
    metrics = _step(case, TrainState(model, optimizer, scaler, precision, objective=case.objective), 1.0)
    if not metrics.skipped or optimizer.given:
        return f"a gradient of norm {metrics.grad_norm} under a loss scale of 2^60 was not skipped"
    if scaler.get_scale() != 2.0**59:
        return f"after an overflow the loss scale of 2^60 is {scaler.get_scale():g}, not half of it"
    if any(parameter.grad is not None for parameter in model.parameters()):
        return "after an overflow gradients are left"
    return None


CLIPPING_CLASSES: dict[str, Callable[[str, Case], Result]] = {
    "clipping under a loss scale": under_a_loss_scale,
    "norm, in the run's dtype": in_the_runs_dtype,
}
