"""The words for a step that went wrong: not finite, or an outlier among gradient norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pertoken.data.batch.order import Step
from pertoken.data.batch.pack import collate
from pertoken.data.batch.share import denominators_of
from pertoken.data.store.dataset import Dataset
from pertoken.errors import NonFiniteError, SpikeError
from pertoken.model.protocol import LanguageModel
from pertoken.objective.terms import LossOutput
from pertoken.runs.spikes import Spikes, SpikeStep
from pertoken.tracking.rows import StepRow
from pertoken.training.faults import first_non_finite, is_finite, shown_samples
from pertoken.training.step import NonFiniteStep, TrainState

__all__ = ["non_finite_error", "spike_error", "spike_message"]

_FEW = 5  # samples named in a message that does not end the run


def non_finite_error(
    this: Step,
    problem: NonFiniteStep,
    suspects: np.ndarray,
    state: TrainState,
    model: LanguageModel,
    store: Dataset,
    out_dir: Path,
    saved: str,
) -> NonFiniteError:
    """Which of the `suspects` are non-finite by themselves, and where that shows first. All ranks call it alike.

    `saved` says what became of the step before.
    """
    ids = [int(i) for i in suspects]
    denominators = denominators_of(store, this.sample_ids)

    def run_backward(out: LossOutput) -> None:
        state.backward(out.objective(denominators) * state.world.size)

    gradient_of = run_backward if problem.parameter is not None else None
    verdicts = [
        is_finite(model, collate([store[i]]), state.precision, state.execution, gradient_of, objective=state.objective)
        for i in ids
    ]
    everyones = state.world.gather(verdicts)  # one processor's fault must not lead ranks apart
    guilty = [i for i, finite in zip(ids, map(all, zip(*everyones, strict=True)), strict=True) if not finite]
    lines = [
        f"step {this.step}: {problem}; the weights were not touched and {saved}",
        f"first: {_where(problem, guilty[:1] or ids, state, model, store)}",
        f"{'non-finite by itself' if guilty else 'none is so by itself; its samples'}: "
        f"{shown_samples(store, guilty or ids)}",
        f"look closer with: {_replay(out_dir, this.step)}",
    ]
    return NonFiniteError("\n".join(lines))


def _where(problem: NonFiniteStep, ids: list[int], state: TrainState, model: LanguageModel, store: Dataset) -> str:
    if problem.parameter is not None:
        return f"the gradient of {problem.parameter}; the forward pass is finite"
    if problem.micro_batch is None:
        return "the norm of all gradients; each of them is finite"
    found = first_non_finite(model, collate([store[i] for i in ids]), state.precision)
    first = next((where for where in state.world.gather(found) if where is not None), None)
    return first or "not seen again when the layers run one by one, without kernels"


def spike_error(this: Step, problem: SpikeStep, store: Dataset, out_dir: Path, saved: str) -> SpikeError:
    """`saved` says what became of the step before."""
    return SpikeError(
        f'step {this.step}: {problem}; train.on_spike="stop": the weights were not touched and {saved}'
        f"\nits samples: {shown_samples(store, this.sample_ids.tolist())}\n"
        f"look closer with: {_replay(out_dir, this.step)}\n"
        'continue with resume=True and train.on_spike="skip" or "warn"'
    )


def spike_message(this: Step, spikes: Spikes, row: StepRow, store: Dataset, out_dir: Path) -> str:
    """Of a spike after which the run continues. `spikes` do not remember it yet."""
    what = "update skipped" if row.skipped else "updated all the same"
    return (
        f'step {this.step}: {spikes.describe(row.grad_norm)}; {what} (train.on_spike="{spikes.on_spike}"). '
        f"Its samples: {shown_samples(store, this.sample_ids.tolist(), _FEW)}. "
        f"Look closer with: {_replay(out_dir, this.step)}"
    )


def _replay(out_dir: Path, step: int) -> str:
    """As in Python; the command line has words of its own for it."""
    return f"replay({str(out_dir)!r}, step={step})"
