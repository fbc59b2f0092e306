"""Rows of .jsonl, .txt and .parquet files, each with the file and line it came from.

A row that cannot be read is a value, `BadRow`, not an exception: what to do about it is the caller's decision, and
several of them can be shown at once.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pertoken.errors import DataError

__all__ = [
    "BOM",
    "SUFFIXES",
    "BadRow",
    "Problems",
    "Record",
    "Span",
    "empty_file",
    "find_files",
    "parquet_file",
    "parse_json",
    "read_records",
]

SUFFIXES = (".jsonl", ".parquet", ".txt")
BOM = b"\xef\xbb\xbf"

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Record:
    """One row. `line` counts from 1: the line of a .jsonl, the row of a .parquet, always 1 for a .txt."""

    file: str
    line: int
    value: dict[str, Any] | str  # str: the whole of a .txt
    digest: int  # 64 bits of the row's content: duplicates share it
    end: int  # bytes of the file read so far, this row included


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used. `str()` gives `file:line: field: problem`."""

    file: str
    line: int
    field: str
    problem: str  # what is wrong, and what to do

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one file that follow each other: lines of a .jsonl, row groups of a .parquet, the whole of a .txt."""

    file: int  # index into the files
    start: int  # bytes of the file [start, stop); of a .parquet its share
    stop: int
    line: int  # of the first row
    groups: tuple[int, int] | None = None  # row groups [first, last) of a .parquet


class Problems:
    """Bad rows, counted; the first 20 of them are kept."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            self.first.append(row)

    def extend(self, others: Problems) -> None:
        self.count += others.count
        self.first += others.first[: _SHOWN - len(self.first)]

    def raise_if_any(self, hint: str = "") -> None:
        """Raise DataError with one line per kept problem, the number of the others, and `hint`."""
        if not self.count:
            return
        lines = [str(row) for row in self.first]
        if self.count > _SHOWN:
            lines.append(f"and {self.count - _SHOWN} more")
        raise DataError("\n".join([*lines, hint] if hint else lines))


def find_files(paths: Sequence[str]) -> list[Path]:
    """The data files that `paths` (files, folders, globs) name, in the order given, each one once.

    A folder means every .jsonl, .parquet and .txt file below it, sorted; so does a glob.
    Raises DataError where a path names nothing that can be read.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        for file in _matches(path):
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _matches(path: str) -> list[Path]:
    here = Path(path).expanduser()
    known = ", ".join(SUFFIXES)
    if here.is_file():
        if here.suffix not in SUFFIXES:
            raise DataError(f"{path}: cannot read {here.suffix or 'a file without a suffix'}; give one of {known}")
        return [here]
    if here.is_dir():
        candidates = sorted(here.rglob("*"))
    elif glob.has_magic(path):
        candidates = [Path(match) for match in sorted(glob.glob(str(here), recursive=True))]
    else:
        raise DataError(f"{path}: no such file or folder; correct data.path")
    files = [file for file in candidates if file.suffix in SUFFIXES and file.is_file()]
    if not files:
        raise DataError(f"{path}: no {known} file found there; correct data.path")
    return files


def read_records(path: str | Path, span: Span | None = None) -> Iterator[Record | BadRow]:
    """The rows of one file, or of a span of it, streamed. Blank lines of a .jsonl are skipped; their line numbers are
    not reused.

    Raises DataError where the file itself cannot be read or, read as a whole, holds no row.
    """
    path = Path(path)
    read = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".txt": _read_text}[path.suffix]
    empty = span is None
    try:
        for row in read(path, span):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    if empty:
        raise empty_file(path)


def empty_file(path: Path) -> DataError:
    return DataError(f"{path}: empty; remove it from data.path or fill it")


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, saying where, for anything that is not JSON or not Unicode text."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:  # a lone surrogate is no character: no tokenizer can encode it
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("an unpaired surrogate escape (\\ud800 to \\udfff), which is no character") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_jsonl(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    file, end, stop = str(path), span.start if span else 0, span.stop if span else math.inf
    with path.open("rb") as lines:
        lines.seek(end)
        for line, raw in enumerate(iter(lines.readline, b""), span.line if span else 1):
            if end >= stop:
                return
            end += len(raw)
            raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip()
            if not raw:
                continue
            try:
                value = parse_json(raw.decode())
            except UnicodeDecodeError as error:
                yield BadRow(file, line, "row", _not_utf8(error, "the line"))
            except ValueError as error:
                yield BadRow(file, line, "row", f"{error}; write one JSON object a line")
            else:
                if isinstance(value, dict):
                    yield Record(file, line, value, _digest(raw), end)
                else:
                    found = type(value).__name__
                    yield BadRow(file, line, "row", f"a JSON {found}, not an object; write one JSON object a line")


def _read_text(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    raw = path.read_bytes()
    content = raw.removeprefix(BOM)
    if not content:
        return
    try:
        yield Record(str(path), 1, content.decode(), _digest(content), len(raw))
    except UnicodeDecodeError as error:
        yield BadRow(str(path), 1, "text", _not_utf8(error, "the file"))


def _read_parquet(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    import pyarrow as pa

    file, size = str(path), path.stat().st_size
    table = parquet_file(path)
    if table is None:
        return
    groups = range(*span.groups) if span and span.groups else None
    try:
        line, rows = span.line - 1 if span else 0, table.metadata.num_rows
        for batch in table.iter_batches(batch_size=1024, row_groups=groups):
            for i in range(batch.num_rows):
                line += 1
                try:
                    value = {name: batch.column(name)[i].as_py() for name in batch.schema.names}
                except UnicodeDecodeError as error:
                    yield BadRow(file, line, "row", _not_utf8(error, "a text"))
                    continue
                raw = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
                yield Record(file, line, value, _digest(raw), size * line // rows)
    except pa.ArrowException as error:
        raise _not_parquet(path, error) from None


def parquet_file(path: Path) -> Any:
    """The opened pyarrow.parquet.ParquetFile; None for a file of no bytes. Raises DataError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path) if path.stat().st_size else None
    except pa.ArrowException as error:
        raise _not_parquet(path, error) from None


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})")


def _not_utf8(error: UnicodeDecodeError, where: str) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at offset {error.start} of {where}); save the file as UTF-8"


def _digest(raw: bytes) -> int:
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")
