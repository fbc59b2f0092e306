"""Who is told what happens in a run: the listener a caller can pass, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pertoken.tracking.events import Event
from pertoken.tracking.rows import StepRow
from pertoken.tracking.summary import Summary
from pertoken.training.gradient_stats import GradStats

__all__ = ["Heard", "Listener"]


class Listener:
    """Told what happens; does nothing. Subclass what you want to hear (the command line prints)."""

    def downloading(self, done_bytes: int, total_bytes: int) -> None: ...

    def preparing(self, done_bytes: int, total_bytes: int) -> None: ...

    def needs(self, memory: str) -> None:
        """What the run takes of memory, in a line, before the model is loaded."""

    def started(self, summary: Summary) -> None: ...

    def stepped(self, row: StepRow, summary: Summary) -> None: ...

    def evaluating(self, step: int) -> None: ...

    def saved(self, folder: Path) -> None: ...

    def gradients(self, stats: Sequence[GradStats]) -> None: ...

    def message(self, text: str) -> None:
        """What the user should know."""

    def event(self, event: Event) -> None:
        """What `events.jsonl` keeps: each message once more, with its kind and figures, and what has no message."""


class Heard(Listener):
    """Passes on all that happens to `listener`, until that fails: `problem` is what it raised, and it is told no more.

    Who is told about training must not cost any of it. KeyboardInterrupt passes: it may be a signal's that came while
    the listener was at work.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.problem: BaseException | None = None

    def failed(self, problem: BaseException) -> None:
        """Called once, when the listener has failed."""

    def downloading(self, done_bytes: int, total_bytes: int) -> None:
        self._tell(lambda: self._listener.downloading(done_bytes, total_bytes))

    def preparing(self, done_bytes: int, total_bytes: int) -> None:
        self._tell(lambda: self._listener.preparing(done_bytes, total_bytes))

    def needs(self, memory: str) -> None:
        self._tell(lambda: self._listener.needs(memory))

    def started(self, summary: Summary) -> None:
        self._tell(lambda: self._listener.started(summary))

    def stepped(self, row: StepRow, summary: Summary) -> None:
        self._tell(lambda: self._listener.stepped(row, summary))

    def evaluating(self, step: int) -> None:
        self._tell(lambda: self._listener.evaluating(step))

    def saved(self, folder: Path) -> None:
        self._tell(lambda: self._listener.saved(folder))

    def gradients(self, stats: Sequence[GradStats]) -> None:
        self._tell(lambda: self._listener.gradients(stats))

    def message(self, text: str) -> None:
        self._tell(lambda: self._listener.message(text))

    def event(self, event: Event) -> None:
        self._tell(lambda: self._listener.event(event))

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
