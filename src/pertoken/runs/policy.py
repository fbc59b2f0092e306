"""What a run decides after a step: whether to evaluate, to save, to stop. Pure functions of what is known then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pertoken.data.batch.order import Step

__all__ = ["Decision", "Requests", "Stop", "count_evaluations", "decide", "is_due", "is_out_of_patience"]

Stop = Literal["done", "early", "signal", "time", "listener"]
"""Why a run ends. "done" and "early" (`train.early_stopping`) are the ends of a finished run."""


@dataclass(frozen=True)
class Requests:
    """What any rank was asked for: all do the same after the same step."""

    signal_number: int | None = None  # of a signal to stop
    save: bool = False
    time_is_up: bool = False
    listener_failed: bool = False


@dataclass(frozen=True)
class Decision:
    """What becomes of the run after a step. It never stops without saving."""

    save: bool
    stops: Stop | None  # why

    @property
    def is_unfinished(self) -> bool:
        """Whether the run ends here before its end, to be resumed."""
        return self.stops not in (None, "done", "early")


def is_due(this: Step, interval: int | None) -> bool:
    """Every `interval` steps, or at the end of each epoch where no interval is given."""
    return this.step % interval == 0 if interval else this.last_of_epoch


def is_out_of_patience(patience: int | None, evals_without_best: int) -> bool:
    """Whether as many evaluations in a row as `train.early_stopping` says had no better loss than the best."""
    return patience is not None and evals_without_best >= patience


def count_evaluations(total_steps: int, eval_interval: int | None, *, steps_per_epoch: int) -> int:
    """How often a whole run evaluates: every interval or at each epoch's end, and after the last step."""
    return -(-total_steps // (eval_interval or steps_per_epoch))


def decide(
    this: Step,
    requests: Requests,
    *,
    total_steps: int,
    save_interval: int | None,
    is_best: bool = False,
    out_of_patience: bool = False,
) -> Decision:
    """After step `this`; `is_best`: its evaluation is the best so far, and the best is kept; `out_of_patience`: as
    many evaluations in a row as are allowed were not."""
    stops: Stop | None = None
    if requests.listener_failed:
        stops = "listener"
    elif this.step == total_steps:
        stops = "done"
    elif out_of_patience:
        stops = "early"
    elif requests.signal_number is not None:
        stops = "signal"
    elif requests.time_is_up:
        stops = "time"
    save = stops is not None or requests.save or is_best or is_due(this, save_interval)
    return Decision(save, stops)
