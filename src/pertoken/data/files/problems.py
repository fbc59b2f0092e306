"""Bad rows, told once for each cause."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pertoken.data.files.records import BadRow
from pertoken.errors import DataError

__all__ = ["Cause", "Problems"]

_SHOWN = 20  # causes, and lines of each, that are kept
_NUMBER = re.compile(r"\[\d+\]")


@dataclass
class Cause:
    """Rows of one file with the same problem in the same field, whichever item of a list that is in."""

    first: BadRow
    count: int
    lines: list[int]  # of the first 20

    @property
    def places(self) -> list[str]:
        """`file:line` of the first 20."""
        return [f"{self.first.file}:{line}" for line in self.lines]

    def __str__(self) -> str:
        if self.count == 1:
            return str(self.first)
        more = f" and {self.count - len(self.lines):,} more" if self.count > len(self.lines) else ""
        return f"{self.first} ({'lines' if self.count > 1 else 'line'} {_ranges(self.lines, bool(more))}{more})"


class Problems:
    """Bad rows, counted; the first 20 causes are kept, in the order of the rows, however they are split."""

    def __init__(self) -> None:
        self.count = 0
        self._causes: dict[tuple[str, str, str], Cause] = {}

    def add(self, row: BadRow) -> None:
        self._add(Cause(row, 1, [row.line]))
        self.count += 1

    def _add(self, later: Cause) -> None:
        row = later.first
        key = (row.file, _NUMBER.sub("[]", row.field), row.problem)
        cause = self._causes.get(key)
        if cause is not None:
            cause.count += later.count
            cause.lines += later.lines[: _SHOWN - len(cause.lines)]
        elif len(self._causes) < _SHOWN:
            self._causes[key] = Cause(row, later.count, list(later.lines))

    def extend(self, later: Problems) -> None:
        """Add the bad rows of the rows that follow."""
        for cause in later._causes.values():
            self._add(cause)
        self.count += later.count

    def causes(self) -> list[Cause]:
        """Those that were kept."""
        return list(self._causes.values())

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "causes": [asdict(cause) for cause in self._causes.values()]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Problems:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not make."""
        problems = cls()
        for cause in values["causes"]:
            problems._add(Cause(BadRow(**cause["first"]), int(cause["count"]), list(map(int, cause["lines"]))))
        problems.count = int(values["count"])
        return problems

    def raise_if_any(self, hint: str = "") -> None:
        """Raise DataError with one line per kept cause, the number of the rows that have others, and `hint`."""
        if not self.count:
            return
        lines = [str(cause) for cause in self._causes.values()]
        if others := self.count - sum(cause.count for cause in self._causes.values()):
            lines.append(f"and {others:,} more")
        raise DataError("\n".join([*lines, hint] if hint else lines))


def _ranges(lines: Iterable[int], more: bool) -> str:
    """1-3, 7 and 9; with commas alone where something follows."""
    spans: list[list[int]] = []
    for line in lines:
        if spans and line == spans[-1][1] + 1:
            spans[-1][1] = line
        else:
            spans.append([line, line])
    texts = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last in spans]
    return ", ".join(texts) if more or len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
