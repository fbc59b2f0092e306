"""What reading a file gives: rows, rows that cannot be used, and the spans that a file is cut into."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pertoken.data.files.long_text import LongText
from pertoken.errors import DataError
from pertoken.text import one_line

__all__ = ["BadRow", "Record", "Span", "digest_of", "empty_file", "no_utf8", "not_utf8"]

_WIDE = {  # how files start that Unicode was written to otherwise; UTF-32 first, whose mark begins like UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    `line` counts from 1: the line of the file at which the row starts; of a .parquet or .arrow, and of a JSON array
    with several rows on a line, the row's number.
    """

    file: str
    line: int
    value: dict[str, Any] | list[Any] | str | LongText  # a list: of objects or of lists; text: a document of a text
    digest: int  # 64 bits of the row's content: duplicates share it
    end: int  # bytes of the file read so far, this row included
    findings: tuple[str, ...] = ()  # what is worth a word about it: keys of `data.findings.KINDS`


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
    """Rows of one file that follow each other: lines of a .jsonl, row groups of a .parquet, the whole of all else."""

    file: int  # index into the files
    start: int  # bytes of the file [start, stop)
    stop: int
    line: int  # of the first row
    groups: tuple[int, int] | None = None  # row groups [first, last) of a .parquet
    sha256: str | None = None  # of these bytes; None: not to be compared with what is read


def empty_file(path: Path) -> DataError:
    return DataError(f"{path}: empty; remove it from data.path or fill it")


def digest_of(raw: bytes) -> int:
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")


def not_utf8(error: UnicodeDecodeError, where: str) -> str:
    return no_utf8(error.object[:4], error.object[error.start], error.start, where)


def no_utf8(head: bytes, byte: int, offset: int, where: str) -> str:
    """`head` is how all of it starts, `byte` the first one that is wrong."""
    if wide := next((name for mark, name in _WIDE.items() if head.startswith(mark)), None):
        return f"not UTF-8 but {wide}, by its byte order mark; save the file as UTF-8"
    return f"not UTF-8 (byte 0x{byte:02x} at offset {offset} of {where}); save the file as UTF-8"
