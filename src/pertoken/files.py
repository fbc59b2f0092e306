"""Files that are whole or absent, and folders that one process at a time writes into."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, two processes are not told apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["FolderLock", "free_bytes", "free_name", "sha256", "sync", "write_whole"]

# What file systems without locks say, some of the networked ones: better to train there unguarded than not at all.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, and a power cut, finds the old content or the new. Raises OSError."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def free_name(path: Path, what: str) -> Path:
    """A name beside `path` that nothing has: NAME.WHAT-1, NAME.WHAT-2, ..."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{what}-{number}")):
        number += 1
    return aside


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """What may still be written to the file system of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


class FolderLock:
    """Keeps other processes out of a folder, until released or until this process ends, however it ends.

    The system forgets the lock (flock of `.lock`) with the process, so a crash leaves nothing to clean up.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self._path: Path | None = None

    def take(self, folder: Path) -> str | None:
        """Lock a folder that exists; None once it is ours, else who has it. Raises OSError where it cannot be tried."""
        if self._descriptor is not None or fcntl is None:
            return None
        path = folder / ".lock"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_file_at(descriptor, path):  # released, and so deleted, since it was opened
                    os.close(descriptor)
                    continue
            except BlockingIOError:  # held
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                return f"process {holder}" if holder else "another process"
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(descriptor)
                    raise
            break
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError:
            pass  # a full disk: the lock holds without the number in it
        self._descriptor, self._path = descriptor, path
        return None

    def release(self) -> None:
        """Let others in, and leave nothing behind. Does nothing where nothing is held."""
        if self._descriptor is None or self._path is None:
            return
        self._path.unlink(missing_ok=True)  # before the lock goes: who waits for this file sees that it is gone
        os.close(self._descriptor)
        self._descriptor = self._path = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        at_path = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    ours = os.fstat(descriptor)
    return (ours.st_dev, ours.st_ino) == (at_path.st_dev, at_path.st_ino)
