"""Signals, turned into requests that the loop answers between steps."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from pertoken.errors import Interrupted

__all__ = ["StopRequest", "stop_on_signals"]


@dataclass
class StopRequest:
    """Set by signals: finish the step, save, stop (SIGINT, SIGTERM) or go on (SIGUSR1)."""

    signal_number: int | None = None
    save: bool = False


@contextmanager
def stop_on_signals(*, echo_s: float = 0.0) -> Iterator[StopRequest]:
    """Turn signals into a request while inside; a second SIGINT or SIGTERM, more than `echo_s` later, stops at once.

    torchrun passes on to its processes what they have had from the terminal already. Raises Interrupted when stopped at
    once.
    """
    stop = StopRequest()
    first = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.signal_number is None:
            stop.signal_number, first = number, time.monotonic()
        elif time.monotonic() - first >= echo_s:
            raise KeyboardInterrupt

    def handle_save(number: int, frame: FrameType | None) -> None:
        stop.save = True

    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = handle_save
    try:
        previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    except ValueError:  # only the main thread may listen; elsewhere the caller's own handlers stay in charge
        previous = {}
    try:
        yield stop
    except KeyboardInterrupt:
        if stop.signal_number is None:  # not ours
            raise
        name = signal.Signals(stop.signal_number).name
        raise Interrupted(f"stopped at once by a second {name}; nothing more was saved", stop.signal_number) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
