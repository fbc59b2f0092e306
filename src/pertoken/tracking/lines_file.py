"""A file that grows by lines, none of which a crash tears for good and none of which a full disk loses."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["LinesFile"]


class LinesFile:
    """Lines after the first `end` bytes of a file. Lines that the disk refuses wait for the next write."""

    def __init__(self, path: Path, *, end: int) -> None:
        """Open for appending: whatever follows byte `end` is dropped. Raises OSError."""
        self._waiting: list[bytes] = []
        self._end = end
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._file.truncate(end)

    def write(self, line: bytes) -> OSError | None:
        """Add a line, given without its newline. Where the disk refuses, the first error of an outage is returned."""
        waited = bool(self._waiting)
        self._waiting.append(line + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            return None if waited else error
        return None

    def _write_waiting(self) -> None:
        content, done = b"".join(self._waiting), 0
        try:
            self._file.seek(self._end)
            while done < len(content):
                done += self._file.write(content[done:])
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)  # no torn line, should the process end here
            raise
        self._end += len(content)
        self._waiting.clear()

    def sync(self) -> None:
        """Make every line so far survive a power cut. Raises OSError where one is not even written."""
        self._write_waiting()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):
            self._write_waiting()
        self._file.close()
