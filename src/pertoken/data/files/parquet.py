"""Rows of a .parquet, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pertoken.data.files.columnar import check_columns, rows_of
from pertoken.data.files.rows import BadRow, Record, Span
from pertoken.data.files.source import check_unchanged
from pertoken.errors import DataError
from pertoken.text import reason

__all__ = ["parquet_file", "read_parquet"]

_BATCH_BYTES = 32 << 20  # of the rows that are read at a time
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20


def read_parquet(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    import pyarrow as pa

    size, table = path.stat().st_size, parquet_file(path)
    if table is None:
        return
    groups = range(*span.groups) if span and span.groups else range(table.num_row_groups)
    line, rows = span.line - 1 if span else 0, table.metadata.num_rows
    last = line + sum(table.metadata.row_group(i).num_rows for i in groups)
    try:
        for row in rows_of(str(path), _batches(table, groups), line, size, rows):
            line = row.line
            yield row
    except MemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        check_unchanged(path, span)
        raise _not_parquet(path, error) from None
    check_unchanged(path, span)
    if line != last:
        raise DataError(f"{path}: holds {line} rows where its footer says {last}; write it again")


def _batches(table: Any, groups: range) -> Iterator[Any]:
    for group in groups:
        rows = _batch_rows(table.metadata.row_group(group))
        yield from table.iter_batches(batch_size=rows, row_groups=[group])


def _batch_rows(group: Any) -> int:
    """How many rows of this row group are some _BATCH_BYTES at most.

    The group's size counts a text of a dictionary once, however many rows have it, so each row is taken to have all of
    the dictionary.
    """
    row_bytes = group.total_byte_size / max(1, group.num_rows)
    for column in map(group.column, range(group.num_columns)):
        if column.has_dictionary_page:
            share = (column.data_page_offset - column.dictionary_page_offset) / max(1, column.total_compressed_size)
            row_bytes += max(0, share * column.total_uncompressed_size)
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(1, row_bytes))))


def parquet_file(path: Path) -> Any:
    """The opened pyarrow.parquet.ParquetFile; None for a file of no bytes. Raises DataError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Otherwise all of a row group is read at once.
        streamed: dict[str, Any] = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES}
        table = pq.ParquetFile(path, **streamed) if path.stat().st_size else None
        columns = table.schema_arrow.names if table else []
    except (pa.ArrowException, ValueError) as error:
        raise _not_parquet(path, error) from None
    check_columns(path, columns)
    return table


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({reason(error)})")
