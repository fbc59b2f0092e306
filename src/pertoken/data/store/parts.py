"""Files cut into parts: as much as one worker makes into samples at a time.

The cuts depend on the files alone, never on who makes the parts, so neither does what is put together from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pertoken.data.files.kinds import kind_of
from pertoken.data.files.long_text import BOM
from pertoken.data.files.parquet import parquet_file
from pertoken.data.files.rows import Span, empty_file
from pertoken.errors import DataError

__all__ = ["Part", "part_bytes", "scan"]

Part = tuple[Span, ...]

# At least, at most: some seconds of work, enough to be worth a message and a file, little enough to do again after an
# interruption; and in between _SHARES of all, so that no processor waits long for the last part.
_PART_BYTES = (1 << 20, 8 << 20)
_SHARES = 32
_BLOCK_BYTES = 1 << 20


def scan(files: Sequence[Path]) -> tuple[list[str], list[Part]]:
    """(the SHA-256 of each file, all of their rows as parts in order), in one pass over the files.

    Files are cut between lines (JSON lines) or row groups (Parquet), all others never; small files share a part.
    Raises DataError where a file cannot be read or holds no row.
    """
    size = _part_size(files)
    hashes: list[str] = []
    parts: list[Part] = []
    part: list[Span] = []
    for index, path in enumerate(files):
        digest = hashlib.sha256()
        try:
            spans = list(_spans(index, path, digest, size))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
        hashes.append(digest.hexdigest())
        for span in spans:
            if part and part_bytes(part) + span.stop - span.start > size:
                parts.append(tuple(part))
                part = []
            part.append(span)
    return hashes, [*parts, tuple(part)] if part else parts


def _part_size(files: Sequence[Path]) -> int:
    least, most = _PART_BYTES
    return min(most, max(least, sum(path.stat().st_size for path in files) // _SHARES))


def part_bytes(part: Sequence[Span]) -> int:
    return sum(span.stop - span.start for span in part)


def _spans(index: int, path: Path, digest: hashlib._Hash, size: int) -> Iterator[Span]:
    """The spans of one file, each about a part long, and all of its bytes into `digest`."""
    kind = kind_of(path)
    if kind.format == "parquet":
        yield from _row_groups(index, path, digest, size)
        return
    jsonl = kind.is_cut
    start = end = newlines = 0  # of the span; `newlines` before `end`
    line = 1
    blank = True
    of_span = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        at = 0  # bytes of the block that are counted
        while jsonl and (cut := block.find(b"\n", max(at, start + size - 1 - end)) + 1):
            newlines += block.count(b"\n", at, cut)
            of_span.update(memoryview(block)[at:cut])
            yield Span(index, start, end + cut, line, sha256=of_span.hexdigest())
            start, line, at, of_span = end + cut, newlines + 1, cut, hashlib.sha256()
        newlines += block.count(b"\n", at) if jsonl else 0
        of_span.update(memoryview(block)[at:])
        content = block.removeprefix(BOM) if not end else block
        blank = blank and not (content.strip() if jsonl else content)
        end += len(block)
    if blank:
        raise empty_file(path)
    if end > start:
        yield Span(index, start, end, line, sha256=of_span.hexdigest())


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _row_groups(index: int, path: Path, digest: hashlib._Hash, part: int) -> Iterator[Span]:
    """As `_spans`. A span's bytes reach from its first row group to that of the next span, so all bytes are in one."""
    table = parquet_file(path)
    if table is None or not table.metadata.num_rows:
        raise empty_file(path)
    metadata = table.metadata
    cuts: list[tuple[int, int, int]] = []  # of each span: its first row group, the rows before it, its first byte
    before = content = 0  # rows before the row group, bytes of the span before it
    for group in range(metadata.num_row_groups):
        if not cuts or content >= part:
            cuts.append((group, before, _first_byte(metadata.row_group(group)) if cuts else 0))
            content = 0
        before += metadata.row_group(group).num_rows
        content += metadata.row_group(group).total_byte_size
    starts = [start for _, _, start in cuts]
    if any(stop <= start for start, stop in pairwise(starts)):  # row groups in another order than their bytes
        cuts = cuts[:1]
    ends = [(group, start) for group, _, start in cuts[1:]]
    with path.open("rb") as file:
        for (first, rows, start), (last, stop) in zip(cuts, [*ends, (metadata.num_row_groups, None)], strict=True):
            of_span, end = hashlib.sha256(), start
            while block := file.read(_BLOCK_BYTES if stop is None else min(_BLOCK_BYTES, stop - end)):
                digest.update(block)
                of_span.update(block)
                end += len(block)
            yield Span(index, start, end, rows + 1, (first, last), of_span.hexdigest())


def _first_byte(row_group: Any) -> int:
    columns = [row_group.column(i) for i in range(row_group.num_columns)]
    starts = [column.data_page_offset for column in columns]
    starts += [column.dictionary_page_offset for column in columns if column.has_dictionary_page]
    return int(min(starts))
