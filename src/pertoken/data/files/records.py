"""Rows of .jsonl, .txt and .parquet files, each with the file and line it came from.

A row that cannot be read is a value, `BadRow`, not an exception: what to do about it is the caller's decision, and
several of them can be shown at once.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from pertoken.data.files.json_text import parse_json
from pertoken.data.files.long_text import BOM, LongText, changed, look_through
from pertoken.data.files.nulls import without_nulls
from pertoken.errors import DataError
from pertoken.files import plain_file
from pertoken.text import names, one_line, reason

__all__ = [
    "MAX_LINE_BYTES",
    "BadRow",
    "Record",
    "Span",
    "empty_file",
    "parquet_file",
    "read_records",
]

MAX_LINE_BYTES = 64 << 20  # of a .jsonl, and of a row of a .parquet: what is longer would only fill the memory

_LONG_BYTES = 32 << 20  # of a .txt that is read in blocks
_BATCH_BYTES = 32 << 20  # of the rows of a .parquet that are read at a time
_BATCH_ROWS = 1024
_BUFFER_BYTES = 1 << 20
_WIDE = {  # how files start that Unicode was written to otherwise; UTF-32 first, whose mark begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One row. `line` counts from 1: the line of a .jsonl, the row of a .parquet, always 1 for a .txt."""

    file: str
    line: int
    value: dict[str, Any] | list[Any] | str | LongText  # a list: of messages; not a dict or list: the whole of a .txt
    digest: int  # 64 bits of the row's content: duplicates share it
    end: int  # bytes of the file read so far, this row included


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. `str()` gives `file:line: field: problem` in one line, whatever the data says."""

    file: str
    line: int
    field: str
    problem: str  # what is wrong, and what to do

    def __str__(self) -> str:
        return one_line(f"{self.file}:{self.line}: {self.field}: {self.problem}")


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one file that follow each other: lines of a .jsonl, row groups of a .parquet, the whole of a .txt."""

    file: int  # index into the files
    start: int  # bytes of the file [start, stop)
    stop: int
    line: int  # of the first row
    groups: tuple[int, int] | None = None  # row groups [first, last) of a .parquet
    sha256: str | None = None  # of these bytes; None: not to be compared with what is read


def read_records(path: str | Path, span: Span | None = None) -> Iterator[Record | BadRow]:
    """The rows of one file, or of a span of it, streamed. Blank lines of a .jsonl are skipped; their line numbers are
    not reused.

    Raises DataError where the file itself cannot be read or, read as a whole, holds no row. The rows of a span with a
    hash are made of the very bytes that were hashed: DataError at the end of them where the file has changed since.
    """
    path = Path(path)
    read = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_text}[path.suffix]
    empty = span is None
    try:
        plain_file(path)
        for row in read(path, span):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise empty_file(path)


def empty_file(path: Path) -> DataError:
    return DataError(f"{path}: empty; remove it from data.path or fill it")


def _read_jsonl(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    file, end, stop = str(path), span.start if span else 0, span.stop if span else math.inf
    seen = sha256()
    with path.open("rb") as lines:
        lines.seek(end)
        for line in count(span.line if span else 1):
            raw = lines.readline(MAX_LINE_BYTES + 1) if end < stop else b""
            if not raw:
                _refuse_change(path, span, seen.hexdigest())
                return
            end += len(raw)
            seen.update(raw)
            if len(raw) > MAX_LINE_BYTES:
                end += _skip_line(lines, seen) if raw[-1:] != b"\n" else 0
                much = f"a line of more than {MAX_LINE_BYTES:,} bytes"
                yield BadRow(file, line, "row", f"{much}; end lines with \\n, or split the row")
                continue
            raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip()
            if raw:
                yield _json_row(file, line, raw, end)


def _json_row(file: str, line: int, raw: bytes, end: int) -> Record | BadRow:
    try:
        value = parse_json(raw.decode())
    except UnicodeDecodeError as error:
        return BadRow(file, line, "row", _not_utf8(error, "the line"))
    except ValueError as error:
        return BadRow(file, line, "row", f"{error}; {_remedy(raw)}")
    if not isinstance(value, dict):
        return BadRow(file, line, "row", f"a JSON {type(value).__name__}, not an object; write one JSON object a line")
    return Record(file, line, value, _digest(raw), end)


def _refuse_change(path: Path, span: Span | None, sha256: str) -> None:
    if span is not None and span.sha256 not in (None, sha256):
        raise changed(path)


def _skip_line(lines: BinaryIO, seen: hashlib._Hash) -> int:
    """Read to the end of the line, a piece at a time. Returns the bytes that were left of it."""
    skipped = 0
    while piece := lines.readline(1 << 20):
        skipped += len(piece)
        seen.update(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _remedy(raw: bytes) -> str:
    if b"\0" in raw:
        return "there are NUL bytes in it: save the file as UTF-8"
    if b"\r" in raw:
        return "there is a carriage return in it: end lines with \\n"
    return "write one JSON object a line"


def _read_text(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    if path.stat().st_size > _LONG_BYTES:
        yield from _read_long_text(path, span)
        return
    raw = path.read_bytes()
    _refuse_change(path, span, sha256(raw).hexdigest())
    content = raw.removeprefix(BOM)
    if not content:
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield BadRow(str(path), 1, "text", _not_utf8(error, "the file"))
        return
    if "\0" in text:
        yield BadRow(str(path), 1, "text", _nul(content.index(b"\0")))
    else:
        digest, size = _digest(content), len(raw)
        del raw, content  # the text alone is in memory while it is encoded
        yield Record(str(path), 1, text, digest, size)


def _read_long_text(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    """As `_read_text`, in memory that does not grow with the file."""
    seen, file = look_through(path), str(path)
    _refuse_change(path, span, seen.sha256)
    if not seen.head:
        return
    if seen.not_utf8 is not None:
        yield BadRow(file, 1, "text", _no_utf8(seen.head, *seen.not_utf8, "the file"))
    elif seen.nul is not None:
        yield BadRow(file, 1, "text", _nul(seen.nul))
    else:
        text = LongText(file, seen.sha256, 0, seen.num_chars)
        yield Record(file, 1, text, int.from_bytes(seen.digest, "big"), seen.num_bytes)


def _read_parquet(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    import pyarrow as pa

    file, size = str(path), path.stat().st_size
    table = parquet_file(path)
    if table is None:
        return
    groups = range(*span.groups) if span and span.groups else range(table.num_row_groups)
    line, rows = span.line - 1 if span else 0, table.metadata.num_rows
    last = line + sum(table.metadata.row_group(i).num_rows for i in groups)
    try:
        for batch in _batches(table, groups):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            has_large = batch.nbytes > MAX_LINE_BYTES
            for i in range(batch.num_rows):
                line += 1
                if has_large and batch.slice(i, 1).nbytes > MAX_LINE_BYTES:
                    yield BadRow(file, line, "row", f"more than {MAX_LINE_BYTES:,} bytes; split the row")
                    continue
                try:
                    value = {name: column[i].as_py() for name, column in columns.items()}
                    raw = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
                except MemoryError:  # pyarrow's is an ArrowException too
                    raise
                except UnicodeDecodeError as error:
                    yield BadRow(file, line, "row", _not_utf8(error, "a text"))
                except (pa.ArrowException, ArithmeticError, RecursionError, ValueError) as error:
                    yield BadRow(file, line, "row", f"a value that cannot be read ({reason(error)}); write it as text")
                else:
                    value = {name: without_nulls(item) for name, item in value.items()}
                    yield Record(file, line, value, _digest(raw), size * line // max(rows, 1))
    except MemoryError:
        raise
    except (pa.ArrowException, OSError) as error:
        if span is not None and span.sha256 is not None:
            _refuse_change(path, span, _sha256_of(path, span))
        raise _not_parquet(path, error) from None
    if span is not None and span.sha256 is not None:
        _refuse_change(path, span, _sha256_of(path, span))
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


def _sha256_of(path: Path, span: Span) -> str:
    seen, left = sha256(), span.stop - span.start
    with path.open("rb") as file:
        file.seek(span.start)
        while left and (block := file.read(min(left, 1 << 20))):
            seen.update(block)
            left -= len(block)
    return seen.hexdigest()


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
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise DataError(f"{path}: columns named twice: {names(twice)}; rename them")
    return table


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({reason(error)})")


def _not_utf8(error: UnicodeDecodeError, where: str) -> str:
    return _no_utf8(error.object[:4], error.object[error.start], error.start, where)


def _no_utf8(head: bytes, byte: int, offset: int, where: str) -> str:
    """`head` is how all of it starts, `byte` the first one that is wrong."""
    if wide := next((name for mark, name in _WIDE.items() if head.startswith(mark)), None):
        return f"not UTF-8 but {wide}, by its byte order mark; save the file as UTF-8"
    return f"not UTF-8 (byte 0x{byte:02x} at offset {offset} of {where}); save the file as UTF-8"


def _nul(offset: int) -> str:  # UTF-16 without a mark, most often, or no text at all
    return f"a NUL byte at offset {offset} of the file: not text; save the file as UTF-8"


def _digest(raw: bytes) -> int:
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")
