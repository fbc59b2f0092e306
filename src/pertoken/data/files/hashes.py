"""The SHA-256 of data files, remembered between runs, so that 27 GB are not read again to find their store.

A hash holds as long as the file's size, times and inode are what they were. It is kept only if the file had lain
unchanged for some time when it was hashed: clocks of file systems are coarse, and a file that was written just then
may be written again without a sign of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.files import write_whole

__all__ = ["Seen", "recall", "remember", "see"]

_FILE = "hashes.json"
_QUIET_NS = 2_000_000_000  # the coarsest clock in use, FAT's


@dataclass(frozen=True)
class Seen:
    """Files as they were just before they were hashed."""

    at_ns: int
    states: tuple[list[int], ...]


def see(files: Sequence[Path]) -> Seen:
    """Raises OSError."""
    at_ns = time.time_ns()
    return Seen(at_ns, tuple(map(_state, files)))


def recall(folder: Path, files: Sequence[Path]) -> list[str] | None:
    """The hashes of files that are as they were when hashed; None where one of them is not known. Raises OSError."""
    known = _load(folder)
    found = [known.get(str(file.resolve())) for file in files]
    hashes = [entry[-1] for file, entry in zip(files, found, strict=True) if entry and entry[:-1] == _state(file)]
    return hashes if len(hashes) == len(files) else None


def remember(folder: Path, files: Sequence[Path], seen: Seen, hashes: Sequence[str]) -> None:
    """Keep the hashes of what has not changed since `seen`, nor shortly before. Failing to write is no error.

    Processes that write at once lose at most each other's news, which costs them a reading.
    """
    known = _load(folder)
    news: dict[str, list[Any]] = {}
    for file, before, digest in zip(files, seen.states, hashes, strict=True):
        if before == _state(file) and max(before[1:3]) < seen.at_ns - _QUIET_NS:
            news[str(file.resolve())] = [*before, digest]
    if all(known.get(name) == entry for name, entry in news.items()):
        return
    try:
        kept = {name: entry for name, entry in known.items() if os.path.exists(name)} | news
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, json.dumps({"checksum": _checksum(kept), "files": kept}))
    except OSError:
        pass  # the next start reads the data once more


def _state(file: Path) -> list[int]:
    """Size, both times and inode. The second time is that of any change, which no program can set back."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _load(folder: Path) -> dict[str, list[Any]]:
    """Nothing where there is no such file, or a damaged one."""
    try:
        content = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        files = content["files"]
        return dict(files) if content["checksum"] == _checksum(files) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _checksum(files: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
