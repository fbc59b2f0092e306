"""Rows of JSON, a line each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO

from pertoken.data.files import limits
from pertoken.data.files.json_mistakes import json_mistake
from pertoken.data.files.json_text import parse_json
from pertoken.data.files.long_text import BOM
from pertoken.data.files.rows import BadRow, Record, Span, digest_of, not_utf8
from pertoken.data.files.source import Compression, open_source

__all__ = ["json_row", "read_jsonl"]


def read_jsonl(path: Path, compression: Compression | None, span: Span | None) -> Iterator[Record | BadRow]:
    """Blank lines are skipped; their line numbers are not reused."""
    file, consumed = str(path), 0
    with open_source(path, compression, span) as source:
        for line in count(span.line if span else 1):
            raw = source.stream.readline(limits.MAX_LINE_BYTES + 1)
            if not raw:
                source.finish()
                return
            consumed += len(raw)
            if len(raw) > limits.MAX_LINE_BYTES:
                consumed += _skip_line(source.stream) if raw[-1:] != b"\n" else 0
                much = f"a line of more than {limits.MAX_LINE_BYTES:,} bytes"
                yield BadRow(file, line, "row", f"{much}; end lines with \\n, or split the row")
                continue
            raw = (raw.removeprefix(BOM) if line == 1 else raw).rstrip()
            if raw:
                yield json_row(file, line, raw, source.position(consumed))


def json_row(file: str, line: int, raw: bytes, end: int, *, is_line: bool = True) -> Record | BadRow:
    """The row that `raw` is: a line of its own, or an item of an array."""
    remedy = "write one JSON object a line" if is_line else "write an array of JSON objects"
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return BadRow(file, line, "row", not_utf8(error, "the line" if is_line else "the row"))
    try:
        value = parse_json(text)
    except ValueError as error:
        has_odd_bytes = b"\0" in raw or (is_line and b"\r" in raw)
        if not has_odd_bytes and (mistake := json_mistake(text, is_line=is_line)) is not None:
            return BadRow(file, line, "row", f"not valid JSON: {mistake}")
        return BadRow(file, line, "row", f"{error}; {_remedy(raw, is_line=is_line) or remedy}")
    if not isinstance(value, dict) and not _is_list_of_objects_or_lists(value):
        return BadRow(file, line, "row", f"a JSON {type(value).__name__}, not an object; {remedy}")
    return Record(file, line, value, digest_of(raw), end)


def _is_list_of_objects_or_lists(value: object) -> bool:
    """Which a conversation may be: messages, or pairs of texts."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict | list)


def _skip_line(lines: IO[bytes]) -> int:
    """Read to the end of the line, a piece at a time. Returns the bytes that were left of it."""
    skipped = 0
    while piece := lines.readline(limits.BLOCK_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _remedy(raw: bytes, *, is_line: bool) -> str | None:
    if b"\0" in raw:
        return "there are NUL bytes in it: save the file as UTF-8"
    if is_line and b"\r" in raw:
        return "there is a carriage return in it: end lines with \\n"
    return None
