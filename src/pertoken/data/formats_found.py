"""Which formats the rows have, and which columns that the recipe names were there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pertoken.errors import DataError
from pertoken.text import counted, shown

__all__ = ["FormatsFound"]


class FormatsFound:
    """Rows by format, and rows by column of `data.columns`."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.columns: dict[str, int] = {}

    def add(self, format: str) -> None:
        self.rows[format] = self.rows.get(format, 0) + 1

    def look(self, row: Any, columns: Mapping[str, str]) -> None:
        """Count the columns that a row has, whatever becomes of it."""
        for name in columns.values():
            self.columns[name] = self.columns.get(name, 0) + (isinstance(row, dict) and name in row)

    def extend(self, other: FormatsFound) -> None:
        for mine, others in ((self.rows, other.rows), (self.columns, other.columns)):
            for name, count in others.items():
                mine[name] = mine.get(name, 0) + count

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "columns": self.columns}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> FormatsFound:
        """Raises KeyError, TypeError or ValueError for what `to_json` did not make."""
        found = cls()
        found.rows = {str(name): int(count) for name, count in values["rows"].items()}
        found.columns = {str(name): int(count) for name, count in values["columns"].items()}
        return found

    def notes(self) -> list[str]:
        """One line, the most frequent format first; none for files without keys."""
        by_count = sorted(self.rows.items(), key=lambda item: (-item[1], item[0]))
        shown = [
            f"{name} ({counted(count, 'row') if not i else f'{count:,}'})" for i, (name, count) in enumerate(by_count)
        ]
        return [f"formats: {', '.join(shown)}"] if shown else []

    def require_columns(self) -> None:
        """Raise DataError where the recipe names a column that no row has."""
        missing = [shown(name) for name, count in self.columns.items() if not count]
        if missing:
            raise DataError(f"data.columns: no row has {', '.join(missing)}; write the name as it is in the file")
