"""Rows of a .csv or .tsv: the first line names the columns, an empty cell is none."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pertoken.data.files import limits
from pertoken.data.files.long_text import BOM
from pertoken.data.files.rows import BadRow, Record, Span, digest_of, no_utf8
from pertoken.data.files.source import Compression, open_source
from pertoken.errors import DataError
from pertoken.text import names

__all__ = ["read_csv"]

_LONGEST_NAME = 200  # characters of a column's
_BAD_BYTE = re.compile("[\udc80-\udcff]")  # as Python holds a byte that is not UTF-8


def read_csv(
    path: Path, compression: Compression | None, span: Span | None, *, is_tsv: bool
) -> Iterator[Record | BadRow]:
    """`line` is the line of the file at which a row starts: a cell in quotes may have several.

    Raises DataError where the first row cannot be the names of columns.
    """
    csv.field_size_limit(limits.MAX_LINE_BYTES)  # the library's own is 128 KiB
    file = str(path)
    with open_source(path, compression, span) as source:
        lines = _Lines(path, source.stream)
        header_line = lines.skip_blank()
        rows = csv.reader(lines, delimiter="\t" if is_tsv else _delimiter(header_line), strict=True)
        header, line = list[str](), 1
        while True:
            line = rows.line_num + 1
            try:
                cells = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                if not header:
                    raise DataError(f"{path}:{line}: header: {_mistake(error)}") from None
                yield BadRow(file, line, "row", _mistake(error))
                continue
            if not cells:
                continue
            if not header:
                header = _header(path, line, cells)
            else:
                yield _row(file, line, header, cells, source.position(lines.consumed))
        source.finish()


def _row(file: str, line: int, header: list[str], cells: list[str], end: int) -> Record | BadRow:
    if len(cells) != len(header):
        what = f"{len(cells)} cells, the header has {len(header)}; put a cell with a comma or newline in it in quotes"
        return BadRow(file, line, "row", what)
    for name, cell in zip(header, cells, strict=True):
        if found := _BAD_BYTE.search(cell):
            return BadRow(file, line, name, _not_utf8(found))
    raw = json.dumps(cells, ensure_ascii=False).encode()
    value = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    return Record(file, line, value, digest_of(raw), end)


def _header(path: Path, line: int, cells: list[str]) -> list[str]:
    where = f"{path}:{line}: header"
    for number, cell in enumerate(cells, start=1):
        if found := _BAD_BYTE.search(cell):
            raw = "".join(cells).encode("utf-8", "surrogateescape")
            wide = no_utf8(raw[:4], raw[0], 0, "the file") if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else None
            raise DataError(f"{where}: {wide or _not_utf8(found)}")
        if len(cell) > _LONGEST_NAME or "\n" in cell:
            what = f"column {number} of the first line is no name but a text; write the columns' names there"
            raise DataError(f"{where}: {what}")
    # What writes a table's index writes no name for it.
    header = [cell.strip() or f"column {number}" for number, cell in enumerate(cells, start=1)]
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise DataError(f"{where}: columns named twice: {names(twice)}; rename them")
    return header


def _delimiter(header: str) -> str:
    """A comma, or what else a table without one has in its first line."""
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


def _not_utf8(found: re.Match[str]) -> str:
    return f'not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x}); save the file as UTF-8 ("CSV UTF-8" in a spreadsheet)'


def _mistake(error: csv.Error) -> str:
    what = str(error)
    if "unexpected end of data" in what or "field larger than" in what:
        return "a quote that is not closed; close it, or double each quote within a cell"
    if "expected after" in what:
        return "text behind a closing quote; double each quote within a cell"
    if "new-line character" in what:
        return "a carriage return without a newline; end lines with \\n"
    return f"not valid CSV ({what})"


class _Lines:
    """The lines of a stream as text, bytes that are not UTF-8 marked as such."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self._number = 0
        self._ahead: list[str] = []
        self.consumed = 0  # bytes

    def skip_blank(self) -> str:
        """The first line that is not blank; it and those before it are still to come."""
        while (line := self._read()) is not None:
            self._ahead.append(line)
            if line.strip():
                return line
        return ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.pop(0) if self._ahead else self._read()
        if line is None:
            raise StopIteration
        return line

    def _read(self) -> str | None:
        raw = self._stream.readline(limits.MAX_LINE_BYTES + 1)
        self._number += 1
        if len(raw) > limits.MAX_LINE_BYTES:
            much = f"a line of more than {limits.MAX_LINE_BYTES:,} bytes; end lines with \\n, or split the row"
            raise DataError(f"{self._path}:{self._number}: {much}")
        if not raw:
            return None
        self.consumed += len(raw)
        return (raw.removeprefix(BOM) if self._number == 1 else raw).decode("utf-8", "surrogateescape")
