"""Files that are whole or absent, and folders that one process at a time writes into."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

try:
    import fcntl
except ImportError:  # no such locks on Windows: there, two processes are not told apart
    fcntl = None  # type: ignore[assignment]

from pertoken.errors import RecipeError
from pertoken.text import reason, shown

__all__ = [
    "FolderLock",
    "cache_folder",
    "check_path",
    "free_bytes",
    "free_name",
    "plain_file",
    "plain_files",
    "sha256",
    "sync",
    "user_path",
    "write_whole",
]

# What file systems without locks say, some of the networked ones: better to train there unguarded than not at all.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def cache_folder() -> Path:
    """Where pertoken keeps what it can make again. Raises RuntimeError where this user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pertoken"


def user_path(path: str | Path, what: str) -> Path:
    """What a user means by `path`, with `~` as the home folder. Raises RecipeError, naming the argument `what`, for
    what cannot be a path."""
    try:
        return Path(check_path(str(path)))
    except ValueError as error:
        raise RecipeError(f"{what}={shown(str(path))}: {error}") from None


def check_path(path: str) -> str:
    """`path` with `~` as the home folder. Raises ValueError for what cannot be a path, whether or not it exists."""
    try:
        expanded = str(Path(path).expanduser()) if path.startswith("~") else path
        os.lstat(expanded)
    except (RuntimeError, ValueError) as error:  # no such user's home; a NUL, a lone surrogate
        raise ValueError(f"no file can have this name ({reason(error)}); choose another") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("too long for a name of a file; choose a shorter one") from None
    return expanded


def plain_file(path: Path) -> Path:
    """`path`, if it is a regular file. Raises OSError for anything else: reading a pipe or a device may never end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe, a device or a socket, not a regular file", str(path))
    return path


def plain_files(folder: Path) -> None:
    """Raises OSError where a folder that foreign code is to read holds anything but regular files and folders."""
    entries: Iterable[os.DirEntry[str]]
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir() and not entry.is_file() and os.path.exists(entry.path):
                plain_file(Path(entry.path))


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
    with plain_file(path).open("rb") as file:
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
