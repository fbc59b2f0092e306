"""CSV: `out_dir/metrics.csv`, a line per step for spreadsheets.

Columns are the figures of a row that are one number: a figure that a step does not have, or that is not finite, is
empty. Lists (positions, shares of experts) and the losses of sources are in `metrics.jsonl` alone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pertoken.errors import CheckpointError
from pertoken.objective.choose import ROW_TERMS
from pertoken.tracking.lines_file import LinesFile
from pertoken.tracking.rows import StepRow
from pertoken.tracking.run_files import claim, claimed
from pertoken.tracking.trackers.tracker import Opening, Tracker, TrackerKind

__all__ = ["CSV"]

_NAME = "metrics.csv"
_NO_NUMBERS = ("positions", "expert_load", "expert_max_share", "row_terms", "rebuilt", "eval_sources")
_COLUMNS = (*(field.name for field in fields(StepRow) if field.name not in _NO_NUMBERS), *ROW_TERMS)


class _Csv:
    run_id: str | None = None

    def __init__(self, opening: Opening) -> None:
        """Open for appending after `last_step`. Raises CheckpointError where the file is not ours, or unwritable."""
        path = opening.out_dir / _NAME
        self.made: Sequence[Path] = [path]
        try:
            end = _end_of(path, opening) if path.exists() else 0
            claim(opening.out_dir, self.made)  # before it is there, so that no crash leaves it to nobody
            self._file = LinesFile(path, end=end)
            if end == 0:
                self._write(_COLUMNS)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror})") from None

    def log(self, row: StepRow) -> None:
        values = row.to_json()
        self._write([_cell(values.get(column)) for column in _COLUMNS])

    def close(self) -> None:
        self._file.close()

    def _write(self, cells: Sequence[str]) -> None:
        """Raises OSError where the disk refuses; the file ends with a whole line, and is closed."""
        error = self._file.write(_line(cells))
        if error is not None:
            self._file.close()
            raise error


def _end_of(path: Path, opening: Opening) -> int:
    """In bytes, of the line of the last step that the run has saved: what an interrupted run wrote later is dropped."""
    if not path.is_file() or _NAME not in claimed(opening.out_dir):
        raise CheckpointError(f'{path}: not written by this run; move it away, or take "csv" out of log.trackers')
    if not opening.last_step:
        return 0
    with path.open("rb") as file:
        if file.readline().rstrip(b"\r\n") != _line(_COLUMNS):
            raise CheckpointError(f"{path}: line 1: not the columns of this version; move the file away")
        end = file.tell()
        for line in file:
            step = line.partition(b",")[0]
            if not line.endswith(b"\n") or not step.isdigit() or int(step) > opening.last_step:
                break
            end += len(line)
    return end


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)  # null in a row: a figure that is not finite


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(cells)
    return text.getvalue().encode()


def _check() -> None:
    """Nothing is needed."""


def _open(opening: Opening) -> Tracker:
    return _Csv(opening)


CSV = TrackerKind("csv", check=_check, open=_open)
