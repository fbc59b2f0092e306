"""The bytes of a file, decompressed, and hashed as they are read: what was hashed before is what is read."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal

from pertoken.data.files import limits
from pertoken.data.files.long_text import changed
from pertoken.data.files.rows import Span
from pertoken.errors import DataError
from pertoken.text import reason

__all__ = ["Compression", "Source", "check_unchanged", "compression_of", "open_source"]

Compression = Literal["gzip", "bzip2", "xz", "zstd"]

_MAGIC: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def compression_of(head: bytes) -> Compression | None:
    """By how the file starts."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class _Hashed(io.RawIOBase):
    """The bytes [start, stop) of a file, hashed and counted as they are read."""

    def __init__(self, path: Path, start: int, stop: int | None) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(start)
        self._left = None if stop is None else stop - start
        self.seen = sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        count = self._file.readinto(view) or 0
        self.seen.update(view[:count])
        self.count += count
        if self._left is not None:
            self._left -= count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class Source:
    """A file, or a span of it, that is being read from `stream`."""

    def __init__(self, path: Path, stream: IO[bytes], raw: _Hashed, span: Span | None, *, is_plain: bool) -> None:
        self.stream = stream  # decompressed
        self._path = path
        self._raw = raw
        self._span = span
        self._is_plain = is_plain

    def position(self, consumed: int) -> int:
        """Bytes of the file read so far, where `consumed` ones were taken from the stream."""
        return (self._span.start if self._span else 0) + (consumed if self._is_plain else self._raw.count)

    def finish(self) -> None:
        """Read what is left. Raises DataError where these are not the bytes that were hashed."""
        while self._raw.readinto(bytearray(limits.BLOCK_BYTES)):
            pass
        if self._span is not None and self._span.sha256 not in (None, self._raw.seen.hexdigest()):
            raise changed(self._path)


@contextmanager
def open_source(path: Path, compression: Compression | None, span: Span | None = None) -> Iterator[Source]:
    """The file, or the span of one that is not compressed. Raises OSError; within, DataError for what is no whole
    compressed file."""
    raw = _Hashed(path, span.start if span else 0, span.stop if span else None)
    with raw, io.BufferedReader(raw, limits.BLOCK_BYTES) as buffered:
        if compression is None:
            yield Source(path, buffered, raw, span, is_plain=True)
            return
        from pyarrow import ArrowException

        try:
            with _DECOMPRESS[compression](buffered) as stream:
                yield Source(path, stream, raw, span, is_plain=False)
        except (EOFError, zlib.error, lzma.LZMAError, ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            check_unchanged(path, span)
            what = "cut short or damaged; copy or download it again"
            raise DataError(f"{path}: not a whole {compression} file ({reason(error)}): {what}") from None


def check_unchanged(path: Path, span: Span | None) -> None:
    """Raise DataError where the bytes of the span are not those that were hashed."""
    if span is None or span.sha256 is None:
        return
    seen, left = sha256(), span.stop - span.start
    with path.open("rb") as file:
        file.seek(span.start)
        while left and (block := file.read(min(left, 1 << 20))):
            seen.update(block)
            left -= len(block)
    if seen.hexdigest() != span.sha256:
        raise changed(path)


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), limits.BLOCK_BYTES)


def _xz(file: IO[bytes]) -> IO[bytes]:
    return io.BufferedReader(lzma.LZMAFile(file), limits.BLOCK_BYTES)


_DECOMPRESS: dict[Compression, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda file: io.BufferedReader(gzip.GzipFile(fileobj=file), limits.BLOCK_BYTES),
    "bzip2": lambda file: io.BufferedReader(bz2.BZ2File(file), limits.BLOCK_BYTES),
    "xz": _xz,
    "zstd": _zstd,
}
