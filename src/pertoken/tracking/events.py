"""`events.jsonl`: what happened to a run besides its steps, kept for whoever asks later.

One event a line: `time`, `step`, `kind`, `text`, `fields`. Events are history, so a resume keeps those after its
checkpoint, and says in an event of its own where it continues.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pertoken.tracking.lines_file import LinesFile

__all__ = ["Event", "EventsFile", "Kind", "is_event"]

Kind = Literal[
    "start",  # training begins, or continues: fields say with what
    "resume",  # from which step, and which checkpoint
    "message",  # what the user is told, and has no kind of its own
    "spike",
    "update_skipped",
    "loss_scale_overflow",  # float16
    "memory_halved",  # a smaller budget for micro-batches, since memory ran out
    "best",  # the lowest evaluation loss so far
    "saved",
    "save_failed",
    "signal",
    "end",  # why
]
_KEYS = {"time", "step", "kind", "text", "fields"}


@dataclass(frozen=True)
class Event:
    """One thing that happened."""

    step: int  # the step under way, or the last one done
    kind: Kind
    text: str  # for people; the figures in it are in `fields` too
    fields: dict[str, Any] = field(default_factory=dict)  # JSON
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))  # ISO 8601, UTC

    def to_line(self) -> bytes:
        fields = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in self.fields.items()}
        event = {"time": self.time, "step": self.step, "kind": self.kind, "text": self.text, "fields": fields}
        return json.dumps(event, allow_nan=False).encode()


def is_event(line: bytes) -> bool:
    """Whether a line is one that pertoken, of this or another version, wrote."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(event, dict) and event.keys() >= _KEYS and isinstance(event["fields"], dict)


class EventsFile:
    """The file, opened for appending. What earlier runs wrote stays, but for a last line that a crash has torn."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where `path` cannot be written."""
        if path.exists() and not path.is_file():
            raise OSError("not a plain file")
        self._file = LinesFile(path, end=_end_of_last_line(path))

    def write(self, event: Event) -> OSError | None:
        """Add an event. What the disk refuses waits for the next one; the first error of an outage is returned."""
        return self._file.write(event.to_line())

    def sync(self) -> OSError | None:
        """Make every event so far survive a power cut, if the disk allows it."""
        try:
            self._file.sync()
        except OSError as error:
            return error
        return None

    def close(self) -> None:
        self._file.close()


_BLOCK = 2**16


def _end_of_last_line(path: Path) -> int:
    """In bytes: past the last newline; 0 where there is no file."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, 2)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
