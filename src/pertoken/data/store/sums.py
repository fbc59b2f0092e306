"""CRC-32 checksums of a file, one per MiB, made while it is written and checked in part or in full."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import BinaryIO

__all__ = ["SummedFile", "damaged_block"]

_BLOCK_BYTES = 1 << 20
_SAMPLED = 16  # blocks read at a start, beside the first and the last


class SummedFile:
    """What is written to `file`, with a checksum of each block. Nothing but writing, from its start to its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sums: list[int] = []
        self._size = 0
        self.closed = False

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        at = 0
        while at < len(view):
            left = _BLOCK_BYTES - self._size % _BLOCK_BYTES
            if left == _BLOCK_BYTES:
                self._sums.append(0)
            piece = view[at : at + left]
            self._sums[-1] = zlib.crc32(piece, self._sums[-1])
            self._size += len(piece)
            at += left
        self._file.write(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    @property
    def sums(self) -> dict[str, int | str]:
        """`size` in bytes, and `blocks`, eight hexadecimal digits for each of them."""
        return {"size": self._size, "blocks": "".join(f"{block:08x}" for block in self._sums)}


def damaged_block(path: Path, sums: dict[str, int | str], *, full: bool) -> str | None:
    """What differs from the checksums, in words; None if nothing does.

    All blocks are read if `full`; otherwise the first, the last and 16 others, drawn anew at each call.
    Raises OSError.
    """
    size, digits = int(sums["size"]), str(sums["blocks"])
    if path.stat().st_size != size:
        return f"{path.name} has {path.stat().st_size:,} bytes, not {size:,}"
    blocks = list(range(len(digits) // 8))
    if not full and len(blocks) > _SAMPLED + 2:
        blocks = [0, *sorted(random.SystemRandom().sample(blocks[1:-1], _SAMPLED)), blocks[-1]]
    with path.open("rb", buffering=0) as file:
        for block in blocks:
            file.seek(block * _BLOCK_BYTES)
            if f"{zlib.crc32(file.read(_BLOCK_BYTES)):08x}" != digits[8 * block : 8 * block + 8]:
                return f"{path.name} differs from its checksum in the MiB from byte {block * _BLOCK_BYTES:,}"
    return None
