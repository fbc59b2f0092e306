"""The rows of a data file of any kind, each with the file and line it came from.

A row that cannot be read is a value, `BadRow`, not an exception: what to do about it is the caller's decision, and
several of them can be shown at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pertoken.data.files.arrow import read_arrow
from pertoken.data.files.csv_table import read_csv
from pertoken.data.files.json_array import read_json
from pertoken.data.files.jsonl import read_jsonl
from pertoken.data.files.kinds import FileKind, kind_of
from pertoken.data.files.parquet import read_parquet
from pertoken.data.files.rows import BadRow, Record, Span, empty_file
from pertoken.data.files.text import TextReading, read_text
from pertoken.errors import DataError
from pertoken.files import plain_file

__all__ = ["BadRow", "Record", "Span", "TextReading", "is_text", "read_records"]

AS_FILES = TextReading()


def read_records(
    path: str | Path, span: Span | None = None, reading: TextReading = AS_FILES
) -> Iterator[Record | BadRow]:
    """The rows of one file, or of a span of it, streamed. Blank lines are skipped; their line numbers are not reused.

    Raises DataError where the file itself cannot be read or holds no row. The rows of a span with a hash are made of
    the very bytes that were hashed: DataError at the end of them where the file has changed since.
    """
    path = Path(path)
    empty = True
    try:
        kind = kind_of(plain_file(path))
        for row in _read(path, kind, span, reading):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty and (span is None or not kind.is_cut):
        raise empty_file(path)


def is_text(path: Path) -> bool:
    """Whether a file is plain text. Raises DataError where it cannot be read."""
    try:
        return kind_of(plain_file(path)).format == "text"
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read(path: Path, kind: FileKind, span: Span | None, reading: TextReading) -> Iterator[Record | BadRow]:
    match kind.format:
        case "jsonl":
            return read_jsonl(path, kind.compression, span)
        case "json":
            return read_json(path, kind.compression, span)
        case "csv" | "tsv":
            return read_csv(path, kind.compression, span, is_tsv=kind.format == "tsv")
        case "parquet":
            return read_parquet(path, span)
        case "arrow_file" | "arrow_stream":
            return read_arrow(path, span, is_stream=kind.format == "arrow_stream")
        case "text":
            return read_text(path, kind.compression, span, reading)
