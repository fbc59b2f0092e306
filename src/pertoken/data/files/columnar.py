"""Rows of the record batches that pyarrow reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pertoken.data.files import limits
from pertoken.data.files.nulls import without_nulls
from pertoken.data.files.rows import BadRow, Record, digest_of, not_utf8
from pertoken.errors import DataError
from pertoken.text import names, reason

__all__ = ["check_columns", "rows_of"]


def rows_of(file: str, batches: Iterable[Any], line: int, size: int, rows: int) -> Iterator[Record | BadRow]:
    """The rows behind the row `line`, of a file of `size` bytes and `rows` rows.

    What pyarrow says of a damaged file is raised as it is.
    """
    import pyarrow as pa

    for batch in batches:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        has_large = batch.nbytes > limits.MAX_LINE_BYTES
        for i in range(batch.num_rows):
            line += 1
            if has_large and batch.slice(i, 1).nbytes > limits.MAX_LINE_BYTES:
                yield BadRow(file, line, "row", f"more than {limits.MAX_LINE_BYTES:,} bytes; split the row")
                continue
            try:
                value = {name: column[i].as_py() for name, column in columns.items()}
                raw = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
            except MemoryError:  # pyarrow's is an ArrowException too
                raise
            except UnicodeDecodeError as error:
                yield BadRow(file, line, "row", not_utf8(error, "a text"))
            except (pa.ArrowException, ArithmeticError, RecursionError, ValueError) as error:
                yield BadRow(file, line, "row", f"a value that cannot be read ({reason(error)}); write it as text")
            else:
                value = {name: without_nulls(item) for name, item in value.items()}
                yield Record(file, line, value, digest_of(raw), size * line // max(rows, 1))


def check_columns(path: Path, columns: list[str]) -> None:
    """Raises DataError where a name is not clear."""
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise DataError(f"{path}: columns named twice: {names(twice)}; rename them")
