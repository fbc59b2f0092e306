"""A run under way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.checkpoints.saver import Saver
from pertoken.checkpoints.state import TrainerState
from pertoken.data.store.dataset import Dataset
from pertoken.runs.computation import Computation
from pertoken.runs.output import Output
from pertoken.runs.probe import Probe
from pertoken.runs.spikes import Spikes
from pertoken.tracking.summary import Summary

__all__ = ["Checkpoints", "Run"]


@dataclass
class Checkpoints:
    """What the run saves itself with, and what it has saved."""

    out_dir: Path
    tokenizer: Any
    eos_token_id: int
    saver: Saver
    probe: Probe
    at_start: TrainerState  # recipe, data, versions: what stays as it was when the run started, or was resumed
    last_saved: int | None = None  # a step
    last_folder: Path | None = None


@dataclass
class Run:
    """What computes its steps, what saves them, what writes of them, and what it has to know to decide."""

    computation: Computation
    checkpoints: Checkpoints
    output: Output
    spikes: Spikes
    eval_store: Dataset | None
    summary: Summary
    start_step: int  # the last step done before it
    best_eval_loss: float | None
    evals_without_best: int  # in a row, up to the last one
    started_s: float  # time.monotonic()
    whole_step: int  # the last one with weights, optimizer and row in place, unless the state has changed since

    def can_resume_at(self, step: int) -> bool:
        """Whether the checkpoint of `step` is there, and a run can be resumed from it."""
        saves_optimizer = self.computation.recipe.checkpoint.save_optimizer
        return self.checkpoints.last_saved == step and (saves_optimizer or step == self.start_step)
