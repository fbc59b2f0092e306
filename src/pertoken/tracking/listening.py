"""A listener whose failure does not end a step: somebody who is told about training must not cost any of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pertoken.runs.summary import Summary
from pertoken.tracking.metrics import GradStats, Listener, Row

__all__ = ["Heard"]


class Heard(Listener):
    """Passes on all that happens to `listener`, until that fails: `problem` is what it raised, and it is told no more.

    KeyboardInterrupt passes: it may be a signal's that came while the listener was at work.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.problem: BaseException | None = None

    def failed(self, problem: BaseException) -> None:
        """Called once, when the listener has failed."""

    def preparing(self, done_bytes: int, total_bytes: int) -> None:
        self._tell(lambda: self._listener.preparing(done_bytes, total_bytes))

    def started(self, summary: Summary) -> None:
        self._tell(lambda: self._listener.started(summary))

    def stepped(self, row: Row, summary: Summary) -> None:
        self._tell(lambda: self._listener.stepped(row, summary))

    def evaluating(self, step: int) -> None:
        self._tell(lambda: self._listener.evaluating(step))

    def saved(self, folder: Path) -> None:
        self._tell(lambda: self._listener.saved(folder))

    def gradients(self, stats: Sequence[GradStats]) -> None:
        self._tell(lambda: self._listener.gradients(stats))

    def message(self, text: str) -> None:
        self._tell(lambda: self._listener.message(text))

    def _tell(self, tell: Callable[[], None]) -> None:
        if self.problem is not None:
            return
        try:
            tell()
        except KeyboardInterrupt:
            raise
        except BaseException as problem:
            self.problem = problem
            self.failed(problem)
