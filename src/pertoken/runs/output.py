"""What a run writes besides checkpoints: rows, events, trackers. All of it on rank 0 alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from pertoken.tracking.metrics_file import MetricsFile
from pertoken.tracking.reporter import Reporter
from pertoken.tracking.rows import StepRow
from pertoken.tracking.summary import Summary
from pertoken.tracking.trackers import Tracker

__all__ = ["Output"]


@dataclass
class Output:
    """Where rows go. What cannot be written costs no training."""

    reporter: Reporter
    metrics: MetricsFile | None = None
    trackers: dict[str, Tracker] = field(default_factory=dict)

    @property
    def tracker_run_ids(self) -> dict[str, str]:
        return {name: tracker.run_id for name, tracker in self.trackers.items() if tracker.run_id}

    def log(self, row: StepRow, summary: Summary) -> None:
        """The row to everyone who is told."""
        if self.metrics is not None and (error := self.metrics.write(row)) is not None:
            self.reporter.message(
                f"step {row.step}: metrics.jsonl: {error}; its rows are kept until they can be written"
            )
        for name, tracker in list(self.trackers.items()):
            try:
                tracker.log(row)
            except Exception as error:  # whatever a foreign package raises
                del self.trackers[name]
                self.reporter.message(f"step {row.step}: log.trackers: {name} gets no more rows ({error})")
        self.reporter.stepped(row, summary)

    def sync(self) -> None:
        """Make all rows, and events, so far survive a power cut. Raises CheckpointError where a row does not."""
        if self.metrics is not None:
            self.metrics.sync()
        self.reporter.sync()

    def close(self) -> None:
        """The metrics file and the trackers. What a tracker has against it costs nothing any more."""
        if self.metrics is not None:
            self.metrics.close()
        for name, tracker in self.trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self.reporter.message(f"log.trackers: {name} did not close ({error})")
