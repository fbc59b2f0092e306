"""Signals, turned into requests that the loop answers between steps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pertoken.errors import Interrupted

__all__ = ["StopRequest", "stop_on_signals"]

_STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SAVING = [getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name)]


class StopRequest:
    """Set by signals: finish the step, save, stop (SIGINT, SIGTERM, SIGHUP) or continue (SIGUSR1)."""

    def __init__(self, *, echo_s: float) -> None:
        self.signal_number: int | None = None
        self.save = False
        self.training = False
        self._echo_s = echo_s
        self._urged_s: float | None = None  # when the first SIGINT or SIGTERM came
        self._before: dict[int, Any] = {}

    def start_training(self) -> None:
        """There will be steps to save: from now on a signal to stop is a request."""
        self.training = True
        for number in _STOPPING:
            self._listen(number, self._asked_to_stop)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        first = self.signal_number is None
        self.signal_number = self.signal_number or number
        if not self.training:
            raise KeyboardInterrupt
        if number == getattr(signal, "SIGHUP", None):  # a terminal that closes sends it more than once
            return
        urged_s, now_s = self._urged_s, time.monotonic()
        self._urged_s = now_s if urged_s is None else urged_s
        if not first and urged_s is not None and now_s - urged_s >= self._echo_s:
            raise KeyboardInterrupt

    def _asked_to_save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    def _listen(self, number: int, handler: Any) -> None:
        """Where that can be: what was ignored from the start, as SIGHUP is under nohup, stays ignored. SIGINT does not:
        scripts ignore it for all that they start in the background."""
        before = signal.getsignal(number)
        if before is signal.SIG_IGN and number != signal.SIGINT:
            return
        try:
            signal.signal(number, handler)
        except ValueError:  # only the main thread may listen; elsewhere the caller's own handlers stay in charge
            return
        self._before.setdefault(number, before)

    def _prepare(self, *, waits: bool) -> None:
        for number in _STOPPING:
            self._listen(number, signal.SIG_DFL if waits else self._asked_to_stop)
        for number in _SAVING:
            self._listen(number, self._asked_to_save)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # one that Python does not know
                signal.signal(number, handler)


def _listening_already() -> StopRequest | None:
    for number in (*_STOPPING, *_SAVING):
        owner = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(owner, StopRequest):
            return owner
    return None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn signals into a request while inside. One to stop does so at once before `start_training`, and afterwards
    where it is a second SIGINT or SIGTERM. Raises Interrupted when stopped at once.

    Inside of another that has not started training, that one's request is used: the command line listens from its
    start. Under torchrun, which passes on to its processes what they have had from the terminal already, a second
    signal counts after five seconds; and ranks that wait for rank 0's preparation are ended by the system meanwhile,
    since no Python runs in them that could answer.
    """
    outer = _listening_already()
    if outer is not None and not outer.training:
        yield outer
        return
    alone, is_main = os.environ.get("WORLD_SIZE", "1") == "1", os.environ.get("RANK", "0") == "0"
    stop = StopRequest(echo_s=0.0 if alone else 5.0)
    try:
        stop._prepare(waits=not alone and not is_main)
        yield stop
    except BaseException as error:
        # Before training, whatever comes of the interrupt: some imports turn it into an error of their own.
        if stop.signal_number is None or (stop.training and not isinstance(error, KeyboardInterrupt)):
            raise
        name = signal.Signals(stop.signal_number).name
        what = f"stopped by {name} before the first step; there is nothing new to save"
        if stop.training:
            what = f"stopped at once by a second {name}; nothing more was saved"
        raise Interrupted(what, stop.signal_number) from None
    finally:
        stop._restore()
