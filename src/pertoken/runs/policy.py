"""What a run decides after a step: whether to evaluate, to save, to stop. Pure functions of what is known then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pertoken.data.batch.order import Step

__all__ = ["Decision", "Requests", "decide", "is_due"]


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
    stops: Literal["done", "signal", "time", "listener"] | None  # why


def is_due(this: Step, interval: int | None) -> bool:
    """Every `interval` steps, or at the end of each epoch where no interval is given."""
    return this.step % interval == 0 if interval else this.last_of_epoch


def decide(
    this: Step, requests: Requests, *, total_steps: int, save_interval: int | None, is_best: bool = False
) -> Decision:
    """After step `this`; `is_best`: its evaluation is the best so far, and the best is kept."""
    stops: Literal["done", "signal", "time", "listener"] | None = None
    if requests.listener_failed:
        stops = "listener"
    elif this.step == total_steps:
        stops = "done"
    elif requests.signal_number is not None:
        stops = "signal"
    elif requests.time_is_up:
        stops = "time"
    save = stops is not None or requests.save or is_best or is_due(this, save_interval)
    return Decision(save, stops)
