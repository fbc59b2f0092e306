"""Rows of .jsonl, .txt and .parquet files, each with the file and line it came from.

A row that cannot be read is a value, `BadRow`, not an exception: what to do about it is the caller's decision, and
several of them can be shown at once.
"""

from __future__ import annotations

import codecs
import glob
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from pertoken.errors import DataError
from pertoken.files import plain_file
from pertoken.text import names, one_line, reason, shown

__all__ = [
    "BOM",
    "MAX_LINE_BYTES",
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
MAX_LINE_BYTES = 64 << 20  # of a .jsonl: what is longer is no row, and would only fill the memory

_SHOWN = 20
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
    value: dict[str, Any] | str  # str: the whole of a .txt
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
        try:
            for file in _matches(path):
                str(file).encode()
                found.setdefault(file.resolve(), file)
        except UnicodeEncodeError:
            raise DataError(f"{path}: a name there is not UTF-8, so no message could name it; rename it") from None
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, no such user's home, a NUL
            raise DataError(f"{path}: cannot be read ({reason(error)}); correct data.path") from None
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


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, saying where, for anything that is not JSON or not Unicode text, for
    a key that is twice in one object, and for numbers that Python cannot hold."""
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # a lone surrogate is no character: no tokenizer can encode it
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        what = "a byte order mark" if text.startswith("\ufeff") else error.msg
        raise ValueError(f"not valid JSON ({what} at column {error.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("an unpaired surrogate escape (\\ud800 to \\udfff), which is no character") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except _Refused:
        raise
    except ValueError:
        raise ValueError("a whole number of more digits than can be read") from None
    return value


class _Refused(ValueError):
    """JSON by the letter, perhaps, but nothing that can be meant."""


def _constant(name: str) -> None:
    raise _Refused(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused(f"the number {text[:30]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"the key {shown(twice)} twice in one object, so it is not known which is meant")
    return value


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)


def _read_jsonl(path: Path, span: Span | None) -> Iterator[Record | BadRow]:
    file, end, stop = str(path), span.start if span else 0, span.stop if span else math.inf
    with path.open("rb") as lines:
        lines.seek(end)
        for line in count(span.line if span else 1):
            raw = lines.readline(MAX_LINE_BYTES + 1) if end < stop else b""
            if not raw:
                return
            end += len(raw)
            if len(raw) > MAX_LINE_BYTES:
                end += _skip_line(lines) if raw[-1:] != b"\n" else 0
                much = f"a line of more than {MAX_LINE_BYTES:,} bytes"
                yield BadRow(file, line, "row", f"{much}; end lines with \\n, or split the row")
                continue
            raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip()
            if not raw:
                continue
            try:
                value = parse_json(raw.decode())
            except UnicodeDecodeError as error:
                yield BadRow(file, line, "row", _not_utf8(error, "the line"))
            except ValueError as error:
                yield BadRow(file, line, "row", f"{error}; {_remedy(raw)}")
            else:
                if isinstance(value, dict):
                    yield Record(file, line, value, _digest(raw), end)
                else:
                    found = type(value).__name__
                    yield BadRow(file, line, "row", f"a JSON {found}, not an object; write one JSON object a line")


def _skip_line(lines: BinaryIO) -> int:
    """Read to the end of the line, a piece at a time. Returns the bytes that were left of it."""
    skipped = 0
    while piece := lines.readline(1 << 20):
        skipped += len(piece)
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
    raw = path.read_bytes()
    content = raw.removeprefix(BOM)
    if not content:
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield BadRow(str(path), 1, "text", _not_utf8(error, "the file"))
        return
    if "\0" in text:  # UTF-16 without a mark, most often, or no text at all
        at = content.index(b"\0")
        yield BadRow(str(path), 1, "text", f"a NUL byte at offset {at} of the file: not text; save the file as UTF-8")
    else:
        yield Record(str(path), 1, text, _digest(content), len(raw))


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
        for batch in table.iter_batches(batch_size=1024, row_groups=groups):
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for i in range(batch.num_rows):
                line += 1
                try:
                    value = {name: column[i].as_py() for name, column in columns.items()}
                    raw = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()
                except UnicodeDecodeError as error:
                    yield BadRow(file, line, "row", _not_utf8(error, "a text"))
                except (pa.ArrowException, ArithmeticError, RecursionError, ValueError) as error:
                    yield BadRow(file, line, "row", f"a value that cannot be read ({reason(error)}); write it as text")
                else:
                    yield Record(file, line, value, _digest(raw), size * line // max(rows, 1))
    except pa.ArrowException as error:
        raise _not_parquet(path, error) from None
    if line != last:
        raise DataError(f"{path}: holds {line} rows where its footer says {last}; write it again")


def parquet_file(path: Path) -> Any:
    """The opened pyarrow.parquet.ParquetFile; None for a file of no bytes. Raises DataError for what is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path) if path.stat().st_size else None
        columns = table.schema_arrow.names if table else []
    except (pa.ArrowException, ValueError) as error:
        raise _not_parquet(path, error) from None
    if twice := {name for name in columns if columns.count(name) > 1}:
        raise DataError(f"{path}: columns named twice: {names(twice)}; rename them")
    return table


def _not_parquet(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file ({reason(error)})")


def _not_utf8(error: UnicodeDecodeError, where: str) -> str:
    if wide := next((name for mark, name in _WIDE.items() if error.object.startswith(mark)), None):
        return f"not UTF-8 but {wide}, by its byte order mark; save the file as UTF-8"
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at offset {error.start} of {where}); save the file as UTF-8"


def _digest(raw: bytes) -> int:
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")
