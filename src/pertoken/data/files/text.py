"""Plain text: a file is one document, or one a line, or one between any two separators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pertoken.data.files import limits
from pertoken.data.files.long_text import BOM, LongText, changed, look_through
from pertoken.data.files.rows import BadRow, Record, Span, digest_of, no_utf8, not_utf8
from pertoken.data.files.source import Compression, Source, open_source
from pertoken.errors import DataError

__all__ = ["TextReading", "read_text"]

_CRLF = ("crlf",)


@dataclass(frozen=True)
class TextReading:
    """How a file of plain text is read."""

    document: str = "file"  # "file", "line", or the text between any two documents
    newlines: Literal["lf", "keep"] = "lf"  # whether \r\n is read as \n


def read_text(
    path: Path, compression: Compression | None, span: Span | None, reading: TextReading
) -> Iterator[Record | BadRow]:
    """The documents that are not empty. Raises DataError for a compressed document that is too long to be held."""
    if reading.document != "file":
        with open_source(path, compression, span) as source:
            yield from _documents(str(path), source, reading)
            source.finish()
    elif compression is None and path.stat().st_size > limits.LONG_BYTES:
        yield from _long_text(path, span, reading)
    else:
        yield from _whole_file(path, compression, span, reading)


def _whole_file(
    path: Path, compression: Compression | None, span: Span | None, reading: TextReading
) -> Iterator[Record | BadRow]:
    file = str(path)
    with open_source(path, compression, span) as source:
        raw = source.stream.read() if compression is None else source.stream.read(limits.LONG_BYTES + 1)
        if compression is not None and len(raw) > limits.LONG_BYTES:
            what = f"a document of more than {limits.LONG_BYTES:,} bytes in a compressed file; decompress the file"
            raise DataError(f"{path}: {what}, or set data.document")
        end = source.position(len(raw))
        source.finish()
    content = raw.removeprefix(BOM)
    if not content:
        return
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        yield BadRow(file, 1, "text", not_utf8(error, "the file"))
        return
    if "\0" in text:
        yield BadRow(file, 1, "text", _nul(content.index(b"\0"), "the file"))
        return
    digest, has_crlf = digest_of(content), reading.newlines == "lf" and b"\r\n" in content
    del raw, content  # the text alone is in memory while it is encoded
    if has_crlf:
        text = text.replace("\r\n", "\n")
    yield Record(file, 1, text, digest, end, _CRLF if has_crlf else ())


def _long_text(path: Path, span: Span | None, reading: TextReading) -> Iterator[Record | BadRow]:
    """As `_whole_file`, in memory that does not grow with the file."""
    seen, file = look_through(path), str(path)
    if span is not None and span.sha256 not in (None, seen.sha256):
        raise changed(path)
    if not seen.head:
        return
    if seen.not_utf8 is not None:
        yield BadRow(file, 1, "text", no_utf8(seen.head, *seen.not_utf8, "the file"))
    elif seen.nul is not None:
        yield BadRow(file, 1, "text", _nul(seen.nul, "the file"))
    else:
        has_crlf = reading.newlines == "lf" and seen.num_crlf > 0
        num_chars = seen.num_chars - (seen.num_crlf if has_crlf else 0)
        text = LongText(file, seen.sha256, 0, num_chars, has_crlf)
        digest = int.from_bytes(seen.digest, "big")
        yield Record(file, 1, text, digest, seen.num_bytes, _CRLF if has_crlf else ())


def _documents(file: str, source: Source, reading: TextReading) -> Iterator[Record | BadRow]:
    """The stretches between the separators, without the newlines around them."""
    of_lines, told = reading.document == "line", False
    separator = b"\n" if of_lines else reading.document.encode()
    for line, piece, consumed in _pieces(source.stream, separator, joins_crlf=reading.newlines == "lf"):
        if piece.is_too_long:
            much = f"a document of more than {limits.MAX_LINE_BYTES:,} bytes; see data.document, or split it"
            yield BadRow(file, line, "text", much)
            continue
        content = piece.content.strip(b"\r\n")
        if not content.strip():
            continue
        line += _newlines_before(piece.content)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            yield BadRow(file, line, "text", not_utf8(error, "the document"))
            continue
        if "\0" in text:
            yield BadRow(file, line, "text", _nul(content.index(b"\0"), "the document"))
            continue
        findings = _CRLF if piece.had_crlf and not of_lines and not told else ()
        told = told or bool(findings)
        yield Record(file, line, text, digest_of(content), source.position(consumed), findings)


@dataclass(frozen=True, slots=True)
class _Piece:
    content: bytes
    had_crlf: bool  # in this block, before they were joined
    is_too_long: bool = False


def _pieces(stream: IO[bytes], separator: bytes, *, joins_crlf: bool) -> Iterator[tuple[int, _Piece, int]]:
    """(the line at which it starts, what is between two separators, the bytes of the stream read so far)"""
    held, line, consumed, last = b"", 1, 0, b""
    had_crlf = is_too_long = False
    while block := stream.read(limits.BLOCK_BYTES):
        at_start, consumed = not consumed, consumed + len(block)
        block = block.removeprefix(BOM) if at_start else block
        if joins_crlf:
            block, last = last + block, b""
            if block.endswith(b"\r"):
                block, last = block[:-1], b"\r"
            had_crlf = had_crlf or b"\r\n" in block
            block = block.replace(b"\r\n", b"\n")
        *whole, held = (held + block).split(separator)
        for content in whole:
            yield line, _Piece(content, had_crlf, is_too_long), consumed
            line += content.count(b"\n") + separator.count(b"\n")
            is_too_long = False
        if len(held) > limits.MAX_LINE_BYTES:
            kept = held[len(held) - len(separator) + 1 :]
            line += held.count(b"\n") - kept.count(b"\n")
            held, is_too_long = kept, True
    yield line, _Piece(held + last, had_crlf, is_too_long), consumed


def _newlines_before(content: bytes) -> int:
    return content[: len(content) - len(content.lstrip(b"\r\n"))].count(b"\n")


def _nul(offset: int, where: str) -> str:  # UTF-16 without a mark, most often, or no text at all
    return f"a NUL byte at offset {offset} of {where}: not text; save the file as UTF-8"
