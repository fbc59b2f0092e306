"""Rows of a JSON array, or of one JSON object, in memory that does not grow with the file.

The file is cut into its items by brackets and strings alone; each item is then read as strictly as a line of a .jsonl.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

from pertoken.data.files import limits
from pertoken.data.files.json_mistakes import json_mistake
from pertoken.data.files.jsonl import json_row
from pertoken.data.files.long_text import BOM
from pertoken.data.files.rows import BadRow, Record, Span
from pertoken.data.files.source import Compression, open_source
from pertoken.errors import DataError

__all__ = ["read_json"]

# A string ends at its quote, or with its line where that is missing.
_STRING = rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+("?)'
_BRACKETS = re.compile(_STRING + rb"|[\[\]{}]")
_SCALAR = re.compile(rb"(?:" + _STRING + rb"|[^\s,\]])++")
_SPACE = re.compile(rb"[ \t\r\n]*+")
_QUOTE, _OPENING = ord('"'), b"[{"


class _Item(NamedTuple):
    line: int  # at which it starts
    raw: bytes
    end: int  # bytes read so far, this item included
    problem: str | None = None  # with what is around it


def read_json(path: Path, compression: Compression | None, span: Span | None) -> Iterator[Record | BadRow]:
    """The items of a top-level array, or the one object. Where the second row starts on the line of the first, rows
    are counted instead of lines."""
    file = str(path)
    with open_source(path, compression, span) as source:
        items = _items(path, source.stream)
        first = [item for item in (next(items, None), next(items, None)) if item is not None]
        counts_rows = len(first) == 2 and first[0].line == first[1].line and first[1].problem is None
        for number, item in enumerate(chain(first, items), start=1):
            line = number if counts_rows else item.line
            if item.problem is not None:
                yield BadRow(file, line, "row", item.problem)
            else:
                yield json_row(file, line, item.raw, source.position(item.end), is_line=False)
        source.finish()


def _items(path: Path, stream: IO[bytes]) -> Iterator[_Item]:
    """Raises DataError for what cannot be cut into items."""
    text = _Text(path, stream)
    if text.look() == b"{":
        yield _item(text, None)
        what = "another object; write one object a line, or put them into one JSON array"
        _refuse_more(text, path, what)
        return
    if text.look() != b"[":
        return
    text.take(1)
    wants_row, rows = True, 0
    while (found := text.look()) != b"]":
        if not found:
            what = "the file ends before the array's ]: it was cut short; write it again"
            yield _Item(text.line, b"", text.consumed, what)
            return
        if found == b",":
            if wants_row:
                yield _Item(text.line, b"", text.consumed, "a comma without a row before it; remove it")
            text.take(1)
            wants_row = True
            continue
        yield _item(text, None if wants_row else "no comma before it; write one between any two rows")
        wants_row, rows = False, rows + 1
    if wants_row and rows:
        yield _Item(text.line, b"", text.consumed, "a comma behind the last row; remove it")
    text.take(1)
    _refuse_more(text, path, "more text behind the array; put all rows into one array, or write one object a line")


def _item(text: _Text, problem: str | None) -> _Item:
    line = text.line
    raw, is_whole = text.cut()
    if not is_whole:
        mistake = json_mistake(raw.decode("utf-8", "replace"), is_line=False)
        cut_short = "the file ends within this row: it was cut short, or a bracket or quote is missing; write it again"
        problem = f"not valid JSON: {mistake}" if mistake else cut_short
    return _Item(line, raw, text.consumed, problem)


def _refuse_more(text: _Text, path: Path, what: str) -> None:
    if text.look():
        raise DataError(f"{path}:{text.line}: {what}")


class _Text:
    """The stretch of a stream that is looked at."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self._held = b""
        self._at = 0
        self._indent = b""  # white space of its line before the next byte
        self.line = 1  # of the next byte
        self.consumed = 0  # bytes before it
        self._fill()
        if self._held.startswith(BOM):
            self._at = self.consumed = len(BOM)

    def look(self) -> bytes:
        """The next byte that is no white space, which is left there; b"" at the end."""
        self._indent = b""
        while True:
            space = _SPACE.match(self._held, self._at)
            assert space is not None
            self._indent = (self._indent + space[0]).rpartition(b"\n")[2]
            self.take(space.end() - self._at)
            if self._at < len(self._held) or not self._fill():
                return self._held[self._at : self._at + 1]

    def take(self, count: int) -> bytes:
        """The next bytes, which are held."""
        start, self._at = self._at, self._at + count
        self.line += self._held.count(b"\n", start, self._at)
        self.consumed += count
        return self._held[start : self._at]

    def cut(self) -> tuple[bytes, bool]:
        """The value that starts here, and whether it is whole: the text may end within it."""
        if self._held[self._at] not in _OPENING:
            while self._end_of_scalar() > len(self._held) - 2 and self._fill():
                pass
            return self.take(max(1, self._end_of_scalar() - self._at)), True
        depth, at = 0, self._at
        while True:
            for token in _BRACKETS.finditer(self._held, at):
                at = token.end()
                if self._held[token.start()] != _QUOTE:
                    depth += 1 if self._held[token.start()] in _OPENING else -1
                    if not depth:
                        return self.take(at - self._at), True
                elif token.start(1) == token.end(1):  # without a second quote
                    if at < len(self._held) - 1:
                        return self._cut_before_the_next(at)
                    at = token.start()  # the string may go on in the next block
                    break
            before = self._at
            if not self._fill():
                return self.take(len(self._held) - self._at), False
            at -= before

    def _cut_before_the_next(self, at: int) -> tuple[bytes, bool]:
        """What starts here and has a string that is not closed: up to a line that starts as this row does."""
        start = b"\n" + self._indent + self._held[self._at : self._at + 1]
        while (end := self._held.find(start, at)) < 0:
            before = self._at
            if not self._fill():
                return self.take(len(self._held) - self._at), False
            at -= before
        raw = self._held[self._at : end].rstrip().removesuffix(b",")
        return self.take(len(raw)), True

    def _end_of_scalar(self) -> int:
        found = _SCALAR.match(self._held, self._at)
        return found.end() if found else self._at

    def _fill(self) -> bool:
        """Hold more; False at the end of the stream."""
        if len(self._held) - self._at > limits.MAX_LINE_BYTES:
            what = (
                f"a row of more than {limits.MAX_LINE_BYTES:,} bytes, or a bracket or quote is missing; split the row"
            )
            raise DataError(f"{self._path}:{self.line}: {what}")
        block = self._stream.read(limits.BLOCK_BYTES)
        self._held, self._at = self._held[self._at :] + block, 0
        return bool(block)
