"""`metrics.jsonl`: a row per step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from pertoken.errors import CheckpointError
from pertoken.files import free_name, write_whole
from pertoken.tracking.ledger import Ledger, lines_of, mend, parsed, ranges
from pertoken.tracking.lines_file import LinesFile
from pertoken.tracking.rows import StepRow
from pertoken.tracking.run_files import claim

__all__ = ["MetricsFile"]


class MetricsFile:
    """`metrics.jsonl`: a row per step, in order, none torn and none twice. Row N is line N."""

    def __init__(self, path: Path, *, last_step: int, ledger: Ledger | None = None) -> None:
        """Open for appending after `last_step`: whatever follows its row is dropped.

        `ledger` knows the rows up to `last_step`. Rows that are not as the run wrote them are rebuilt from it, what it
        does not know is marked `"lost": true`, the file as it was is kept aside, and `remark` says so.
        Raises CheckpointError where the file cannot be written.
        """
        self._path = path
        self.ledger = Ledger() if ledger is None else ledger
        self.remark: str | None = None
        try:
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path}: not a plain file; move it away")
            end = self._end_of_row(last_step)
            if end is None:
                end = self._mend(last_step)
            self._file = LinesFile(path, end=end)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None

    def _end_of_row(self, last_step: int) -> int | None:
        """In bytes; None where not every row up to it is as the run wrote it."""
        lines, known = lines_of(self._path), len(self.ledger)
        end = self.ledger.bytes_of(lines)
        for step in range(known + 1, last_step + 1):  # saved by a version that kept no ledger
            line = next(lines, b"")
            row = parsed(line)
            if end is None or row is None or row["step"] != step or line != line.strip() + b"\n":
                return None
            self.ledger.add(StepRow.from_json(row), line)
            end += len(line)
        return end

    def _mend(self, last_step: int) -> int:
        """Write the file anew. Returns its size."""
        mended = mend(self._path, self.ledger, last_step)
        aside = _kept_aside(self._path)
        content = b"".join(mended.lines)
        write_whole(self._path, content)
        said = [f"{self._path}: not as the run wrote it"]
        if mended.rebuilt:
            said.append(f"rows of steps {ranges(mended.rebuilt)} rebuilt from the checkpoint, without timings")
        if mended.lost:
            said.append(f"rows of steps {ranges(mended.lost)} are lost")
        if not mended.rebuilt and not mended.lost:
            said.append("every row was there and is back on its line")
        if aside is not None:
            claim(self._path.parent, [aside])
            said.append(f"the file as it was is {aside.name}")
        self.remark = "; ".join(said)
        return len(content)

    def write(self, row: StepRow) -> OSError | None:
        """Add a row. Where the disk does not take it, it is kept and written with the next one; the error is returned
        for the first of them."""
        line = json.dumps(row.to_json(), allow_nan=False).encode()
        self.ledger.add(row, line)
        return self._file.write(line)

    def sync(self) -> None:
        """Make every row so far survive a power cut. Raises CheckpointError where one is not even written."""
        try:
            self._file.sync()
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: could not be written ({error}); without its rows a checkpoint could not be "
                "resumed. Free space"
            ) from None

    def close(self) -> None:
        self._file.close()


def _kept_aside(path: Path) -> Path | None:
    """The content of `path` under a new name beside it; None where there is none. `path` stays until it is replaced."""
    if not path.exists() or not path.stat().st_size:
        return None
    aside = free_name(path, "damaged")
    try:
        os.link(path, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, aside)
    return aside
