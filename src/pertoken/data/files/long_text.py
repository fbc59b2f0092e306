"""Text files that are too long to be held in memory: read in blocks, as often as they are needed.

Every reading hashes the file's bytes, and one that reaches the end proves that they are those of the first reading.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from pathlib import Path

from pertoken.errors import DataError

__all__ = ["BOM", "LongText", "Seen", "Window", "blocks_of", "changed", "look_through", "one_of"]

BOM = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class LongText:
    """The characters [start, stop) of a UTF-8 file, a byte order mark left out. Small, and can be pickled.

    `sha256` is the hash of the whole file, the mark included. With `joins_crlf` each CRLF is the one character LF. What
    reads the text raises DataError where the file cannot be read, and, at the end of the file, where it has changed.
    """

    path: str
    sha256: str
    start: int
    stop: int
    joins_crlf: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        """All of the text: for one that turns out to be short."""
        return "".join(self.blocks())

    def part(self, start: int, stop: int) -> LongText:
        """The characters [start, stop) of this text."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        return replace(self, start=self.start + start, stop=self.start + stop)

    def check(self) -> None:
        """Raise DataError where the file has changed."""
        for _ in self.blocks():
            pass

    def blocks(self) -> Iterator[str]:
        """The text in blocks that are not empty, none of them much longer than a MiB."""
        seen, at, held = sha256(), 0, ""  # `at`: characters read; `held`: a \r, of which it is not known what follows
        decoder = codecs.getincrementaldecoder("utf-8")()
        for raw, content in _blocks(self.path):
            seen.update(raw)
            try:
                block = decoder.decode(content, final=not raw) if at < self.stop else ""
            except UnicodeDecodeError:  # there was none when it was read first
                raise changed(self.path) from None
            if self.joins_crlf:
                block, held = held + block, ""
                if raw and block.endswith("\r"):
                    block, held = block[:-1], "\r"
                block = block.replace("\r\n", "\n")
            if wanted := block[max(0, self.start - at) : max(0, self.stop - at)]:
                yield wanted
            at += len(block)
        if seen.hexdigest() != self.sha256:
            raise changed(self.path)


class Window:
    """A text of which a moving stretch is held. `held` starts at the character `start` of the text."""

    def __init__(self, text: str | LongText) -> None:
        self.held = text if isinstance(text, str) else ""
        self.start = 0
        self._blocks = iter(()) if isinstance(text, str) else text.blocks()

    def move(self, start: int, stop: int) -> None:
        """Hold at least the characters [start, stop), or those up to the end. `start` never goes back."""
        if stop <= self.start + len(self.held):
            return
        parts = [self.held[max(0, start - self.start) :]]
        self.start += len(self.held) - len(parts[0])
        end = self.start + len(parts[0])
        while end < stop and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            end += len(block)
        self.held = "".join(parts)

    def text(self, start: int, stop: int) -> str:
        """The characters [start, stop), which are held."""
        return self.held[start - self.start : stop - self.start]

    def finish(self) -> None:
        """Read what is left, so that a file that has changed is noticed."""
        for _ in self._blocks:
            pass


def blocks_of(text: str | LongText) -> Iterator[str]:
    """A text that is held is one block."""
    return iter([text]) if isinstance(text, str) else text.blocks()


def one_of(text: str | LongText, parts: Sequence[str]) -> str | None:
    """The first of `parts` that is found in the text."""
    longest, held = max(map(len, parts), default=0), ""
    for block in blocks_of(text) if parts else ():
        held = held[max(0, len(held) - longest + 1) :] + block
        if (found := next((part for part in parts if part in held), None)) is not None:
            return found
    return None


@dataclass(frozen=True)
class Seen:
    """What a first reading finds of a text file. Offsets are in bytes, behind a byte order mark."""

    sha256: str  # of all bytes
    digest: bytes  # 8 bytes, of those behind a byte order mark
    num_bytes: int  # all of them
    num_chars: int  # up to what is not UTF-8
    head: bytes  # the first 4 bytes behind a byte order mark
    not_utf8: tuple[int, int] | None  # the first byte that is not UTF-8, and its offset
    nul: int | None  # offset of the first NUL byte
    num_crlf: int  # of the line ends \r\n


def look_through(path: str | Path) -> Seen:
    """The first reading, in memory that does not grow with the file. Raises DataError where it cannot be read."""
    seen, digest = sha256(), blake2b(digest_size=8)
    num_bytes = num_chars = num_crlf = at = 0
    last = b""
    head, nul, not_utf8 = b"", None, None
    decoder = codecs.getincrementaldecoder("utf-8")()
    for raw, content in _blocks(path):
        seen.update(raw)
        digest.update(content)
        num_bytes += len(raw)
        head += content[: 4 - len(head)]
        num_crlf += content.count(b"\r\n") + (last == b"\r" and content.startswith(b"\n"))
        last = content[-1:] or last
        if nul is None and (found := content.find(b"\0")) >= 0:
            nul = at + found
        if not_utf8 is None:
            held = len(decoder.getstate()[0])  # bytes of a character whose others are in this block
            try:
                num_chars += len(decoder.decode(content, final=not raw))
            except UnicodeDecodeError as error:
                not_utf8 = error.object[error.start], at - held + error.start
        at += len(content)
    return Seen(seen.hexdigest(), digest.digest(), num_bytes, num_chars, head, not_utf8, nul, num_crlf)


def changed(path: str | Path) -> DataError:
    return DataError(f"{path}: changed while it was being prepared, so nothing was stored; run again")


def _blocks(path: str | Path) -> Iterator[tuple[bytes, bytes]]:
    """The file's bytes in blocks, each also without what it has of a byte order mark; an empty block ends them."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(max(_BLOCK_BYTES, len(BOM)))
            yield raw, raw.removeprefix(BOM)
            while raw:
                raw = file.read(_BLOCK_BYTES)
                yield raw, raw
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
