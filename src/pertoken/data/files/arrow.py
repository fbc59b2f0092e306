"""Rows of an .arrow, an IPC file or stream, as `datasets` writes them: a record batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pertoken.data.files.columnar import check_columns, rows_of
from pertoken.data.files.rows import BadRow, Record, Span
from pertoken.data.files.source import check_unchanged
from pertoken.errors import DataError
from pertoken.text import reason

__all__ = ["read_arrow"]


def read_arrow(path: Path, span: Span | None, *, is_stream: bool) -> Iterator[Record | BadRow]:
    """A file that is not mapped into memory: it may be cut short while it is read."""
    import pyarrow as pa

    size = path.stat().st_size
    if not size:
        return
    try:
        with pa.OSFile(str(path), "rb") as file:
            line = 0
            for batch in _batches(path, file, is_stream=is_stream):
                read = file.tell() if is_stream else size
                yield from rows_of(str(path), [batch], line, read, line + batch.num_rows)
                line += batch.num_rows
    except MemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        check_unchanged(path, span)
        raise DataError(f"{path}: not a readable Arrow file ({reason(error)})") from None
    check_unchanged(path, span)


def _batches(path: Path, file: Any, *, is_stream: bool) -> Iterator[Any]:
    import pyarrow as pa

    reader: Any = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
    check_columns(path, reader.schema.names)
    if is_stream:
        yield from reader
    else:
        yield from map(reader.get_batch, range(reader.num_record_batches))
