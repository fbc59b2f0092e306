"""What a file is: told by its content, and by its suffix only where the content leaves it open."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pertoken.data.files.json_text import parse_json
from pertoken.data.files.long_text import BOM
from pertoken.data.files.other_files import is_other, what_it_is
from pertoken.data.files.source import Compression, compression_of, open_source
from pertoken.errors import DataError
from pertoken.files import plain_file

__all__ = ["COMPRESSED", "SUFFIXES", "FileKind", "Format", "inner_name", "kind_of"]

Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow_file", "arrow_stream", "text"]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_JSON = (".json", ".jsonl", ".ndjson")
_SAID: dict[str, Format] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".arrow": "arrow_stream"}
_HEAD_BYTES = 64 << 10
_ARROW_FILE, _ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
_SURE_JSON = re.compile(
    rb"\[\s*\{\s*[\"']|\{\s*\n\s*\"[^\"\n]*\"\s*:"
)  # an array of objects, or an object over several lines
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class FileKind:
    """How the rows of a file are read."""

    format: Format
    compression: Compression | None = None

    @property
    def is_cut(self) -> bool:
        """Whether several processes may share the file; all others are read from the start."""
        return self.format == "parquet" or (self.format == "jsonl" and self.compression is None)

    def __str__(self) -> str:
        name = {"jsonl": "JSON lines", "json": "JSON", "text": "text", "csv": "CSV", "tsv": "TSV"}.get(self.format)
        return (name or self.format.split("_")[0]) + (f", {self.compression}" if self.compression else "")


def inner_name(path: Path) -> Path:
    """The name without the suffix of a compression."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED and path.stem else path


def kind_of(path: Path) -> FileKind:
    """Raises OSError, and DataError where it is nothing that rows are read from, with what can be done about it."""
    with plain_file(path).open("rb") as file:
        head = file.read(_HEAD_BYTES)
    compression = compression_of(head)
    if compression is not None:
        with open_source(path, compression) as source:
            head = source.stream.read(_HEAD_BYTES)
    name = inner_name(path)
    format = _format(head, name.suffix.lower(), is_whole=len(head) < _HEAD_BYTES)
    if format is None:
        raise DataError(f"{path}: {what_it_is(head, name)}")
    if compression is not None and format in ("parquet", "arrow_file", "arrow_stream"):
        raise DataError(f"{path}: a compressed {format.split('_')[0]} file; decompress it first")
    return FileKind(format, compression)


def _format(head: bytes, suffix: str, *, is_whole: bool) -> Format | None:
    """None for what is nothing that rows are read from."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(_ARROW_FILE):
        return "arrow_file"
    if head.startswith(_ARROW_STREAM):
        return "arrow_stream"
    content = head.removeprefix(BOM).lstrip()
    if suffix in _JSON or _SURE_JSON.match(content):
        return "json" if _is_one_value(content) else "jsonl"
    if _are_objects_a_line(content, is_whole=is_whole):
        return "jsonl"
    if (said := _SAID.get(suffix)) is not None:
        return said
    if is_other(head, suffix):
        return None
    if suffix == ".txt" or head.startswith(_WIDE) or _is_text(head, is_whole=is_whole):
        return "text"
    return None


def _is_one_value(content: bytes) -> bool:
    """Whether this is the start of one array or one object, and not of a row a line."""
    first, newline, rest = content.partition(b"\n")
    if content.startswith(b"["):
        return not (newline and rest.strip() and _parses(first, list))
    return _is_object_over_lines(content)


def _is_object_over_lines(content: bytes) -> bool:
    """The first line leaves an object open, and no other one starts at the next."""
    first, _, rest = content.partition(b"\n")
    rest = rest.lstrip()
    if not first.startswith(b"{") or not rest or rest.startswith(b"{"):
        return False
    return first.rstrip()[-1:] in (b"{", b"[", b",") and (first.strip() != b"{" or rest[:1] in b"\"'}")


def _are_objects_a_line(content: bytes, *, is_whole: bool) -> bool:
    """The first two lines are JSON objects, or the only one."""
    if not content.startswith(b"{"):
        return False
    lines = content.split(b"\n")
    complete = [line for line in (lines if is_whole else lines[:-1]) if line.strip()]
    return bool(complete) and all(_parses(line, dict) for line in complete[:2])


def _parses(line: bytes, type: type) -> bool:
    try:
        return isinstance(parse_json(line.decode()), type)
    except ValueError:
        return False


def _is_text(head: bytes, *, is_whole: bool) -> bool:
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head, final=is_whole)
    except UnicodeDecodeError:
        return False
