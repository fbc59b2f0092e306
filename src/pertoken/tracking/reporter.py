"""What a run reports: to its listeners, and into `events.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pertoken.tracking.events import Event, EventsFile, Kind
from pertoken.tracking.listener import Heard, Listener
from pertoken.tracking.rows import StepRow
from pertoken.tracking.summary import Summary
from pertoken.training.gradient_stats import GradStats

__all__ = ["Reporter"]


class Reporter(Listener):
    """A listener that tells all `listeners`, and where it `keeps_events` writes them: rank 0 does, and no replay.

    One listener's failure is kept from the others, and it is told no more. Before training it is raised at once; from
    `defer_problems` on the loop asks for the first `problem` after each step.
    """

    def __init__(self, listeners: Sequence[Listener] = (), *, keeps_events: bool = False) -> None:
        self.step = 0  # the step under way, or the last one done
        self._listeners = [Heard(listener) for listener in listeners]
        self._deferred = False
        self._events: EventsFile | None = None
        self._before_open: list[Event] | None = [] if keeps_events else None  # what happens before there is a folder

    @property
    def problem(self) -> BaseException | None:
        """What the first listener that failed has raised."""
        return next((heard.problem for heard in self._listeners if heard.problem is not None), None)

    def defer_problems(self) -> None:
        """From now on a listener's failure is not raised here."""
        self._deferred = True

    def keep_events(self, path: Path) -> None:
        """Write events, those so far too, to `path`. Where that cannot be opened it is said, and costs no training."""
        if self._before_open is None:
            return None
        early, self._before_open = self._before_open, None
        try:
            self._events = EventsFile(path)
        except OSError as error:
            return self.message(f"{path}: cannot be written ({error.strerror or error}); events are not kept")
        for event in early:
            self._keep(event)
        return None

    def report(self, kind: Kind, text: str, *, told: bool = True, **fields: Any) -> None:
        """An event at this step. Unless it is not to be `told`, it is a message too."""
        event = Event(self.step, kind, text, fields)
        self._keep(event)
        self._tell_all(lambda listener: listener.event(event))
        if told:
            self._tell_all(lambda listener: listener.message(text))

    def sync(self) -> None:
        """Before a checkpoint is written: let the events so far survive a power cut too."""
        if self._events is not None:
            self._events.sync()

    def close(self) -> None:
        """Keep no more events."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def downloading(self, done_bytes: int, total_bytes: int) -> None:
        self._tell_all(lambda listener: listener.downloading(done_bytes, total_bytes))

    def preparing(self, done_bytes: int, total_bytes: int) -> None:
        self._tell_all(lambda listener: listener.preparing(done_bytes, total_bytes))

    def needs(self, memory: str) -> None:
        self._tell_all(lambda listener: listener.needs(memory))

    def started(self, summary: Summary) -> None:
        self._tell_all(lambda listener: listener.started(summary))

    def stepped(self, row: StepRow, summary: Summary) -> None:
        self._tell_all(lambda listener: listener.stepped(row, summary))

    def evaluating(self, step: int) -> None:
        self._tell_all(lambda listener: listener.evaluating(step))

    def saved(self, folder: Path) -> None:
        self._tell_all(lambda listener: listener.saved(folder))

    def gradients(self, stats: Sequence[GradStats]) -> None:
        self._tell_all(lambda listener: listener.gradients(stats))

    def message(self, text: str) -> None:
        self.report("message", text)

    def event(self, event: Event) -> None:
        self._keep(event)
        self._tell_all(lambda listener: listener.event(event))

    def _keep(self, event: Event) -> None:
        if self._before_open is not None:
            self._before_open.append(event)
        elif self._events is not None and (error := self._events.write(event)) is not None:
            self.message(f"events.jsonl: {error}; its events are kept until they can be written")

    def _tell_all(self, tell: Callable[[Listener], None]) -> None:
        for heard in self._listeners:
            tell(heard)
        if not self._deferred and (problem := self.problem) is not None:
            raise problem
